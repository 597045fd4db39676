"""Records as lines of JSON: what the control socket sends and the run store keeps.

One line a record. A `process` line comes before the first record of its process, and again when
its clock anchor changed; records name their process by `ring_id`.
Field names are those of records.py; stages are lists in the order of StageSpan's fields.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields
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
    """Return the line, with its newline, that introduces *process*."""
    return json.dumps({"kind": "process"} | asdict(process)) + "\n"


def stages_text(stages: Iterable[StageSpan]) -> str:
    return ",".join(
        [
            f"[{quoted(stage)},{start},{end},{self_ns},{_TRUTH[failed]},{_TRUTH[still_open]}]"
            for stage, start, end, self_ns, failed, still_open in stages
        ]
    )


def tuples_text(items: Sequence[object]) -> str:
    return json.dumps(items) if items else "[]"


def members_text(members: Iterable[Member]) -> str:
    return json.dumps([asdict(member) for member in members])


def first_text(member: Member | None) -> str:
    return json.dumps(asdict(member) if member else None)


_WRITTEN = {
    "str": "{quoted(r.NAME)}",
    "int": "{r.NAME}",
    "bool": "{_TRUTH[r.NAME]}",
    "tuple[str, ...]": "{tuples_text(r.NAME)}",
    "tuple[StageSpan, ...]": "[{stages_text(r.NAME)}]",
    "tuple[StageStall, ...]": "{tuples_text(r.NAME)}",
    "tuple[WaitFact, ...]": "{tuples_text(r.NAME)}",
    "tuple[Member, ...]": "{members_text(r.NAME)}",
    "Member | None": "{first_text(r.NAME)}",
}
"""How a field is written, by its annotation in records.py."""
_HEAD = '{{"kind":"KIND","state":"{r.state.value}","ring_id":"{r.process.ring_id}","seq":{r.seq},'
"""The beginning of a line: enough to know a record again without parsing the rest."""
_IN_HEAD = ("process", "state", "seq")
_IDENTITY = ("span_id", "batch_id")
"""Comes right after the head: records of the dead have no other place, and are known by it."""


def _writer(kind: str, record: type) -> Callable[[Any], str]:
    """Return what writes the line of a record, made once from its fields.

    An f-string over all of them: `json.dumps` of a dict takes three times as long, and in an
    embedded agent it would take it from the server.
    """
    rest = [field for field in fields(record) if field.name not in _IN_HEAD]
    rest.sort(key=lambda field: field.name not in _IDENTITY)
    parts = [
        f'"{field.name}":' + _WRITTEN[str(field.type)].replace("NAME", field.name) for field in rest
    ]
    line = _HEAD.replace("KIND", kind) + ",".join(parts) + "}}\n"
    made: Callable[[Any], str] = eval(f"lambda r: f{line!r}", globals())
    return made


_WRITERS: dict[type, Callable[[Any], str]] = {
    RequestRecord: _writer("request", RequestRecord),
    BatchRecord: _writer("batch", BatchRecord),
    ColdStartRecord: _writer("cold_start", ColdStartRecord),
}


def record_line(record: Record) -> str:
    """Return the line, with its newline, of *record*."""
    return _WRITERS[type(record)](record)


def lines(records: Iterable[Record]) -> Iterator[str]:
    """Yield the lines of *records*, each process introduced where it must be."""
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


_READ: dict[str, Callable[[Any], object]] = {
    "State": State,
    "tuple[str, ...]": tuple,
    "tuple[StageSpan, ...]": lambda given: tuple([StageSpan(*one) for one in given]),
    "tuple[StageStall, ...]": lambda given: tuple([StageStall(*one) for one in given]),
    "tuple[WaitFact, ...]": lambda given: tuple([WaitFact(*one) for one in given]),
    "tuple[Member, ...]": lambda given: tuple([Member(**one) for one in given]),
    "Member | None": lambda given: Member(**given) if given else None,
}
"""How a field is read back where JSON has no type of its own for it."""


def _parser(record: type[Record]) -> Callable[[dict[str, Any], Process], Record]:
    read = {
        field.name: _READ[str(field.type)] for field in fields(record) if str(field.type) in _READ
    }

    def parse(given: dict[str, Any], process: Process) -> Record:
        for name, convert in read.items():
            if name in given:
                given[name] = convert(given[name])
        return record(process=process, **given)

    return parse


_PARSERS: dict[str, Callable[[dict[str, Any], Process], Record]] = {
    "request": _parser(RequestRecord),
    "batch": _parser(BatchRecord),
    "cold_start": _parser(ColdStartRecord),
}


# Samples, stacks and kernels as lines of JSON: what the control API sends.
#
# One line one of them; its field `line` is `sample`, `stack` or `kernel`, its others are named as
# in samples.py, stacks.py and kernels.py. A frame of a stack is a list of function, file, line.


BLOCK_BYTES = 1 << 16

T = TypeVar("T", Sample, StackSpan, KernelRow)


class Lines(Generic[T]):
    """How lines of one kind are written and read."""

    def __init__(self, of: str, kind: Callable[..., T]) -> None:
        """*of*: what a line holds, its field `line`; *kind*: the class."""
        self.of = of
        self._kind: Callable[..., T] = kind
        self._names = [field.name for field in fields(kind)]  # type: ignore[arg-type]

    def write(self, items: Iterable[T]) -> Iterator[bytes]:
        """Yield the lines of *items*, each with its newline."""
        names = self._names
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
                    known = {name: given[name] for name in self._names if name in given}
                    yield self._kind(**(_stack(known) if "frames" in known else known))
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


def _stack(given: dict[str, Any]) -> dict[str, Any]:
    frames = [Frame(*frame[: len(Frame._fields)]) for frame in given["frames"]]
    return given | {"frames": tuple(frames)}


SAMPLES = Lines("sample", Sample)
STACKS = Lines("stack", StackSpan)
KERNELS = Lines("kernel", KernelRow)
