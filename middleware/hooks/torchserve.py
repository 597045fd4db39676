"""TorchServe: every request of a batch by its own trace, timed in the Python worker.

Nothing to change under `stagescope run -- torchserve ...`; without it one line in the handler:

    class Handler(StagescopeHandlerMixin, BaseHandler): ...

The front end is Java and tells the worker neither when a request came nor how long it waited:
see `torchserve_log` for where that is read, and docs/hooks/torchserve.md for what is timed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

from stagescope.middleware import cold_start
from stagescope.middleware.asgi import DISABLE_VARIABLE, SERVICE_VARIABLE
from stagescope.middleware.guard import guarded
from stagescope.middleware.hooks.hook import Hook, install, wrap
from stagescope.middleware.hooks.torchserve_call import Call, Request, calibrate
from stagescope.middleware.hooks.torchserve_waits import Waits
from stagescope.middleware.process import process_recorder
from stagescope.middleware.recorder import Recorder
from stagescope.middleware.stage import stage
from stagescope.middleware.timeline import current

SERVICE = "torchserve"
"""The service's name where `OTEL_SERVICE_NAME` gives none."""

METHODS = {
    "preprocess": "preprocess",
    "inference": "inference",
    "explain_handle": "inference",
    "postprocess": "postprocess",
}
"""A handler's methods and the stages that they are."""


class Worker:
    """What this process knows from one batch to the next."""

    def __init__(self) -> None:
        self.reading_since_ns = 0
        self.free_ns = 0
        self.call: Call | None = None
        self.waits: Waits | None = None
        self._covered: Any = None

    def open(self) -> Recorder | None:
        """Open recorder and log; at the model's loading, so that no request waits for it."""
        recorder = process_recorder(None, os.environ.get(SERVICE_VARIABLE) or SERVICE)
        if recorder is not None and self.waits is None:
            self.waits = Waits(front_end_thread(sys.argv))
            calibrate(recorder)
        return recorder

    def begin(self, service: Any, requests: Sequence[Request]) -> None:
        """Start the timelines of a batch."""
        self.call = None
        recorder = self.open()
        if recorder is None or self.waits is None or not requests:
            return
        self.waits.begin()
        if self._covered is not service:
            self._covered = service
            self._cover(service)
        arrived_ns = self.reading_since_ns or recorder.clock()
        self.call = Call(recorder, service.context.model_name, requests, arrived_ns)

    def end(self, service: Any, response: bytes | bytearray | None) -> None:
        """End the batch, whose *response* is about to be sent."""
        call, self.call = self.call, None
        if call is not None and self.waits is not None:
            with guarded(call.recorder):
                self.waits.hold(call.end(response, self.free_ns, service.context))
            self.free_ns = call.recorder.clock()
        self.reading_since_ns = 0
        if cold_start.is_cold():
            cold_start.end()

    def _cover(self, service: Any) -> None:
        # At the first batch: a handler that is a function may make its object when it is loaded.
        entry = service._entry_point
        for owner in stage_owners(entry):
            for method, stage_name in METHODS.items():
                if callable(getattr(owner, method, None)):
                    wrap(owner, method, stage(stage_name))
        wrap(service, "_entry_point", self._entry)

    def _entry(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def entry(data: Any, context: Any) -> Any:
            call = self.call
            if call is None:
                return inner(data, context)
            with guarded(call.recorder):
                call.handler_begins()
            token = current.set(call.together)
            try:
                answer = inner(data, context)
            except BaseException as error:
                call.error = type(error).__name__
                raise
            finally:
                current.reset(token)
            with guarded(call.recorder):
                call.handler_ended(context)
            return answer

        return entry


def stage_owners(entry: Any) -> list[Any]:
    """Find the objects whose methods are the stages of *entry*, a handler's entry point.

    A bound method's object; where an envelope stands around it, the one inside; for a plain
    function, the handlers among its module's globals.
    """
    owner = getattr(entry, "__self__", None)
    if inner := getattr(owner, "_handle_fn", None):
        return stage_owners(inner)
    if owner is not None:
        return [owner]
    found = getattr(entry, "__globals__", {}).values()
    return [
        value
        for value in found
        if not isinstance(value, type)
        and all(hasattr(type(value), name) for name in ("preprocess", "inference", "postprocess"))
    ]


def front_end_thread(arguments: Sequence[str]) -> str:
    """Name the front end's thread for the worker started with *arguments*: `W-9000`.

    The front end numbers its workers by port: `--port 9000`, or `--sock-name .../.ts.sock.9000`.
    """
    for option, value in pairwise(arguments):
        if option in ("--port", "--sock-name"):
            return f"W-{value.rpartition('.')[2]}"
    return "W"


def _install() -> None:
    if os.environ.get(DISABLE_VARIABLE, "") not in ("", "0"):
        return
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return  # Only rank 0 of a torchrun model answers.
    service = import_module("ts.service").Service
    protocol = import_module("ts.protocol.otf_message_handler")
    worker = Worker()
    wrap(protocol, "_retrieve_inference_msg", partial(_timed_reading, worker=worker))
    wrap(service, "__init__", partial(_opening, worker=worker))
    wrap(service, "predict", partial(_timed_predict, worker=worker))


def _opening(inner: Callable[..., Any], worker: Worker) -> Callable[..., Any]:
    def init(service: Any, *args: Any, **kwargs: Any) -> None:
        inner(service, *args, **kwargs)
        with guarded():
            worker.open()

    return init


def _timed_reading(inner: Callable[..., Any], worker: Worker) -> Callable[..., Any]:
    def read(connection: Any) -> Any:
        # It is called when the batch's first byte is there; the wait for it is not in.
        worker.reading_since_ns = time.monotonic_ns()
        return inner(connection)

    return read


def _timed_predict(inner: Callable[..., Any], worker: Worker) -> Callable[..., Any]:
    def predict(service: Any, batch: Any) -> Any:
        with guarded():
            worker.begin(service, batch)
        response = None
        try:
            response = inner(service, batch)
        finally:
            with guarded():
                worker.end(service, response)
        return response

    return predict


class StagescopeHandlerMixin:
    """Time a handler that is served without `stagescope run`: `class H(StagescopeHandlerMixin, B)`.

    It changes nothing of the class; the hook is installed when the class is made.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        install("ts.service")


# Not `ts` itself: the launcher imports that too, and would load torch for nothing.
HOOK = Hook("ts.service", "torchserve", ("0.12", "0.13"), _install)
