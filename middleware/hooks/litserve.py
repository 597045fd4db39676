"""LitServe: API server, queue and spawned inference worker, as one timeline a request.

Here is the API server's side; `litserve_worker` is the other. The timeline goes along in the
request's id, for a payload may be of any type, and the id is a text to LitServe on both sides.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import litserve.server
from litserve.server import LitServer

from stagescope.middleware.guard import guarded
from stagescope.middleware.hooks import hook
from stagescope.middleware.hooks.carried import carried
from stagescope.middleware.hooks.hook import Hook, wrap
from stagescope.middleware.hooks.litserve_worker import inference_worker
from stagescope.middleware.names import CODES
from stagescope.middleware.slots import ENDS, Slot
from stagescope.middleware.timeline import Timeline, current

_QUEUE = CODES["queue.batch"]


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
    """Give what arrives in another process for a LendingQueue: the queue itself."""
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
    """The stage that the worker was in at this moment, opened by the API server as well."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._since_ns = timeline.clock()
        self._index = timeline.open_at(_QUEUE, self._since_ns)
        self.settled()

    def settled(self, *, last: bool = False) -> bool:
        """Do as the worker has done since; True where nothing more is to come."""
        timeline = self._timeline
        if timeline.done:
            return True
        with guarded(timeline.recorder):
            assert timeline.lent
            code, end = _charged_at(timeline.lent[-1], self._since_ns)
            timeline.recode(self._index, code)
            if end or last:
                timeline.close_at(self._index, end or timeline.clock())
                return True
        return False


def _charged_at(slot: Slot, at_ns: int) -> tuple[int, int]:
    """Give code and end (0: still open) of the entry of *slot* that is charged at *at_ns*."""
    for index in range(ENDS - 1, -1, -1):
        code, start, end = slot.codes[index], slot.times[index], slot.times[index + ENDS]
        if code and 0 < start <= at_ns and (end == 0 or end > at_ns):
            return code, end
    return _QUEUE, at_ns


def _install() -> None:
    hook.install("uvicorn")  # It puts the middleware around the app of each API server.
    wrap(LitServer, "_get_request_queue", _lending)
    wrap(LitServer, "data_streamer", _streamed)
    LitServer.data_streamer = staticmethod(LitServer.data_streamer)
    # Not by `wrap`: a process to be spawned finds its function by the name that it goes by.
    litserve.server.inference_worker = inference_worker


HOOK = Hook("litserve", "litserve", ("0.2.10", "0.3"), _install)
