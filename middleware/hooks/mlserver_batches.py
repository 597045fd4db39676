"""MLServer's adaptive batching, which runs in the server process.

The merged request has no id, and the headers of one member alone; so the members are kept beside
it, by the identity of the objects, and never travel with it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

from stagescope.middleware.batches import Ticket, batch
from stagescope.middleware.guard import guarded

_TICKETS = "_stagescope_tickets"

_forming: ContextVar[tuple[batch, dict[int, Ticket | None]] | None] = ContextVar(
    "stagescope_forming", default=None
)
_formed: dict[int, batch] = {}
"""By the id of their merged request, from the merging until the model takes it."""


def queueing(predict: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a request's way through the batcher."""

    async def queue_and_predict(self: Any, request: Any) -> Any:
        tickets: dict[int, Ticket | None] = vars(self).setdefault(_TICKETS, {})
        tickets[id(request)] = batch.enqueue()
        try:
            return await predict(self, request)
        finally:
            tickets.pop(id(request), None)

    return queue_and_predict


def forming(batches: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the batcher's loop. It never waits for the model, so it is always free for the next."""

    async def form(self: Any) -> AsyncIterator[Any]:
        inner = batches(self)
        try:
            while True:
                formed = batch(model=self._model.name)
                _forming.set((formed, vars(self).get(_TICKETS, {})))
                try:
                    merged = await anext(inner)
                except StopAsyncIteration:
                    return
                yield merged
        finally:
            await inner.aclose()

    return form


def merging(merge: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the merging of the members: the batch has closed."""

    def merge_timed(self: Any) -> Any:
        present = _forming.get()
        if present is None:
            return merge(self)
        formed, tickets = present
        _forming.set(None)
        with guarded():
            formed.add(*(tickets.get(id(one)) for one in self.inference_requests.values()))
        with formed.collate():
            merged = merge(self)
        _formed[id(merged)] = formed
        return merged

    return merge_timed


def take(request: object) -> batch | None:
    """Give the batch whose merged request this is; None for a request of its own."""
    return _formed.pop(id(request), None)
