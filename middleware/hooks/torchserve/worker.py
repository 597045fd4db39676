"""TorchServe: every request of a batch by its own trace, timed in the Python worker.

Nothing to change under `stagescope run -- torchserve ...`; without it one line in the handler:

    class Handler(StagescopeHandlerMixin, BaseHandler): ...

The front end is Java and tells the worker neither when a request came nor how long it waited:
see `torchserve_log` for where that is read, and docs/hooks/torchserve.md for what is timed.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from itertools import pairwise
from statistics import median
from typing import Any

from stagescope import settings
from stagescope.middleware.asgi import SERVICE_VARIABLE
from stagescope.middleware.exchange import begin
from stagescope.middleware.hooks.hook import Hook, install
from stagescope.middleware.hooks.torchserve.queue_waits import HeldBatch, HeldMember, Waits
from stagescope.middleware.patching import wrap
from stagescope.middleware.process import process_recorder
from stagescope.middleware.recording.deferred import hold, move_start, reserve
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.recording.timeline_group import TimelineGroup
from stagescope.middleware.runtime import cold_start
from stagescope.middleware.server_timing import answers, header_value
from stagescope.middleware.stage import stage
from stagescope.recorder import format as fmt

_READ = CODES["preprocess.read"]
_SERIALIZE = CODES["postprocess.serialize"]

Request = Mapping[str, Any]
"""One item of a batch as TorchServe's protocol gives it: requestId, headers, parameters."""


class Call:
    """One batch in the worker: its own timeline and those of its members."""

    def __init__(
        self, recorder: Recorder, model: str, requests: Sequence[Request], arrived_ns: int
    ) -> None:
        self.recorder = recorder
        self.arrived_ns = arrived_ns
        self.error = ""
        self.path = f"/predictions/{model}"
        self.requests = requests
        self.members = [self._member(request) for request in requests]
        self.batch = self._batch(model)
        self.batch_wait = reserve(self.batch)
        self.waits = [(reserve(member), reserve(member)) for member in self.members]
        self.together = TimelineGroup([self.batch, *self.members])
        for member in self.members:
            link(self.batch, member, arrived_ns)
        self._open = self.together.open_at(_READ, arrived_ns)

    def _member(self, request: Request) -> Timeline:
        scope = {"headers": list(_headers(request)), "method": "POST", "path": self.path}
        member = begin(self.recorder, scope)
        move_start(member, self.arrived_ns)
        return member

    def _batch(self, model: str) -> Timeline:
        bits = self.recorder.random_bits
        runs = {member.run for member in self.members}
        return Timeline(
            self.recorder, fmt.KIND_BATCH, self.arrived_ns, (bits(128) or 1).to_bytes(16, "big"),
            (bits(64) or 1).to_bytes(8, "big"), run=runs.pop() if len(runs) == 1 else b"",
            path=model.encode("utf-8", "replace"),
        )  # fmt: skip

    def handler_begins(self) -> None:
        """Say that the batch is read, and goes to the handler."""
        self.together.close(self._open)

    def handler_ended(self, context: Any) -> None:
        """Say that the handler returned; what follows is the making of the response."""
        self._open = self.together.open(_SERIALIZE)
        for index, member in enumerate(self.members):
            if member.run and answers(member):
                timing = header_value(member, member.clock()).decode()
                context.set_response_header(index, "Server-Timing", timing)

    def end(self, response: bytes | bytearray | None, free_ns: int, context: Any) -> HeldBatch:
        """End all timelines; they are held until their waiting is known."""
        ended_ns = self.recorder.clock()
        if not self.error:
            self.together.close_at(self._open, ended_ns)
        self.together.end()
        code = _code_of(response)
        error = self.error.encode("utf-8", "replace")
        held = HeldBatch(
            self.recorder, hold(self.batch, ended_ns, chunks=len(self.members), error=error),
            self.batch_wait, self.arrived_ns, free_ns, ended_ns, failed=code != 200,
        )  # fmt: skip
        for index, member in enumerate(self.members):
            status = code if code != 200 else int(context.get_response_status(index)[0] or 200)
            ended = hold(
                member, ended_ns, request_bytes=_size(self.requests[index]), status=status,
                error=error, route=self.path.encode("utf-8", "replace"),
            )  # fmt: skip
            job = _text(self.requests[index].get("requestId", b""))
            held.members.append(HeldMember(job, ended, *self.waits[index]))
        return held


def link(batch: Timeline, member: Timeline, at_ns: int) -> None:
    """Write into *batch* and *member*, both open, that they belong together since *at_ns*."""
    span, trace = member.span_id, member.trace_id
    member.mark(fmt.CODE_BATCH, int.from_bytes(batch.span_id, "big"), at_ns)
    batch.mark(fmt.CODE_MEMBER, int.from_bytes(span, "big"), int.from_bytes(trace[8:], "big"))
    batch.mark(fmt.CODE_MEMBER_TRACE, int.from_bytes(trace[:8], "big"), 0)


def _headers(request: Request) -> Iterator[tuple[bytes, bytes]]:
    """Yield the headers as ASGI does: lower-case names. Clients send `Traceparent` too."""
    for header in request.get("headers") or ():
        yield bytes(header["name"]).lower(), bytes(header["value"])


def _size(request: Request) -> int:
    """Return the bytes of the inputs, as far as TorchServe has not decoded them."""
    values = [parameter.get("value") for parameter in request.get("parameters") or ()]
    return sum(len(value) for value in values if isinstance(value, (bytes, bytearray, str)))


def _text(raw: bytes | bytearray | str) -> str:
    return raw if isinstance(raw, str) else bytes(raw).decode("utf-8", "replace")


def _code_of(response: bytes | bytearray | None) -> int:
    """Return the status with which TorchServe's protocol begins a response; 500 for none."""
    return struct.unpack_from("!i", response)[0] if response else 500


ROUNDS = 40
STAGES_TIMED = 8


def calibrate(recorder: Recorder) -> None:
    """Measure a request in a batch of one, and a stage, and write both to *recorder*.

    It takes some milliseconds, when the model is loaded.
    """
    slots = 4
    scratch = Recorder(
        memoryview(bytearray(fmt.file_bytes(slots, slots))), in_flight_slots=slots, ring_slots=slots
    )
    empty = int(median(_once_ns(scratch, 0) for _ in range(ROUNDS)))
    staged = int(median(_once_ns(scratch, STAGES_TIMED) for _ in range(ROUNDS)))
    scratch.close()
    recorder.write_cost(empty, max(0, (staged - empty) // STAGES_TIMED))


def _once_ns(scratch: Recorder, stages: int) -> int:
    request = {"requestId": b"id", "headers": [{"name": b"host", "value": b"localhost"}]}
    context = _Context()
    before = time.perf_counter_ns()
    call = Call(scratch, "model", [request], time.monotonic_ns())
    call.handler_begins()
    for _ in range(stages):
        call.together.close(call.together.open(_READ))
    call.handler_ended(context)
    call.end(b"\0\0\0\xc8", 0, context).release()
    return time.perf_counter_ns() - before


class _Context:
    """As much of TorchServe's context as a batch asks for."""

    def get_response_status(self, index: int) -> tuple[int, str]:
        return 200, ""


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
    if settings.DISABLE.on():
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
