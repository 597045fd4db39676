"""One run from its first connection to its last response, with signals and somebody watching."""

from __future__ import annotations

import asyncio
import importlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from stagescope.loadgen.driver import Driver
from stagescope.loadgen.file_limit import raise_file_limit
from stagescope.loadgen.health import quantile
from stagescope.loadgen.probe import probe
from stagescope.loadgen.target import Target

_RECENT = 2_000
"""Rows behind the median that is shown while the run goes on: sorting all would make sends late."""


@dataclass(frozen=True, slots=True)
class Glimpse:
    """The run so far."""

    sent: int
    planned: int
    in_flight: int
    failed: int
    elapsed_s: float
    whole_s: float
    rate_per_s: float
    """Achieved so far."""
    p50_ms: float
    """Of the latest 2,000 finished requests, from `intended`."""


@dataclass(frozen=True, slots=True)
class Watch:
    """Somebody who wants a `Glimpse` every `every_s` seconds."""

    look: Callable[[Glimpse], None]
    every_s: float


def drive(driver: Driver, target: Target, whole_s: float, watch: Watch | None = None) -> str:
    """Probe the server, run *driver* to its end, and give the name of the event loop used.

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
        watch.look(glimpse(driver, whole_s))


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
        watch.look(glimpse(driver, whole_s))


def glimpse(driver: Driver, whole_s: float) -> Glimpse:
    """Look at *driver* now."""
    elapsed_s = max(0.0, (time.monotonic_ns() - driver.started_ns) / 1e9)
    columns = driver.log.integers
    recent = zip(columns["intended_ns"][-_RECENT:], columns["last_byte_ns"][-_RECENT:], strict=True)
    return Glimpse(
        sent=driver.started,
        planned=driver.planned,
        in_flight=driver.in_flight,
        failed=driver.log.failed,
        elapsed_s=elapsed_s,
        whole_s=whole_s,
        rate_per_s=driver.started / min(elapsed_s, whole_s) if elapsed_s else 0.0,
        p50_ms=quantile([last - intended for intended, last in recent], 0.5) / 1e6,
    )
