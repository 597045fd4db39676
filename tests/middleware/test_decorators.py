"""A decorated async generator that is left behind logs what the undecorated one logs, and no more."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import StreamingResponse

from stagescope import stage
from stagescope.middleware.asgi import StageMiddleware
from stagescope.testing.recording import Recording

Generator = Callable[[], AsyncIterator[bytes]]
LEFT = 20


async def quiet() -> AsyncIterator[bytes]:
    """Close something at the end, as a session."""
    try:
        for number in range(9):
            await asyncio.sleep(0)
            yield b"%d" % number
    finally:
        await asyncio.sleep(0)


async def noisy() -> AsyncIterator[bytes]:
    """Fail at the end, which the loop logs."""
    try:
        for number in range(9):
            await asyncio.sleep(0)
            yield b"%d" % number
    finally:
        await asyncio.sleep(0)
        raise ValueError("the app's own")


async def _settled() -> None:
    gc.collect()
    for _ in range(20):
        await asyncio.sleep(0)


async def _break_in_a_cycle(generator: Generator) -> None:
    running = generator()
    async for chunk in running:
        if chunk == b"2":
            cycle: list[Any] = [running]
            cycle.append(cycle)
            break


async def _break(generator: Generator) -> None:
    async for chunk in generator():
        if chunk == b"2":
            break


def lines_of(caplog: pytest.LogCaptureFixture, work: Callable[[], Any]) -> int:
    """Return how many lines asyncio logs while *work* is done often, and after it."""

    async def main() -> None:
        for _ in range(LEFT):
            await work()
        await _settled()

    caplog.clear()
    with caplog.at_level(logging.WARNING, "asyncio"):
        asyncio.run(main())
        gc.collect()
    return sum(record.name == "asyncio" for record in caplog.records)


@pytest.mark.parametrize("leave", [_break, _break_in_a_cycle])
@pytest.mark.parametrize(("generator", "each"), [(quiet, 0), (noisy, 1)])
def test_one_that_the_collector_closes(
    generator: Generator, each: int, leave: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Left in the midst, alone or in a cycle, and closing with an await: no error of ours."""
    decorated = stage("inference.decode")(generator)

    assert lines_of(caplog, lambda: leave(generator)) == each * LEFT
    assert lines_of(caplog, lambda: leave(decorated)) == each * LEFT


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("generator", [quiet, noisy])
def test_streams_whose_client_is_gone(
    generator: Generator, cancelled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Dropped or cancelled after the second chunk, behind the middleware: as many lines as bare."""
    recording = Recording(tmp_path)
    decorated = stage("inference.decode")(generator)

    async def abandon(generator: Generator) -> None:
        sent = 0

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await StreamingResponse(generator())(scope, receive, send)

        async def receive() -> Any:
            await asyncio.sleep(3600)

        async def send(message: Any) -> None:
            nonlocal sent
            sent += 1
            if sent == 3:
                if cancelled:
                    request.cancel()
                    await asyncio.sleep(0)
                raise OSError("the client is gone")

        wrapped = StageMiddleware.around(app, recording.recorder)
        scope = {
            "type": "http", "method": "GET", "path": "/", "headers": [],
            "asgi": {"spec_version": "2.4"},
        }  # fmt: skip
        request = asyncio.ensure_future(wrapped(scope, receive, send))
        await asyncio.wait([request])
        assert request.cancelled() or request.exception() is not None

    bare = lines_of(caplog, lambda: abandon(generator))
    assert lines_of(caplog, lambda: abandon(decorated)) == bare
    recording.close()
