"""Each kind of failure has its word, as aiohttp really raises it."""

from __future__ import annotations

import asyncio
import errno
import ssl

import aiohttp
import pytest

from stagescope.loadgen.failures import REQUEST_FAILURES, failure_word


async def raised_by(url: str) -> BaseException:
    """Return what a request to *url* raises."""
    async with aiohttp.ClientSession() as session:
        with pytest.raises(REQUEST_FAILURES) as caught:
            await session.get(url)
    return caught.value


def test_a_name_without_address_is_dns() -> None:
    """`.invalid` never resolves (RFC 6761)."""
    assert failure_word(asyncio.run(raised_by("http://nobody.invalid/"))) == "dns"


async def raised_by_no_tls() -> BaseException:
    """Return what an https request to a server that speaks something else raises."""

    async def greet(_: asyncio.StreamReader, out: asyncio.StreamWriter) -> None:
        out.write(b"220 no TLS here\r\n")
        await out.drain()
        out.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        return await raised_by(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")


def test_no_handshake_is_tls() -> None:
    """Who does not speak TLS fails there, not in HTTP."""
    assert failure_word(asyncio.run(raised_by_no_tls())) == "tls"


@pytest.mark.parametrize(
    ("problem", "word"),
    [
        (OSError(errno.EMFILE, ""), "files"),
        (OSError(errno.EADDRNOTAVAIL, ""), "ports"),
        (OSError(errno.EHOSTUNREACH, ""), "unreachable"),
        (BrokenPipeError(errno.EPIPE, ""), "reset"),
        (ConnectionResetError(), "reset"),
        (OSError("Multiple exceptions: [Errno 111] Connect call failed"), "refused"),
        (ssl.SSLCertVerificationError(), "tls"),
        (TimeoutError(), "timeout"),
        (KeyError("x"), "KeyError"),
    ],
)
def test_words(problem: BaseException, word: str) -> None:
    """The system's own errors, by number or kind; what is unknown is its class."""
    assert failure_word(problem) == word
