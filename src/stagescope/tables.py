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

TABLES = (CLIENT, SERVER, BATCHES)
