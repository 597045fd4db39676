"""MLServer: what is wrapped where. A server process (REST, batching) and a pool of spawned workers.

Everything is wrapped on classes, so that it also takes when the server runs already: a user's
line stands in the model's module, which MLServer imports after its own start, in the server and
in each worker.
"""

from __future__ import annotations

import mlserver.rest.server
from fastapi import FastAPI
from mlserver import MLModel
from mlserver.batching.adaptive import AdaptiveBatcher
from mlserver.batching.requests import BatchedRequests
from mlserver.parallel.dispatcher import Dispatcher
from mlserver.parallel.worker import Worker
from mlserver.rest.requests import Request
from mlserver.rest.responses import Response

from stagescope.middleware.hooks import (
    mlserver_batches,
    mlserver_codecs,
    mlserver_model,
    mlserver_rest,
    mlserver_workers,
)
from stagescope.middleware.hooks.entry import disabled
from stagescope.middleware.hooks.hook import Hook, wrap


def _install() -> None:
    if disabled():
        return
    wrap(FastAPI, "__call__", mlserver_rest.calling)
    wrap(mlserver.rest.server, "create_app", mlserver_rest.creating)
    wrap(Request, "json", mlserver_rest.parsed)
    wrap(Response, "render", mlserver_rest.rendered)
    wrap(MLModel, "__init__", mlserver_model.initialising)
    wrap(AdaptiveBatcher, "predict", mlserver_batches.queueing)
    wrap(AdaptiveBatcher, "_batch_requests", mlserver_batches.forming)
    wrap(BatchedRequests, "_merge_requests", mlserver_batches.merging)
    wrap(Dispatcher, "dispatch_request", mlserver_workers.sending)
    wrap(Worker, "_process_request", mlserver_workers.receiving)
    mlserver_codecs.time_codecs()


HOOK = Hook("mlserver", "mlserver", ("1.6", "2"), _install)
