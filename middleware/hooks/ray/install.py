"""Ray Serve: what is wrapped where. One process a replica; user code runs on a loop of its own there.

The request's record belongs to the ingress replica, from the moment that the proxy took the
request; calls to other deployments are written into it, or leave a record of their own (http.py);
members of `@serve.batch` keep their own timelines.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import wraps
from inspect import isasyncgenfunction
from typing import Any

import ray
from ray.serve._private import default_impl, http_util, proxy, replica
from ray.serve.batching import _BatchQueue as queue

from stagescope.middleware.batch import batch, working_for
from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.ray import http
from stagescope.middleware.hooks.wrapping import disabled
from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.guard import guarded

# Ray Serve: `@serve.batch`.
#
# Ray forms the next batch while the present one runs; then the formed one waits for its turn. A
# batch starts to form, by our word, when its worker is free: what its members waited before is
# `queue.batch`, and only what they waited for companions with a free worker is `batch.wait`.


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


log = logging.getLogger("stagescope")

SETUP = "worker_process_setup_hook"

# Pickled by value, as code of `__main__`: on a host without stagescope it does nothing, where a
# function of ours by name would keep every worker from starting.
_SOURCE = """
def stagescope_setup():
    try:
        from stagescope import install
        from stagescope.middleware.recording.guard import guarded
    except ImportError:
        return
    with guarded():
        install("ray.serve")
"""


def initialising(init: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `ray.init`: the job's workers install the hook when they start."""

    def init_with_setup(*args: Any, **kwargs: Any) -> Any:
        kwargs["runtime_env"] = with_setup(kwargs.get("runtime_env"))
        return init(*args, **kwargs)

    return init_with_setup


def with_setup(runtime_env: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Add our setup to a runtime environment; one that has a setup of its own stays as it is."""
    if runtime_env and SETUP in runtime_env:
        log.warning(
            "stagescope: the runtime environment has a %s of its own: "
            "call stagescope.install('ray.serve') in it, or the replicas are not timed",
            SETUP,
        )
        return runtime_env
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(_SOURCE, names)  # noqa: S102 - a text of ours, and nothing else
    return {**(runtime_env or {}), SETUP: names["stagescope_setup"]}


def warn_if_late(ray: Any) -> None:
    """Say that the workers of a cluster which this driver has joined already are not timed."""
    if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.SCRIPT_MODE:
        log.warning(
            "stagescope: ray.init came before stagescope.install('ray.serve'): "
            "the workers of this job are not timed unless they were started by `stagescope run`"
        )


Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def _install() -> None:
    if disabled():
        return
    callables = replica.UserCallableWrapper
    wrap(default_impl, "get_request_metadata", http.noting)
    for name, around in {
        "call_user_method": http.called,
        "_call_user_generator": http.streamed,
        "_call_http_entrypoint": http.entered,
    }.items():
        wrap(callables, name, _on_user_loop(callables, around))
    wrap(proxy.HTTPProxy, "__call__", http.arriving)
    wrap(http_util, "_apply_middlewares", http.left_alone)
    wrap(queue, "put", putting)
    wrap(queue, "wait_for_batch", forming)
    wrap(queue, "_process_sub_batches", freeing)
    wrap(queue, "_process_batch_inner", working)
    wrap(ray, "init", initialising)
    warn_if_late(ray)


def _on_user_loop(callables: Any, around: Wrapper) -> Wrapper:
    """Wrap the coroutine inside one of Ray's functions that run it on the user's loop."""

    def make(run: Any) -> Any:
        return callables._run_user_code(around(run.__wrapped__))

    return make


HOOK = Hook("ray.serve", "ray", ("2.50", "3"), _install)
