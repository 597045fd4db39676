"""What the driver keeps: one row a request, in plain columns.

Columns, not objects: a million rows take about 250 MB, and the garbage collector has nothing
to walk through while requests are in flight.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stagescope.runfolder.schema import CLIENT

_ABSENT = -1
"""Stands for null in an integer column."""

_INTEGERS = tuple(c.name for c in CLIENT.columns if c.type in ("int64", "int32"))


@dataclass(slots=True, eq=False)
class Call:
    """One request in flight; the stamps are `time.monotonic_ns`, 0 until they are taken."""

    seq: int
    intended_ns: int
    trace_id: str
    span_id: str
    started_ns: int = 0
    connected_ns: int = 0
    sent_ns: int = 0
    first_byte_ns: int = 0
    first_body_ns: int = 0
    last_byte_ns: int = 0
    dns_ns: int = 0
    tcp_ns: int = 0
    status: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    chunks: int = 0
    reused: bool = True
    streamed: bool = False
    error: str = ""
    server_timing: str = ""


class ClientLog:
    """Finished requests, in the order in which they finished."""

    def __init__(self, measure_from_ns: int) -> None:
        """*measure_from_ns*: a request intended before it is warm-up."""
        self.measure_from_ns = measure_from_ns
        self.integers = {name: array("q") for name in _INTEGERS}
        self.responded = 0
        """Requests that got a response's head."""
        self.failed = 0
        self._ids = bytearray()
        self._reused = bytearray()
        self._streamed = bytearray()
        self.errors: list[str] = []
        """One word a row; empty where the request was answered."""
        self._timing = bytearray()
        self._timing_ends = array("q")
        self._appends = tuple((name, self.integers[name].append) for name in _INTEGERS)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.errors)

    def append(self, call: Call) -> None:
        """Keep *call*, which is over: with `last_byte_ns` and, where it failed, `error`."""
        _settle(call)
        for name, append in self._appends:
            append(getattr(call, name))
        self._ids += bytes.fromhex(call.trace_id + call.span_id)
        self._reused.append(call.reused)
        self._streamed.append(call.streamed)
        self.errors.append(call.error)
        self._timing += call.server_timing.encode("utf-8", "replace")
        self._timing_ends.append(len(self._timing))
        self.responded += call.status != 0
        self.failed += call.error != ""

    def chunks(self, rows: int = 65_536) -> Iterator[Mapping[str, Sequence[Any]]]:
        """Yield all rows as columns of the `client` table, at most *rows* at a time."""
        for start in range(0, len(self), rows):
            yield self._chunk(start, min(start + rows, len(self)))

    def _chunk(self, start: int, end: int) -> Mapping[str, Sequence[Any]]:
        columns: dict[str, Sequence[Any]] = {
            name: values[start:end] for name, values in self.integers.items()
        }
        for name in ("first_byte_ns", "first_body_ns"):
            columns[name] = [None if ns == _ABSENT else ns for ns in self.integers[name][start:end]]
        ids = [self._ids[row * 24 : row * 24 + 24].hex() for row in range(start, end)]
        columns["trace_id"] = [both[:32] for both in ids]
        columns["span_id"] = [both[32:] for both in ids]
        columns["phase"] = [
            "warmup" if ns < self.measure_from_ns else "measure" for ns in columns["intended_ns"]
        ]
        columns["reused"] = [bool(flag) for flag in self._reused[start:end]]
        columns["streamed"] = [bool(flag) for flag in self._streamed[start:end]]
        columns["error"] = self.errors[start:end]
        columns["server_timing"] = [self._timing_of(row) for row in range(start, end)]
        return columns

    def _timing_of(self, row: int) -> str:
        begin = self._timing_ends[row - 1] if row else 0
        return self._timing[begin : self._timing_ends[row]].decode("utf-8")


def _settle(call: Call) -> None:
    """Fill the stamps that a failed request did not reach: what it failed in ends there."""
    end = call.last_byte_ns
    call.started_ns = call.started_ns or end
    call.connected_ns = call.connected_ns or end
    call.sent_ns = call.sent_ns or end
    call.first_byte_ns = call.first_byte_ns or _ABSENT
    call.first_body_ns = call.first_body_ns or _ABSENT
    if call.connected_ns == end:
        call.reused = False
