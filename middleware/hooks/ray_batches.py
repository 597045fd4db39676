"""Ray Serve: `@serve.batch`.

Ray forms the next batch while the present one runs; then the formed one waits for its turn. A
batch starts to form, by our word, when its worker is free: what its members waited before is
`queue.batch`, and only what they waited for companions with a free worker is `batch.wait`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from functools import wraps
from inspect import isasyncgenfunction
from typing import Any

from stagescope.middleware.batch_work import working_for
from stagescope.middleware.batches import batch
from stagescope.middleware.guard import guarded

_TICKET = "_stagescope_ticket"
_FREE_NS = "_stagescope_free_ns"
"""On an item: since when a worker was free for its batch, where that was before it was formed."""
_FREED_NS = "_stagescope_freed_ns"
"""On the queue: when a worker became free last."""


def putting(put: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the enqueueing of one item, which happens in its request."""

    def take_ticket_and_put(self: Any, request: Any) -> None:
        with guarded():
            setattr(request, _TICKET, batch.enqueue())
        put(self, request)

    return take_ticket_and_put


def forming(wait: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the forming of a batch, which may go on while no worker is free."""

    async def wait_and_note(self: Any) -> Any:
        since_ns = time.monotonic_ns()
        formed = await wait(self)
        with guarded():
            if not self.semaphore.locked():
                since_ns = max(since_ns, getattr(self, _FREED_NS, 0))
                for request in formed[0]:
                    setattr(request, _FREE_NS, since_ns)
        return formed

    return wait_and_note


def freeing(process: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the way of formed batches through the worker: at its end the worker is free."""

    async def process_and_note(self: Any, *args: Any) -> None:
        try:
            await process(self, *args)
        finally:
            # Of the tasks, which wait or run, this is still one.
            if len(self.tasks) >= self.max_concurrent_batches:
                setattr(self, _FREED_NS, time.monotonic_ns())

    return process_and_note


def working(process: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the running of one batch, whose turn has come."""

    async def process_timed(self: Any, function: Callable[..., Any], requests: list[Any]) -> None:
        free_ns = getattr(requests[0], _FREE_NS, 0) or getattr(self, _FREED_NS, 0)
        formed = batch(model=_name(self), clock=lambda: free_ns or time.monotonic_ns())
        with guarded():
            alive = [request for request in requests if not request.future.cancelled()]
            formed.add(*(getattr(request, _TICKET, None) for request in alive))
        with formed, working_for(formed):
            await process(self, _timed(function, formed), requests)

    return process_timed


def _timed(function: Callable[..., Any], formed: batch) -> Callable[..., Any]:
    """The user's function as the model call; Ray keeps its exceptions from us further out."""
    if isasyncgenfunction(function):

        @wraps(function)
        async def generate(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            with formed.inference():
                async for results in function(*args, **kwargs):
                    yield results

        return generate

    @wraps(function)
    async def run(*args: Any, **kwargs: Any) -> Any:
        with formed.inference():
            return await function(*args, **kwargs)

    return run


def _name(queue: Any) -> str:
    """Name the model by its deployment and function: `Model.predict`."""
    import ray.serve

    with guarded():
        return f"{ray.serve.get_replica_context().deployment}.{queue._function_name}"
    return str(queue._function_name)
