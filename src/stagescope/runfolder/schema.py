"""The tables of a run folder, column by column; docs/run-folder.md is written from here.

A column that a record has takes its type from the record's own field, and its value by `of`; rows,
Arrow schema and docs/run-folder.md follow from here. Standard library only.
A reader must take any older version of a table: columns are added, never renamed or dropped,
and a column that an old file lacks reads as null.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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


class _Fields:
    """Makes columns of the fields of one kind of record."""

    def __init__(self, record: type) -> None:
        self._record = record

    def __call__(self, name: str, doc: str, *, of: str = "", small: bool = False) -> Column:
        """Return the column of field *of* (*name*, if not given); *small* fits 32 bits."""
        of = of or name
        kind = self._record
        for part in of.split(".")[:-1]:
            kind = {"process": Process}[part]
        annotation: str = kind.__annotations__[of.rpartition(".")[2]]
        return Column(name, "int32" if small else _TYPES[annotation], doc, of)


_request = _Fields(RequestRecord)
_batch = _Fields(BatchRecord)
_sample = _Fields(Sample)
_stack = _Fields(StackSpan)
_kernel = _Fields(KernelRow)


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


_MONO = "ns on the monotonic clock of the host in `run.json` (client) or of `boot_id` (server)"

CLIENT = Table(
    "client",
    "One row a request that the load driver planned and started, warm-up included.",
    (
        Column("seq", "int64", "position in the plan, from 0"),
        Column("trace_id", "string", "32 hex digits, fresh for each request"),
        Column("span_id", "string", "16 hex digits: the client's span, parent of the server's"),
        Column("phase", "string", "`warmup` or `measure`, by the intended time"),
        Column("intended_ns", "int64", f"when the plan said to send; {_MONO}"),
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
        _request("trace_id", "joins `client.trace_id`"),
        _request("span_id", "the server's span"),
        _request("parent_span_id", "joins `client.span_id`"),
        _request("ring_id", "the process that served it (`service.instance.id`)", of="process.ring_id"),
        _request("seq", "position in that process's recorder file; -1: it died in flight"),
        _request("pid", "process id on its host", of="process.pid"),
        _request("service", "service name", of="process.service"),
        _request("host", "host name", of="process.host"),
        _request("boot_id", "equal to the client's: one monotonic clock serves both", of="process.boot_id"),
        _request("state", "`finished` or `died`"),
        Column("died_in_stage", "string", "the stage open when the process died; empty otherwise"),
        _request("start_ns", f"when the middleware first saw it; {_MONO}"),
        Column("start_wall_ns", "int64", "the same, ns since the Unix epoch"),
        _request("duration_ns", "until the last byte was handed over"),
        *(Column(f"{s}_ns", "int64", f"charged to `{s}`, sub-stages included") for s in STAGES),
        Column("other_ns", "int64", "what none of the six stages claimed (stages of the user's "
               "own names are in `stages` and count here)"),
        _request("stages", "every opening of a stage, by full name, with what it is "
               "charged"),
        _request("batch_ids", "batches that it was a member of"),
        _request("method", "HTTP method"),
        _request("path", "without query string, at most 128 bytes"),
        _request("route", "route template where known, else empty"),
        _request("status", "HTTP status; 0 where no response was started", small=True),
        _request("error", "exception class, `disconnect`, `incomplete`, or empty"),
        _request("request_bytes", "body bytes read"),
        _request("response_bytes", "body bytes written"),
        _request("first_byte_ns", "since start_ns; 0 where no body byte was written"),
        _request("send_wait_ns", "waiting for the client to take bytes"),
        _request("chunks", "body messages written", small=True),
        _request("stages_dropped", "openings that found no room in the record", small=True),
        _request("chunk_gaps", "times between one body chunk with bytes and the next", small=True),
        _request("chunk_gap_sum_ns", "their sum; divided by chunk_gaps, the mean time between "
               "chunks, or tokens"),
        _request("chunk_gap_max_ns", "the longest of them"),
        _request("stalls", "what its stages, and `other`, were charged while the process "
               "stood still, by cause: `loop`, `gc`, `capture`; null: not known"),
        Column("profiled", "bool", "true where a capture was at work meanwhile, so that its times are "
               "not the server's own; null: not known"),
        _request("wait_facts", "when it ran on the event loop (`ran`), waited for it "
               "(`ready`, `due`), awaited something else (`awaited`), a thread worked for it "
               "(`thread`) or was not on a core (`queued`, `off`), and when its process stood "
               "still (`gc`); null: not known; see waits.md"),
        Column("source", "string", "`agent` (exact), `server-timing` (response header: sums "
               "only, until the response began), or `otlp` (the spans of a model server)"),
    ),
)  # fmt: skip

BATCHES = Table(
    "batches",
    "One row a batch whose members belong to this run.",
    (
        _batch("batch_id", "16 hex digits; joins `server.batch_ids`"),
        _batch("trace_id", "the batch's own trace"),
        _batch("ring_id", "the process that ran it", of="process.ring_id"),
        _batch("seq", "position in that process's recorder file"),
        _batch("model", "model name, where given"),
        _batch("state", "`finished` or `died`"),
        _batch("start_ns", f"worker free and first member there; {_MONO}"),
        _batch("duration_ns", "until the batch was done"),
        _batch("size", "members", small=True),
        _batch("members", "ids of the members"),
        _batch("device_ns", "device time; 0 where it was not measured"),
        _batch("stages", "the batch's own stages"),
        _batch("error", "exception class, or empty"),
    ),
)

_HOST_MONO = "ns on the monotonic clock of the server's host"

SAMPLES = Table(
    "samples",
    "One row a reading of a resource on the server's host, while the run lasted.",
    (
        _sample("name", "what was read, a name of docs/attributes.md"),
        _sample("start_ns", f"beginning of what the value tells of; {_HOST_MONO}"),
        _sample("end_ns", "its end; equal to start_ns where it is of one moment"),
        _sample("value", "in `unit`"),
        Column("unit", "string", "as UCUM writes it"),
        Column("kind", "string", "`level`: how high it stood; `amount`: how much there was"),
        _sample("pid", "the process that it is of; 0: the host or a device"),
        _sample("device", "UUID of the device that it is of; empty: none"),
        _sample("detail", "what tells apart series of one name: `read`, a reason"),
    ),
)

STACKS = Table(
    "stacks",
    "One row a stack of one thread, as long as sampling saw it unchanged.",
    (
        _stack("pid", "process id"),
        _stack("thread_id", "the operating system's id; 0 where it is not known"),
        _stack("thread", "the thread's name"),
        _stack("start_ns", _HOST_MONO),
        _stack("end_ns", "start_ns and what its samples stand for"),
        _stack("samples", "how often it was seen", small=True),
        _stack("stage", "full name of the stage whose code it is; empty: none known"),
        _stack("by", "`marker`, `block`, `interval` or `none`: how the stage is known"),
        _stack("running", "false where the thread waits"),
        _stack("frames", "`function (file:line)`, outermost first"),
        _stack("reason", "`window`, `loop_lag`, `slow`, `oom` or `demand`"),
        _stack("how", "`py-spy` or `in-process`"),
        _stack("cpu_ns", "CPU time that the thread used meanwhile; null: not read"),
    ),
)

KERNELS = Table(
    "kernels",
    "One row a kernel, copy or operator by name, stage and capture; one row a stage's sum.",
    (
        _kernel("capture_id", "the capture that saw it"),
        _kernel("pid", "process id"),
        _kernel("start_ns", f"begin of recording; {_HOST_MONO}"),
        _kernel("end_ns", "its end"),
        _kernel("stage", "full name of the stage that launched it; empty: none"),
        _kernel("kind", "`stage`, `kernel`, `copy`, `memset` or `operator`"),
        _kernel("name", "as the profiler writes it; empty for kind `stage`"),
        _kernel("device", "`cuda:0`, `cpu`"),
        _kernel("launches", "how often"),
        _kernel("busy_ns", "sum; of a stage the union; of operators self time"),
        _kernel("span_ns", "kind `stage`: how long the stage was open; else 0"),
        _kernel("idle_ns", "kind `stage`: of span_ns, the device without work; else 0"),
        _kernel("host_wait_ns", "kind `stage`: of idle_ns, the next launch not begun"),
        _kernel("bound", "kind `stage`: `launch`, `kernel`, `copy`, `sync`, `mixed`"),
        _kernel("unmatched", "kind `stage`: launches whose work was not seen"),
    ),
)

TABLES = (CLIENT, SERVER, BATCHES)
"""Every run folder has these."""
EVIDENCE = (SAMPLES, STACKS, KERNELS)
"""A run folder has these where an agent sampled; each may be missing, or without rows."""
