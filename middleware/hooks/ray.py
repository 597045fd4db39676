"""Ray Serve: what is wrapped where. One process a replica; user code runs on a loop of its own there.

The request's record belongs to the ingress replica, from the moment that the proxy took the
request (ray_http.py); calls to other deployments are written into it, or leave a record of their
own (ray_calls.py); members of `@serve.batch` keep their own timelines (ray_batches.py).
"""

from __future__ import annotations

import ray
import ray.serve.batching
from ray.serve._private import default_impl, proxy, replica

from stagescope.middleware.hooks import ray_batches, ray_calls, ray_http, ray_workers
from stagescope.middleware.hooks.entry import disabled
from stagescope.middleware.hooks.hook import Hook, wrap


def _install() -> None:
    if disabled():
        return
    callables = replica.UserCallableWrapper
    on_user_loop = callables._run_user_code
    wrap(default_impl, "get_request_metadata", ray_calls.noting)
    wrap(callables, "call_user_method", lambda run: on_user_loop(ray_calls.called(run.__wrapped__)))
    wrap(
        callables,
        "_call_user_generator",
        lambda run: on_user_loop(ray_calls.streamed(run.__wrapped__)),
    )
    wrap(
        callables,
        "_call_http_entrypoint",
        lambda run: on_user_loop(ray_http.entered(run.__wrapped__)),
    )
    wrap(proxy.HTTPProxy, "__call__", ray_http.arriving)
    ray_http.leave_proxy_alone(proxy.HTTPProxy)
    queue = ray.serve.batching._BatchQueue
    wrap(queue, "put", ray_batches.putting)
    wrap(queue, "wait_for_batch", ray_batches.forming)
    wrap(queue, "_process_sub_batches", ray_batches.freeing)
    wrap(queue, "_process_batch_inner", ray_batches.working)
    wrap(ray, "init", ray_workers.initialising)
    ray_workers.warn_if_late(ray)


HOOK = Hook("ray.serve", "ray", ("2.50", "3"), _install)
