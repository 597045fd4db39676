"""Records as lines of JSON: what the control socket sends and the run store keeps.

One line a record. A `process` line comes before the first record of its process, and again when
its clock anchor changed; records name their process by `ring_id`.
Field names are those of records.py; stages are lists in the order of StageSpan's fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from json.encoder import encode_basestring_ascii as quoted
from typing import Any, Generic, TypeVar

from stagescope.errors import StagescopeError
from stagescope.kernels import KernelRow
from stagescope.records import (
    Anchor,
    BatchRecord,
    ColdStartRecord,
    InstrumentCost,
    Member,
    Process,
    Record,
    RequestRecord,
    State,
)
from stagescope.samples import Sample
from stagescope.stacks import Frame, StackSpan
from stagescope.stages import StageSpan, StageStall, WaitFact

_TRUTH = ("false", "true")


def process_line(process: Process) -> str:
    """Give the line, with its newline, that introduces *process*."""
    return json.dumps({"kind": "process"} | asdict(process)) + "\n"


def record_line(record: Record) -> str:
    """Give the line, with its newline, of *record*.

    Put together by hand: json.dumps takes three times as long, and in an embedded agent
    it would take it from the server.
    """
    if isinstance(record, RequestRecord):
        return _request_line(record)
    if isinstance(record, BatchRecord):
        return _batch_line(record)
    return _cold_start_line(record)


def _head(kind: str, record: Record) -> str:
    """Give the beginning of a line: enough to know a record again without parsing the rest."""
    return (
        f'{{"kind":"{kind}","state":"{record.state.value}","ring_id":"{record.process.ring_id}",'
        f'"seq":{record.seq},'
    )


def _stages(stages: Iterable[StageSpan]) -> str:
    return ",".join(
        [
            f"[{quoted(stage)},{start},{end},{self_ns},{_TRUTH[failed]},{_TRUTH[still_open]}]"
            for stage, start, end, self_ns, failed, still_open in stages
        ]
    )


def _request_line(r: RequestRecord) -> str:
    batches = ",".join([f'"{batch_id}"' for batch_id in r.batch_ids])
    return (
        f'{_head("request", r)}"span_id":"{r.span_id}","trace_id":"{r.trace_id}",'
        f'"parent_span_id":"{r.parent_span_id}","internal":{_TRUTH[r.internal]},'
        f'"sampled":{_TRUTH[r.sampled]},"run_id":{quoted(r.run_id)},"start_ns":{r.start_ns},'
        f'"duration_ns":{r.duration_ns},"method":{quoted(r.method)},"path":{quoted(r.path)},'
        f'"route":{quoted(r.route)},"status":{r.status},"error":{quoted(r.error)},'
        f'"request_bytes":{r.request_bytes},"response_bytes":{r.response_bytes},'
        f'"first_byte_ns":{r.first_byte_ns},"send_wait_ns":{r.send_wait_ns},"chunks":{r.chunks},'
        f'"stages":[{_stages(r.stages)}],"batch_ids":[{batches}],'
        f'"stages_dropped":{r.stages_dropped},"chunk_gaps":{r.chunk_gaps},'
        f'"chunk_gap_sum_ns":{r.chunk_gap_sum_ns},"chunk_gap_max_ns":{r.chunk_gap_max_ns},'
        f'"nested":{_TRUTH[r.nested]},"stalls":{_stalls(r.stalls)},'
        f'"wait_facts":{_stalls(r.wait_facts)}}}\n'
    )


def _stalls(stalls: Sequence[StageStall | WaitFact]) -> str:
    return json.dumps(stalls) if stalls else "[]"


def _batch_line(b: BatchRecord) -> str:
    members = ",".join(
        [f'{{"trace_id":"{m.trace_id}","span_id":"{m.span_id}"}}' for m in b.members]
    )
    return (
        f'{_head("batch", b)}"batch_id":"{b.batch_id}","trace_id":"{b.trace_id}",'
        f'"model":{quoted(b.model)},'
        f'"start_ns":{b.start_ns},"duration_ns":{b.duration_ns},"error":{quoted(b.error)},'
        f'"size":{b.size},"members":[{members}],"members_dropped":{b.members_dropped},'
        f'"device_ns":{b.device_ns},"stages":[{_stages(b.stages)}],"run_id":{quoted(b.run_id)}}}\n'
    )


def _cold_start_line(c: ColdStartRecord) -> str:
    return (
        f'{_head("cold_start", c)}"span_id":"{c.span_id}","trace_id":"{c.trace_id}",'
        f'"start_ns":{c.start_ns},"duration_ns":{c.duration_ns},"error":{quoted(c.error)},'
        f'"first_request":{json.dumps(asdict(c.first_request) if c.first_request else None)},'
        f'"stages":[{_stages(c.stages)}],"stages_dropped":{c.stages_dropped},'
        f'"run_id":{quoted(c.run_id)}}}\n'
    )


def lines(records: Iterable[Record]) -> Iterator[str]:
    """Give the lines of *records*, each process introduced where it must be."""
    last: dict[str, Process] = {}
    for record in records:
        process = record.process
        if last.get(process.ring_id) != process:
            last[process.ring_id] = process
            yield process_line(process)
        yield record_line(record)


def parse_lines(lines: Iterable[bytes | str]) -> Iterator[Record]:
    """Read records back; the inverse of `lines`.

    Raises StagescopeError where a line is no record of this version's.
    """
    processes: dict[str, Process] = {}
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            kind = fields.pop("kind")
            if kind == "process":
                processes[fields["ring_id"]] = _process(fields)
            elif kind in _PARSERS:
                yield _PARSERS[kind](fields, processes[fields.pop("ring_id")])
            # Other kinds are a newer agent's, for newer readers.
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise StagescopeError(
                f"line {number} of the agent's records cannot be read ({problem!r}): "
                "are agent and client of the same stagescope version?"
            ) from problem


def _process(fields: dict[str, Any]) -> Process:
    fields["anchor"] = Anchor(**fields["anchor"])
    fields["cost"] = InstrumentCost(**fields["cost"])
    return Process(**fields)


def _request(fields: dict[str, Any], process: Process) -> RequestRecord:
    fields["state"] = State(fields["state"])
    fields["stages"] = tuple([StageSpan(*span) for span in fields["stages"]])
    fields["batch_ids"] = tuple(fields["batch_ids"])
    fields["stalls"] = tuple([StageStall(*stall) for stall in fields.get("stalls", ())])
    fields["wait_facts"] = tuple([WaitFact(*fact) for fact in fields.get("wait_facts", ())])
    return RequestRecord(process=process, **fields)


def _batch(fields: dict[str, Any], process: Process) -> BatchRecord:
    fields["state"] = State(fields["state"])
    fields["stages"] = tuple([StageSpan(*span) for span in fields["stages"]])
    fields["members"] = tuple([Member(**member) for member in fields["members"]])
    return BatchRecord(process=process, **fields)


def _cold_start(fields: dict[str, Any], process: Process) -> ColdStartRecord:
    fields["state"] = State(fields["state"])
    fields["stages"] = tuple([StageSpan(*span) for span in fields["stages"]])
    first = fields["first_request"]
    fields["first_request"] = Member(**first) if first else None
    return ColdStartRecord(process=process, **fields)


_PARSERS: dict[str, Callable[[dict[str, Any], Process], Record]] = {
    "request": _request,
    "batch": _batch,
    "cold_start": _cold_start,
}


# Samples, stacks and kernels as lines of JSON: what the control API sends.
#
# One line one of them; its field `line` is `sample`, `stack` or `kernel`, its others are named as
# in samples.py, stacks.py and kernels.py. A frame of a stack is a list of function, file, line.


BLOCK_BYTES = 1 << 16

T = TypeVar("T", Sample, StackSpan, KernelRow)


@dataclass(frozen=True, slots=True)
class Lines(Generic[T]):
    """How lines of one kind are written and read."""

    of: str
    """What a line holds: its field `line`."""
    names: tuple[str, ...]
    """Its fields."""
    make: Callable[[dict[str, Any]], T]

    def write(self, items: Iterable[T]) -> Iterator[bytes]:
        """Give the lines of *items*, each with its newline."""
        names = self.names
        for item in items:
            line = {"line": self.of} | {name: getattr(item, name) for name in names}
            yield json.dumps(line, separators=(",", ":")).encode("ascii") + b"\n"

    def parse(self, lines: Iterable[bytes | str]) -> Iterator[T]:
        """Read them back; other lines, and fields that we do not know, are a newer agent's.

        Raises StagescopeError where a line is none of ours.
        """
        for number, line in enumerate(lines, 1):
            try:
                given = json.loads(line)
                if given["line"] == self.of:
                    yield self.make({name: given[name] for name in self.names if name in given})
            except (ValueError, KeyError, TypeError, AttributeError) as problem:
                raise StagescopeError(
                    f"line {number} of the agent's {self.of}s cannot be read ({problem!r}): "
                    "are agent and client of the same stagescope version?"
                ) from problem


def in_blocks(lines: Iterable[bytes], size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Join lines to blocks of about *size* bytes: a line is little to send alone."""
    block = bytearray()
    for line in lines:
        block += line
        if len(block) >= size:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _sample(given: dict[str, Any]) -> Sample:
    return Sample(**given)


def _stack(given: dict[str, Any]) -> StackSpan:
    given["frames"] = tuple([Frame(*frame[: len(Frame._fields)]) for frame in given["frames"]])
    return StackSpan(**given)


def _kernel(given: dict[str, Any]) -> KernelRow:
    return KernelRow(**given)


SAMPLES = Lines("sample", _names(Sample), _sample)
STACKS = Lines("stack", _names(StackSpan), _stack)
KERNELS = Lines("kernel", _names(KernelRow), _kernel)
