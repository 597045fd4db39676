"""The tables of a run folder, column by column: rows, Arrow schema and docs/run-folder.md follow.

A column that a record has stands beside the record's own field (`stagescope.columns`), and takes
its type from it. Standard library only.
A reader must take any older version of a table: columns are added, never renamed or dropped,
and a column that an old file lacks reads as null.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from stagescope.columns import RUN_CLOCKS
from stagescope.kernels import KernelRow
from stagescope.records import BatchRecord, Process, RequestRecord
from stagescope.samples import Sample
from stagescope.stacks import StackSpan
from stagescope.stages import STAGES

SCHEMA_VERSION = 1

SPAN_TYPE = "list<stage: string, start_ns: int64, end_ns: int64, self_ns: int64, failed: bool>"
"""One element a StageSpan, in the order of opening; times since the row's start_ns."""

MEMBER_TYPE = "list<trace_id: string, span_id: string>"

STALL_TYPE = "list<stage: string, cause: string, stall_ns: int64>"
"""One element what one opening of a stage was charged while stalls of one cause lasted."""

WAIT_FACT_TYPE = "list<kind: string, loop: int64, start_ns: int64, end_ns: int64>"
"""One element a WaitFact; times since the row's start_ns."""

LISTS = {
    SPAN_TYPE: "list of spans",
    MEMBER_TYPE: "list of members",
    STALL_TYPE: "list of stalls",
    WAIT_FACT_TYPE: "list of wait facts",
}
"""For people."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column: *type* is `string`, `int64`, `int32`, `float64`, `bool` or a list type above."""

    name: str
    type: str
    doc: str
    of: str = ""
    """Where the record has it: a field's name, or `process.pid`; empty where it is computed."""


_TYPES = {
    "str": "string",
    "int": "int64",
    "int | None": "int64",
    "float": "float64",
    "bool": "bool",
    "State": "string",
    "tuple[str, ...]": "list<string>",
    "tuple[Frame, ...]": "list<string>",
    "tuple[StageSpan, ...]": SPAN_TYPE,
    "tuple[Member, ...]": MEMBER_TYPE,
    "tuple[StageStall, ...]": STALL_TYPE,
    "tuple[WaitFact, ...]": WAIT_FACT_TYPE,
}
"""Of a field's annotation, as records.py and its like write it."""


def parts_of(type: str) -> dict[str, str]:
    """Return the names and types of a list's elements; empty where they are plain values."""
    return dict(re.findall(r"(\w+): (\w+)", type))


def _columns(record: type, inside: str = "") -> tuple[Column, ...]:
    """Return the columns that are fields of *record*; *inside*: the row has it in that field."""
    found: list[Column] = []
    for field in fields(record):
        if text := field.metadata.get("column"):
            kind = "int32" if field.metadata["small"] else _TYPES[str(field.type)]
            found.append(Column(field.name, kind, text, inside + field.name))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Table:
    """One Parquet file of a run folder."""

    name: str
    doc: str
    columns: tuple[Column, ...]

    @property
    def file_name(self) -> str:
        """The file's name inside the run folder."""
        return f"{self.name}.parquet"


CLIENT = Table(
    "client",
    "One row a request that the load driver planned and started, warm-up included.",
    (
        Column("seq", "int64", "position in the plan, from 0"),
        Column("trace_id", "string", "32 hex digits, fresh for each request"),
        Column("span_id", "string", "16 hex digits: the client's span, parent of the server's"),
        Column("phase", "string", "`warmup` or `measure`, by the intended time"),
        Column("intended_ns", "int64", f"when the plan said to send; {RUN_CLOCKS}"),
        Column("started_ns", "int64", "when the driver took it up; less intended: client wait"),
        Column("connected_ns", "int64", "when a connection was ready; less started: connect"),
        Column("sent_ns", "int64", "just before the first byte of the request was written"),
        Column("first_byte_ns", "int64", "when the response's head had come; null if it did not"),
        Column("last_byte_ns", "int64", "when the response was complete, or the request failed"),
        Column("reused", "bool", "true where the connection had served before"),
        Column("dns_ns", "int64", "name resolution, part of connect; 0 where there was none"),
        Column("tcp_ns", "int64", "TCP (and TLS) establishment, part of connect; 0 where none"),
        Column("status", "int32", "HTTP status; 0 where no response came"),
        Column("request_bytes", "int64", "body bytes sent"),
        Column("response_bytes", "int64", "body bytes received"),
        Column("error", "string", "empty, or why it failed: `refused`, `reset`, `timeout`, ..."),
        Column("server_timing", "string", "the `Server-Timing` response header; empty if none"),
        Column("first_body_ns", "int64", "when the body's first bytes had come; null if none did"),
        Column("chunks", "int32", "pieces in which the body came in, as the driver read them"),
        Column("streamed", "bool", "true where the response's type is a stream of events or lines"),
    ),
)

SERVER = Table(
    "server",
    "One row a request that a served process recorded for this run.",
    (
        *_columns(Process, "process."),
        *_columns(RequestRecord),
        Column("died_in_stage", "string", "the stage open when the process died; empty otherwise"),
        Column("start_wall_ns", "int64", "`start_ns` as ns since the Unix epoch"),
        *(Column(f"{s}_ns", "int64", f"charged to `{s}`, sub-stages included") for s in STAGES),
        Column(
            "other_ns",
            "int64",
            "what none of the six stages claimed (stages of the user's own names are in `stages` "
            "and count here)",
        ),
        Column(
            "profiled",
            "bool",
            "true where a capture was at work meanwhile, so that its times are not the server's "
            "own; null: not known",
        ),
        Column(
            "source",
            "string",
            "`agent` (exact), `server-timing` (response header: sums only, until the response "
            "began), or `otlp` (the spans of a model server)",
        ),
    ),
)

BATCHES = Table(
    "batches",
    "One row a batch whose members belong to this run.",
    (
        next(c for c in _columns(Process, "process.") if c.name == "ring_id"),
        *_columns(BatchRecord),
    ),
)

SAMPLES = Table(
    "samples",
    "One row a reading of a resource on the server's host, while the run lasted.",
    (
        *_columns(Sample),
        Column("unit", "string", "as UCUM writes it"),
        Column("kind", "string", "`level`: how high it stood; `amount`: how much there was"),
    ),
)

STACKS = Table(
    "stacks",
    "One row a stack of one thread, as long as sampling saw it unchanged.",
    _columns(StackSpan),
)

KERNELS = Table(
    "kernels",
    "One row a kernel, copy or operator by name, stage and capture; one row a stage's sum.",
    _columns(KernelRow),
)

TABLES = (CLIENT, SERVER, BATCHES)
"""Every run folder has these."""
EVIDENCE = (SAMPLES, STACKS, KERNELS)
"""A run folder has these where an agent sampled; each may be missing, or without rows."""
