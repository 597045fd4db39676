"""MLServer's pool: the timelines of a message go with it, as one more attribute of plain text.

The server charges `inference` from sending to receiving; the worker writes into the same records
how long the message lay in the `queue`, and what its model did. A worker without stagescope
passes the attribute over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagescope.middleware.carrier import AttachedTimeline, attach, lend
from stagescope.middleware.guard import guarded
from stagescope.middleware.hooks import entry
from stagescope.middleware.names import CODES
from stagescope.middleware.timeline import Timeline, current
from stagescope.middleware.together import Together

CARRIERS = "stagescope"
QUEUE = CODES["queue"]


def sending(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the sending of a message to a worker."""

    async def lend_and_dispatch(self: Any, message: Any) -> Any:
        with guarded():
            message.__dict__[CARRIERS] = lend_present()
        return await dispatch(self, message)

    return lend_and_dispatch


def lend_present() -> list[str]:
    """Lend the timeline that the present code works for; all of them where it is a batch's."""
    present = current.get()
    timelines = present.timelines if isinstance(present, Together) else (present,)
    carriers = [_lend(timeline) for timeline in timelines if timeline is not None]
    return [carrier for carrier in carriers if carrier]


def _lend(timeline: Timeline) -> str | None:
    token = current.set(timeline)
    try:
        return lend()
    finally:
        current.reset(token)


def receiving(process: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the processing of a message in the worker."""

    async def attach_and_process(self: Any, message: Any) -> Any:
        attached: list[AttachedTimeline] = []
        with guarded():
            attached = _attach(vars(message).pop(CARRIERS, ()))
        if not attached:
            return await process(self, message)
        token = current.set(attached[0] if len(attached) == 1 else Together(attached))
        try:
            return await process(self, message)
        finally:
            current.reset(token)
            for timeline in attached:
                timeline.done = True

    return attach_and_process


def _attach(carriers: list[str]) -> list[AttachedTimeline]:
    recorder = entry.recorder() if carriers else None
    if recorder is None:
        return []
    attached = [one for carrier in carriers if (one := attach(carrier, recorder))]
    for timeline in attached:
        timeline.close_at(timeline.open_at(QUEUE, timeline.lent_ns), timeline.clock())
    return attached
