"""Ray Serve: what is wrapped where. One process a replica; user code runs on a loop of its own there.

The request's record belongs to the ingress replica, from the moment that the proxy took the
request (ray_http.py); calls to other deployments are written into it, or leave a record of their
own (ray_calls.py); members of `@serve.batch` keep their own timelines (ray_batches.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.serve._private import default_impl, http_util, proxy, replica
from ray.serve.batching import _BatchQueue as queue

from stagescope.middleware.hooks import ray_batches, ray_calls, ray_http, ray_workers
from stagescope.middleware.hooks.entry import disabled
from stagescope.middleware.hooks.hook import Hook, wrap

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


def _install() -> None:
    if disabled():
        return
    callables = replica.UserCallableWrapper
    wrap(default_impl, "get_request_metadata", ray_calls.noting)
    for name, around in {
        "call_user_method": ray_calls.called,
        "_call_user_generator": ray_calls.streamed,
        "_call_http_entrypoint": ray_http.entered,
    }.items():
        wrap(callables, name, _on_user_loop(callables, around))
    wrap(proxy.HTTPProxy, "__call__", ray_http.arriving)
    wrap(http_util, "_apply_middlewares", ray_http.left_alone)
    wrap(queue, "put", ray_batches.putting)
    wrap(queue, "wait_for_batch", ray_batches.forming)
    wrap(queue, "_process_sub_batches", ray_batches.freeing)
    wrap(queue, "_process_batch_inner", ray_batches.working)
    wrap(ray, "init", ray_workers.initialising)
    ray_workers.warn_if_late(ray)


def _on_user_loop(callables: Any, around: Wrapper) -> Wrapper:
    """Wrap the coroutine inside one of Ray's functions that run it on the user's loop."""

    def make(run: Any) -> Any:
        return callables._run_user_code(around(run.__wrapped__))

    return make


HOOK = Hook("ray.serve", "ray", ("2.50", "3"), _install)
