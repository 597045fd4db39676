"""One connection before the run: a mistyped port is not worth a test of ten minutes."""

from __future__ import annotations

import asyncio
import socket
import ssl

from stagescope.errors import StagescopeError
from stagescope.loadgen.target import Target

PATIENCE_S = 5.0


async def probe(target: Target, patience_s: float = PATIENCE_S) -> None:
    """Open and close one connection; nothing is sent.

    Raises StagescopeError, which says what stands in the way.
    """
    url = target.shown_url
    try:
        async with asyncio.timeout(patience_s):
            _, writer = await asyncio.open_connection(
                target.host, target.port, ssl=target.tls or None
            )
    except ConnectionRefusedError:
        raise StagescopeError(
            f"nothing answers at {url}: connection refused; is the server up?"
        ) from None
    except TimeoutError:
        raise StagescopeError(
            f"nothing answers at {url} within {patience_s:g} s; is the host right, the server up?"
        ) from None
    except socket.gaierror as problem:
        raise StagescopeError(
            f"the host of {url} cannot be resolved: {problem.strerror}; is its name right?"
        ) from None
    except ssl.SSLError as problem:
        raise StagescopeError(f"no TLS with {url}: {problem.reason or problem}") from None
    except OSError as problem:
        raise StagescopeError(_reason(url, problem)) from None
    writer.transport.abort()


def _reason(url: str, problem: OSError) -> str:
    if "Connect call failed" in str(problem):  # several addresses, each refused or unreachable
        return f"nothing answers at {url}: {problem}; is the server up?"
    return f"{url} cannot be reached: {problem.strerror or problem}"
