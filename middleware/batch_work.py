"""Code that runs once for a whole batch: its stages are every member's, and the batch's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from stagescope.middleware.batches import batch
from stagescope.middleware.timeline import Timeline, current
from stagescope.middleware.together import Together


@contextmanager
def working_for(formed: batch) -> Iterator[None]:
    """Charge the stages opened inside to all that *formed* has taken in.

    Batchers run in a task that inherited the context of whichever request happened to start it:
    without this its stages would be charged to that one.
    """
    timelines = timelines_of(formed)
    together = Together(timelines) if timelines else None
    token = current.set(together)
    try:
        yield
    finally:
        if together is not None:
            together.done = True
        with suppress(ValueError):  # A generator may be closed in another context.
            current.reset(token)


def timelines_of(formed: batch) -> list[Timeline]:
    """Give the timelines of the members, and behind them the batch's own."""
    timelines = [ticket.timeline for ticket in formed.tickets]
    own = formed.timeline
    return [*timelines, own] if own is not None else timelines
