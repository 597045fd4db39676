"""The tables of a run folder, column by column; docs/run-folder.md is written from here.

Standard library only: who writes Parquet turns a `Table` into an Arrow schema.
A reader must take any older version of a table: columns are added, never renamed or dropped,
and a column that an old file lacks reads as null.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        Column("connected_ns", "int64", "when a connection was at hand; less started: connect"),
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
        Column("trace_id", "string", "joins `client.trace_id`"),
        Column("span_id", "string", "the server's span"),
        Column("parent_span_id", "string", "joins `client.span_id`"),
        Column("ring_id", "string", "the process that served it (`service.instance.id`)"),
        Column("seq", "int64", "position in that process's recorder file; -1: it died in flight"),
        Column("pid", "int64", "process id on its host"),
        Column("service", "string", "service name"),
        Column("host", "string", "host name"),
        Column("boot_id", "string", "equal to the client's: one monotonic clock serves both"),
        Column("state", "string", "`finished` or `died`"),
        Column("died_in_stage", "string", "the stage open when the process died; empty otherwise"),
        Column("start_ns", "int64", f"when the middleware first saw it; {_MONO}"),
        Column("start_wall_ns", "int64", "the same, ns since the Unix epoch"),
        Column("duration_ns", "int64", "until the last byte was handed over"),
        *(Column(f"{s}_ns", "int64", f"charged to `{s}`, sub-stages included") for s in STAGES),
        Column("other_ns", "int64", "what none of the six stages claimed (stages of the user's "
               "own names are in `stages` and count here)"),
        Column("stages", SPAN_TYPE, "every opening of a stage, by full name, with what it is "
               "charged"),
        Column("batch_ids", "list<string>", "batches that it was a member of"),
        Column("method", "string", "HTTP method"),
        Column("path", "string", "without query string, at most 128 bytes"),
        Column("route", "string", "route template where known, else empty"),
        Column("status", "int32", "HTTP status; 0 where no response was started"),
        Column("error", "string", "exception class, `disconnect`, `incomplete`, or empty"),
        Column("request_bytes", "int64", "body bytes read"),
        Column("response_bytes", "int64", "body bytes written"),
        Column("first_byte_ns", "int64", "since start_ns; 0 where no body byte was written"),
        Column("send_wait_ns", "int64", "waiting for the client to take bytes"),
        Column("chunks", "int32", "body messages written"),
        Column("stages_dropped", "int32", "openings that found no room in the record"),
        Column("chunk_gaps", "int32", "times between one body chunk with bytes and the next"),
        Column("chunk_gap_sum_ns", "int64", "their sum; divided by chunk_gaps, the mean time between "
               "chunks, or tokens"),
        Column("chunk_gap_max_ns", "int64", "the longest of them"),
        Column("stalls", STALL_TYPE, "what its stages, and `other`, were charged while the process "
               "stood still, by cause: `loop`, `gc`, `capture`; null: not known"),
        Column("profiled", "bool", "true where a capture was at work meanwhile, so that its times are "
               "not the server's own; null: not known"),
        Column("wait_facts", WAIT_FACT_TYPE, "when it ran on the event loop (`ran`), waited for it "
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
        Column("batch_id", "string", "16 hex digits; joins `server.batch_ids`"),
        Column("trace_id", "string", "the batch's own trace"),
        Column("ring_id", "string", "the process that ran it"),
        Column("seq", "int64", "position in that process's recorder file"),
        Column("model", "string", "model name, where given"),
        Column("state", "string", "`finished` or `died`"),
        Column("start_ns", "int64", f"worker free and first member there; {_MONO}"),
        Column("duration_ns", "int64", "until the batch was done"),
        Column("size", "int32", "members"),
        Column("members", MEMBER_TYPE, "ids of the members"),
        Column("device_ns", "int64", "device time; 0 where it was not measured"),
        Column("stages", SPAN_TYPE, "the batch's own stages"),
        Column("error", "string", "exception class, or empty"),
    ),
)

_HOST_MONO = "ns on the monotonic clock of the server's host"

SAMPLES = Table(
    "samples",
    "One row a reading of a resource on the server's host, while the run lasted.",
    (
        Column("name", "string", "what was read, a name of docs/attributes.md"),
        Column("start_ns", "int64", f"beginning of what the value tells of; {_HOST_MONO}"),
        Column("end_ns", "int64", "its end; equal to start_ns where it is of one moment"),
        Column("value", "float64", "in `unit`"),
        Column("unit", "string", "as UCUM writes it"),
        Column("kind", "string", "`level`: how high it stood; `amount`: how much there was"),
        Column("pid", "int64", "the process that it is of; 0: the host or a device"),
        Column("device", "string", "UUID of the device that it is of; empty: none"),
        Column("detail", "string", "what tells apart series of one name: `read`, a reason"),
    ),
)

STACKS = Table(
    "stacks",
    "One row a stack of one thread, as long as sampling saw it unchanged.",
    (
        Column("pid", "int64", "process id"),
        Column("thread_id", "int64", "the operating system's id; 0 where it is not known"),
        Column("thread", "string", "the thread's name"),
        Column("start_ns", "int64", _HOST_MONO),
        Column("end_ns", "int64", "start_ns and what its samples stand for"),
        Column("samples", "int32", "how often it was seen"),
        Column("stage", "string", "full name of the stage whose code it is; empty: none known"),
        Column("by", "string", "`marker`, `block`, `interval` or `none`: how the stage is known"),
        Column("running", "bool", "false where the thread waits"),
        Column("frames", "list<string>", "`function (file:line)`, outermost first"),
        Column("reason", "string", "`window`, `loop_lag`, `slow`, `oom` or `demand`"),
        Column("how", "string", "`py-spy` or `in-process`"),
        Column("cpu_ns", "int64", "CPU time that the thread used meanwhile; null: not read"),
    ),
)

KERNELS = Table(
    "kernels",
    "One row a kernel, copy or operator by name, stage and capture; one row a stage's sum.",
    (
        Column("capture_id", "string", "the capture that saw it"),
        Column("pid", "int64", "process id"),
        Column("start_ns", "int64", f"begin of recording; {_HOST_MONO}"),
        Column("end_ns", "int64", "its end"),
        Column("stage", "string", "full name of the stage that launched it; empty: none"),
        Column("kind", "string", "`stage`, `kernel`, `copy`, `memset` or `operator`"),
        Column("name", "string", "as the profiler writes it; empty for kind `stage`"),
        Column("device", "string", "`cuda:0`, `cpu`"),
        Column("launches", "int64", "how often"),
        Column("busy_ns", "int64", "sum; of a stage the union; of operators self time"),
        Column("span_ns", "int64", "kind `stage`: how long the stage was open; else 0"),
        Column("idle_ns", "int64", "kind `stage`: of span_ns, the device without work; else 0"),
        Column("host_wait_ns", "int64", "kind `stage`: of idle_ns, the next launch not begun"),
        Column("bound", "string", "kind `stage`: `launch`, `kernel`, `copy`, `sync`, `mixed`"),
        Column("unmatched", "int64", "kind `stage`: launches whose work was not seen"),
    ),
)

TABLES = (CLIENT, SERVER, BATCHES)
"""Every run folder has these."""
EVIDENCE = (SAMPLES, STACKS, KERNELS)
"""A run folder has these where an agent sampled; each may be missing, or without rows."""
