"""Requests of a client of one's own (a script, k6, Locust), read from the file that it wrote.

docs/own-client.md is the format: one row a request, as JSON lines, CSV or Parquet.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from stagescope.errors import UsageError
from stagescope.runfolder.schema import CLIENT

Row = Mapping[str, Any]

UNIX_FROM_NS = 10**17
"""A Unix time is above (since 1973), a monotonic one below (three years after the boot)."""
TIMES = ("intended", "started", "connected", "sent", "first_byte", "first_body", "last_byte")
_NUMBERS = ("dns_ns", "tcp_ns", "status", "request_bytes", "response_bytes", "chunks")
_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")
_SPAN_ID = re.compile(r"(?!0{16})[0-9a-f]{16}")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class ClientFile:
    """The requests, ordered by when they were meant to be sent."""

    rows: Sequence[Row]
    """Each has all columns of the `client` table; those that the file lacks are null."""
    monotonic: bool
    """Whether the times are of a monotonic clock; else they are Unix times."""

    @property
    def responded(self) -> int:
        """How many got a response's head."""
        return sum(row["status"] != 0 for row in self.rows)

    def chunks(self, rows: int = 65_536) -> Iterator[Mapping[str, Sequence[Any]]]:
        """Yield all rows as columns of the `client` table, at most *rows* at a time."""
        for start in range(0, len(self.rows), rows):
            part = self.rows[start : start + rows]
            yield {column.name: [row[column.name] for row in part] for column in CLIENT.columns}


def read_client_file(file: Path) -> ClientFile:
    """Read *file*; raise UsageError, which names the row and what is wrong with it."""
    found: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for where, row in _rows(file):
        try:
            request = _request(row)
        except ValueError as problem:
            raise UsageError(f"{file}, {where}: {problem}") from None
        before = seen.setdefault(request["trace_id"], where)
        if before != where:
            raise UsageError(
                f"{file}, {where}: its trace id is that of {before}; each request needs its own"
            )
        found.append(request)
    if not found:
        raise UsageError(f"{file} holds no request")
    clocks = {row["sent_ns"] < UNIX_FROM_NS for row in found}
    if len(clocks) > 1:
        raise UsageError(f"{file} has times of two clocks: write all as Unix times")
    found.sort(key=lambda row: row["intended_ns"])
    for seq, row in enumerate(found):
        row["seq"] = seq
    return ClientFile(found, clocks.pop())


def _rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Yield where each row stands, and its fields; those that are empty are left out."""
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise UsageError(f"{file}: the name of a client's file ends in {', '.join(_READERS)}")
    try:
        for where, row in reader(file):
            yield where, {name: value for name, value in row.items() if value not in (None, "")}
    except OSError as problem:
        reason = problem.strerror or str(problem).partition("\n")[0]
        raise UsageError(f"{file} cannot be read: {reason}") from None
    except (UnicodeDecodeError, csv.Error) as problem:
        raise UsageError(f"{file} cannot be read: {problem}") from None


def _json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UsageError(f"{file}, line {number} is not a JSON object: {line[:60]!r}")
            yield f"line {number}", row


def _csv_rows(file: Path) -> Iterator[tuple[str, Row]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, restkey="further", restval="")
        for row in reader:
            yield f"line {reader.line_num}", row


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pa.ArrowException as problem:
        raise OSError(str(problem)) from None


_READERS: Mapping[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _request(row: Row) -> dict[str, Any]:
    """Return *row* as one of the `client` table, without `seq`; raise ValueError with the reason."""
    trace_id, span_id = _ids(row)
    times = _times(row)
    error = str(row.get("error", ""))
    status = row.get("status")
    if status is None and not error:
        raise ValueError("it has neither status nor error")
    phase = row.get("phase", "measure")
    if phase not in ("measure", "warmup"):
        raise ValueError(f"phase is {phase!r}: measure or warmup")
    return {
        **{column.name: None for column in CLIENT.columns},
        **{f"{name}_ns": at_ns for name, at_ns in times.items()},
        **{name: _whole(name, row[name]) for name in _NUMBERS if name in row},
        "trace_id": trace_id,
        "span_id": span_id,
        "phase": phase,
        "status": _whole("status", status or 0),
        "error": error,
        "server_timing": str(row.get("server_timing", "")),
        "streamed": str(row.get("streamed", False)).lower() in ("true", "1"),
    }


def _ids(row: Row) -> tuple[str, str]:
    """Return trace id and span id; the latter is empty where it is not known."""
    trace_id, span_id = str(row.get("trace_id", "")), str(row.get("span_id", ""))
    if not trace_id and (sent := row.get("traceparent")):
        if not (parts := _TRACEPARENT.fullmatch(str(sent).lower())):
            raise ValueError(f"traceparent is {sent!r}: 00-TRACE ID-SPAN ID-01")
        trace_id, span_id = parts.groups()
    if not trace_id:
        raise ValueError(
            f"it has no trace_id (nor traceparent), only {', '.join(row) or 'nothing'}"
        )
    if not _TRACE_ID.fullmatch(trace_id.lower()):
        raise ValueError(f"trace_id is {trace_id!r}: 32 hexadecimal digits, not all 0")
    if span_id and not _SPAN_ID.fullmatch(span_id.lower()):
        raise ValueError(f"span_id is {span_id!r}: 16 hexadecimal digits, not all 0")
    return trace_id.lower(), span_id.lower()


def _times(row: Row) -> dict[str, int | None]:
    sent_ns = _time(row, "sent", None)
    if sent_ns is None:
        raise ValueError("it has no sent time: give sent_ns, or sent as an ISO 8601 time")
    times: dict[str, int | None] = {name: _time(row, name, sent_ns) for name in TIMES}
    if times["last_byte"] is None:
        raise ValueError(
            "it has no end: give last_byte_ns, last_byte as an ISO 8601 time, or last_byte_ms, "
            "milliseconds after sent"
        )
    if times["intended"] is None:
        times["intended"] = times["started"] if times["started"] is not None else sent_ns
    known = [(name, at_ns) for name in TIMES if (at_ns := times[name]) is not None]
    for (before, before_ns), (name, at_ns) in pairwise(known):
        if at_ns < before_ns:
            raise ValueError(f"{name} is {(before_ns - at_ns) / 1e6:,.3f} ms before {before}")
    return times


def _time(row: Row, name: str, sent_ns: int | None) -> int | None:
    """Return time *name* in ns, from whichever of its three spellings *row* has."""
    if (value := row.get(f"{name}_ns")) is not None:
        return _whole(f"{name}_ns", value)
    if (value := row.get(name)) is not None:
        return _iso_ns(name, value)
    if sent_ns is not None and (value := row.get(f"{name}_ms")) is not None:
        try:
            return sent_ns + round(float(value) * 1e6)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name}_ms is {value!r}: milliseconds after sent") from None
    return None


def _iso_ns(name: str, value: Any) -> int:
    try:
        at = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        at = None
    if at is None or at.tzinfo is None:
        raise ValueError(
            f"{name} is {value!r}: an ISO 8601 time with its offset, 2026-01-31T12:00:00.123456Z; "
            f"or give {name}_ns"
        )
    since = at - datetime.fromisoformat("1970-01-01T00:00:00+00:00")
    return (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1_000


def _whole(name: str, value: Any) -> int:
    try:
        number = int(value)
        usable = not isinstance(value, float) or value.is_integer()
    except (TypeError, ValueError, OverflowError):
        number, usable = 0, False
    limit = 2**63 if name.endswith(("_ns", "_bytes")) else 2**31
    if not usable or not 0 <= number < limit or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: a whole number from 0 to {limit - 1}")
    return number
