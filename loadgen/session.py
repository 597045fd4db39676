"""One run from its first connection to its last response, with signals and a progress callback."""

from __future__ import annotations

import asyncio
import importlib
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from stagescope.errors import StagescopeError
from stagescope.loadgen.driver import Driver
from stagescope.loadgen.health import quantile
from stagescope.loadgen.progress import Progress, Watch
from stagescope.loadgen.target import Target


def raise_file_limit() -> None:
    """Raise this process's soft limit of open files to its hard limit, where the system lets us."""
    try:
        import resource
    except ModuleNotFoundError:  # not a Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


PATIENCE_S = 5.0


async def probe(target: Target, patience_s: float = PATIENCE_S) -> None:
    """Open and close one connection; nothing is sent.

    Raises StagescopeError, which says what stands in the way.
    """
    url = target.shown_url
    try:
        async with asyncio.timeout(patience_s):
            _, writer = await asyncio.open_connection(target.host, target.port, ssl=target.trust)
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
    except ssl.SSLCertVerificationError as problem:
        raise StagescopeError(
            f"no TLS with {url}: {problem.verify_message or problem}; name the certificate to "
            "trust by --cacert FILE or SSL_CERT_FILE, or leave it unchecked by --insecure"
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


_RECENT = 2_000
"""Rows behind the median that is shown while the run goes on: sorting all would make sends late."""


def drive(driver: Driver, target: Target, whole_s: float, watch: Watch | None = None) -> str:
    """Probe the server, run *driver* to its end, and return the name of the event loop used.

    SIGINT and SIGTERM end the run early, a second one at once, where this is the main thread.
    Raises StagescopeError where nothing answers to begin with; then nothing was sent.
    """
    raise_file_limit()
    loop_factory, name = _loop()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_drive(driver, target, whole_s, watch))
    return name


def _loop() -> tuple[Callable[[], asyncio.AbstractEventLoop] | None, str]:
    """uvloop where it is installed: a third less CPU a request; nothing depends on it."""
    try:
        return importlib.import_module("uvloop").new_event_loop, "uvloop"
    except ModuleNotFoundError:
        return None, "asyncio"


async def _drive(driver: Driver, target: Target, whole_s: float, watch: Watch | None) -> None:
    await probe(target)
    loop = asyncio.get_running_loop()
    with _signals(loop, driver.stop):
        watching = loop.create_task(_watch(driver, whole_s, watch)) if watch else None
        try:
            await driver.run()
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.wait((watching,))
    if watch:
        watch.look(progress(driver, whole_s))


@contextmanager
def _signals(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _watch(driver: Driver, whole_s: float, watch: Watch) -> None:
    while True:
        await asyncio.sleep(watch.every_s)
        watch.look(progress(driver, whole_s))


def progress(driver: Driver, whole_s: float) -> Progress:
    """Return how far *driver* is now."""
    elapsed_s = max(0.0, (time.monotonic_ns() - driver.started_ns) / 1e9)
    columns = driver.log.integers
    recent = zip(columns["intended_ns"][-_RECENT:], columns["last_byte_ns"][-_RECENT:], strict=True)
    return Progress(
        sent=driver.started,
        planned=driver.planned,
        in_flight=driver.in_flight,
        failed=driver.log.failed,
        elapsed_s=elapsed_s,
        whole_s=whole_s,
        rate_per_s=driver.started / min(elapsed_s, whole_s) if elapsed_s else 0.0,
        p50_ms=quantile([last - intended for intended, last in recent], 0.5) / 1e6,
    )
