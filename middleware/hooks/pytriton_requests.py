"""Requests that Triton hands to Python to be run together: their timelines and their batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from stagescope import recorder_format as fmt
from stagescope.identity import TraceParent, parse_run, parse_traceparent
from stagescope.middleware.batches import Ticket, batch
from stagescope.middleware.guard import guarded
from stagescope.middleware.names import CODES
from stagescope.middleware.recorder import Recorder
from stagescope.middleware.timeline import Timeline, current
from stagescope.middleware.together import Together

HEADERS = ("traceparent", "baggage")

_PARSE = CODES["preprocess.parse"]
_SERIALIZE = CODES["postprocess.serialize"]
_RESPOND = CODES["respond"]


class Received:
    """What one call of Triton's brought: one request, or a batch that Triton has made."""

    def __init__(self, recorder: Recorder, model: str) -> None:
        self.recorder = recorder
        self.model = model
        self.failure: type[BaseException] | None = None
        self.arrived_ns = recorder.clock()
        self._timelines: list[Timeline] = []
        self._tickets: list[Ticket] = []
        self._sending: list[int] = []

    def read(self, parameters: Sequence[Mapping[str, object] | None]) -> None:
        """Begin the requests' timelines, now that their tensors and *parameters* are read."""
        now_ns = self.recorder.clock()
        path = f"/v2/models/{self.model}/infer".encode()
        for given in parameters:
            timeline = _timeline(self.recorder, self.arrived_ns, headers_in(given or {}), path)
            timeline.close_at(timeline.open_at(_PARSE, self.arrived_ns), now_ns)
            self._timelines.append(timeline)
            self._tickets.append(Ticket(timeline, now_ns))

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Be inside the user's function: a batch, and stages that are every member's."""
        timelines = self._timelines
        if not timelines:
            yield
            return
        token = current.set(timelines[0] if len(timelines) == 1 else Together(timelines))
        try:
            with batch(self.model) as formed:
                formed.add(*self._tickets)
                with formed.inference():
                    yield
                    if self.failure is not None:  # Caught inside, and sent as the answer.
                        formed.fail(self.failure)
        finally:
            current.reset(token)

    @contextmanager
    def serializing(self) -> Iterator[None]:
        """Be making bytes of an answer; what comes after it is handing it over."""
        opened: list[int] = []
        with guarded(self.recorder):
            self._end_sending()
            opened = [timeline.open(_SERIALIZE) for timeline in self._timelines]
        try:
            yield
        finally:
            with guarded(self.recorder):
                for timeline, index in zip(self._timelines, opened, strict=False):
                    timeline.close(index)
                    self._sending.append(timeline.open(_RESPOND))

    def finish(self) -> None:
        """End all of them: the last answer was handed to Triton, or an error was."""
        self._end_sending()
        end_ns = self.recorder.clock()
        status, error = (
            (200, b"") if self.failure is None else (500, self.failure.__name__.encode())
        )
        for timeline in self._timelines:
            timeline.finish(end_ns, 0, 0, 0, 0, 0, status, error, b"")

    def _end_sending(self) -> None:
        for timeline, index in zip(self._timelines, self._sending, strict=False):
            timeline.close(index)
        self._sending.clear()


def headers_in(parameters: Mapping[str, object]) -> dict[str, bytes]:
    """Find the forwarded headers, however they are written (`Traceparent`)."""
    return {
        name.lower(): value.encode("latin-1", "replace")
        for name, value in parameters.items()
        if name.lower() in HEADERS and isinstance(value, str)
    }


def _timeline(
    recorder: Recorder, start_ns: int, headers: Mapping[str, bytes], path: bytes
) -> Timeline:
    bits = recorder.random_bits
    if start_ns >= recorder.anchor_due_ns:
        recorder.anchor(start_ns)
    parent: TraceParent = (bits(128) or 1).to_bytes(16, "big"), b"", True
    parent = parse_traceparent(headers.get("traceparent", b"")) or parent
    trace_id, parent_id, sampled = parent
    return Timeline(
        recorder, fmt.KIND_REQUEST, start_ns, trace_id, (bits(64) or 1).to_bytes(8, "big"),
        parent_id, parse_run(headers.get("baggage", b"")), b"POST", path,
        fmt.FLAG_SAMPLED if sampled else 0,
    )  # fmt: skip
