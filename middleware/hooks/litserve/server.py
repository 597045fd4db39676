"""LitServe: API server, queue and spawned inference worker, as one timeline a request.

Here is the API server's side; `litserve_worker` is the other. The timeline goes along in the
request's id, for a payload may be of any type, and the id is a text to LitServe on both sides.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import litserve.server
from litserve.server import LitServer

from stagescope.middleware.hooks import hook
from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.litserve.worker import inference_worker
from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.slots import ENDS, Slot
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.remote import carried
from stagescope.recorder import format as fmt


class LendingQueue:
    """The queue to the workers, which lends them the timeline of each request put into it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def put(self, item: Any, *args: Any, **kwargs: Any) -> None:
        """Put *item*, a tuple (response queue, id, stamp, payload)."""
        self._inner.put(_lent(item), *args, **kwargs)

    def put_nowait(self, item: Any) -> None:
        """Put *item*, without waiting."""
        self._inner.put_nowait(_lent(item))

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # Not there yet, while being copied.
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _bare, (self._inner,)


def _bare(queue: Any) -> Any:
    """Return what arrives in another process for a LendingQueue: the queue itself."""
    return queue


def _lent(item: Any) -> Any:
    with guarded():
        response_queue, request_id, *rest = item
        if isinstance(request_id, str):
            return (response_queue, carried(request_id), *rest)
    return item


def _lending(get_queue: Callable[..., Any]) -> Callable[..., Any]:
    def get_lending_queue(server: Any, api_path: str) -> LendingQueue:
        return LendingQueue(get_queue(server, api_path))

    return get_lending_queue


def _streamed(stream: Callable[..., Any]) -> Callable[..., Any]:
    """Charge what the worker does to its stages, not to `respond`.

    Starlette opens the response before there is anything to send, and the first chunk is sent
    while the worker is on the next. What the worker opens after these two moments counts
    anyhow; what was open at them is opened once more here.
    """

    async def timed(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        timeline = current.get()
        outputs = stream(*args, **kwargs)
        if timeline is None or not timeline.lent:
            async for output in outputs:
                yield output
            return
        again = [_OpenedAgain(timeline)]
        async for output in outputs:
            again = [opened for opened in again if not opened.settled()]
            yield output
            if timeline is not None:
                again.append(_OpenedAgain(timeline))
                timeline = None
        for opened in again:
            opened.settled(last=True)

    return timed


class _OpenedAgain:
    """The stages that the worker was in at this moment, opened by the API server as well."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._since_ns = timeline.clock()
        self._open: dict[int, int] = {}
        """Entry here by entry there, as long as they are open."""
        self._closed: set[int] = set()
        self.settled()

    def settled(self, *, last: bool = False) -> bool:
        """Do as the worker has done since; True where nothing more is to come."""
        timeline = self._timeline
        if timeline.done:
            return True
        with guarded(timeline.recorder):
            assert timeline.lent
            slot = timeline.lent[-1]
            for there in range(ENDS):
                self._follow(slot, there, last=last)
        return last or not self._open

    def _follow(self, slot: Slot, there: int, *, last: bool) -> None:
        code = slot.codes[there]
        start, end = slot.times[there], slot.times[there + ENDS]
        since, timeline = self._since_ns, self._timeline
        if code == fmt.CODE_UNUSED or code >= fmt.CODE_SPECIAL or there in self._closed:
            return
        if not 0 < start <= since:
            return
        if there not in self._open and (end == 0 or end > since):
            # Also one that the worker has opened with hindsight, as a batch does.
            self._open[there] = timeline.open_at(code, since)
        if there in self._open:
            timeline.recode(self._open[there], code)
            if end or last:
                timeline.close_at(self._open.pop(there), max(since, end or timeline.clock()))
                self._closed.add(there)


def _install() -> None:
    hook.install("uvicorn")  # It puts the middleware around the app of each API server.
    wrap(LitServer, "_get_request_queue", _lending)
    wrap(LitServer, "data_streamer", _streamed)
    LitServer.data_streamer = staticmethod(LitServer.data_streamer)
    # Not by `wrap`: a process to be spawned finds its function by the name that it goes by.
    litserve.server.inference_worker = inference_worker


HOOK = Hook("litserve", "litserve", ("0.2.10", "0.3"), _install)
