"""One batch as TorchServe's worker meets it: the timelines of its requests, and the batch's own."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from stagescope import recorder_format as fmt
from stagescope.middleware.exchange import begin
from stagescope.middleware.held import hold, move_start, reserve
from stagescope.middleware.hooks.torchserve_waits import HeldBatch, HeldMember
from stagescope.middleware.names import CODES
from stagescope.middleware.recorder import Recorder
from stagescope.middleware.server_timing import header_value
from stagescope.middleware.timeline import Timeline
from stagescope.middleware.together import Together

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
        self.together = Together([self.batch, *self.members])
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
            if member.run:
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
    """Give the headers as ASGI does: lower-case names. Clients send `Traceparent` too."""
    for header in request.get("headers") or ():
        yield bytes(header["name"]).lower(), bytes(header["value"])


def _size(request: Request) -> int:
    """Give the bytes of the inputs, as far as TorchServe has not decoded them."""
    values = [parameter.get("value") for parameter in request.get("parameters") or ()]
    return sum(len(value) for value in values if isinstance(value, (bytes, bytearray, str)))


def _text(raw: bytes | bytearray | str) -> str:
    return raw if isinstance(raw, str) else bytes(raw).decode("utf-8", "replace")


def _code_of(response: bytes | bytearray | None) -> int:
    """Give the status with which TorchServe's protocol begins a response; 500 for none."""
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
