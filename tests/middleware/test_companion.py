"""What runs beside the app is stopped with it, and the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import threading

from stagescope.middleware.asgi import stopped


class WaitsForLoop:
    """A companion that can stop only while the event loop runs."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.went_on = False

    def stop(self) -> None:
        """Wait for a callback of the loop."""
        ran = threading.Event()
        self._loop.call_soon_threadsafe(ran.set)
        self.went_on = ran.wait(20)


def test_stopping_leaves_the_event_loop_free() -> None:
    """A callback of the loop runs while the companion stops."""

    async def main() -> bool:
        companion = WaitsForLoop(asyncio.get_running_loop())
        await stopped(companion)
        return companion.went_on

    assert asyncio.run(main())
