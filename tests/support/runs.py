"""Run folders made by hand, row by row, for tests of whatever reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stagescope.runfolder.parquet import arrow_schema
from stagescope.runfolder.run import Host, Plan, Run, write_run
from stagescope.runfolder.schema import BATCHES, CLIENT, KERNELS, SAMPLES, SERVER, STACKS, Table
from stagescope.samples import AMOUNT, LEVEL
from stagescope.stages import STAGES, stage_of

BOOT_ID = "00000000-1111-2222-3333-444444444444"
MS = 1_000_000
Row = Mapping[str, Any]


def client_row(seq: int, *, latency_ns: int = 20 * MS, **changes: Any) -> dict[str, Any]:
    """Return a measured, answered request: 1 ms client wait, 1 ms connect, then sent.

    Requests follow one another by 100 ms on the client's clock, from 1 s on.
    """
    intended = 1_000 * MS + seq * 100 * MS
    row = {
        "seq": seq,
        "trace_id": f"{seq + 1:032x}",
        "span_id": f"{seq + 1:016x}",
        "phase": "measure",
        "intended_ns": intended,
        "started_ns": intended + MS,
        "connected_ns": intended + 2 * MS,
        "sent_ns": intended + 2 * MS,
        "first_byte_ns": intended + latency_ns,
        "last_byte_ns": intended + latency_ns,
        "reused": True,
        "dns_ns": 0,
        "tcp_ns": 0,
        "status": 200,
        "request_bytes": 0,
        "response_bytes": 2,
        "error": "",
        "server_timing": "",
        "first_body_ns": intended + latency_ns,
        "chunks": 1,
        "streamed": False,
    }
    return row | changes


def failed_row(seq: int, error: str, **changes: Any) -> dict[str, Any]:
    """Return a measured request that got no response; refused ones were never sent.

    As the load driver does, what it did not reach has the time of the failure.
    """
    row = client_row(seq) | {
        "error": error,
        "status": 0,
        "first_byte_ns": None,
        "first_body_ns": None,
    }
    if error == "refused":
        row |= {"connected_ns": row["last_byte_ns"], "sent_ns": row["last_byte_ns"]}
    return row | changes


def server_row(
    client: Row, stages: Mapping[str, int], *, other_ns: int = 0, **changes: Any
) -> dict[str, Any]:
    """Return the server's record of *client*: *stages* in turn, by full name, ns each.

    It begins 1 ms after the client sent; its duration is all stages and *other_ns*.
    """
    spans, at = [], 0
    for name, spent in stages.items():
        spans.append(
            {
                "stage": name,
                "start_ns": at,
                "end_ns": at + spent,
                "self_ns": spent,
                "failed": False,
            }
        )
        at += spent
    wide = {
        stage: sum(spent for name, spent in stages.items() if stage_of(name) == stage)
        for stage in STAGES
    }
    start = (client["sent_ns"] or client["intended_ns"]) + MS
    row = {
        "trace_id": client["trace_id"],
        "span_id": f"{client['seq'] + 1:015x}f",
        "parent_span_id": client["span_id"],
        "ring_id": "a" * 32,
        "seq": client["seq"],
        "pid": 1,
        "service": "test",
        "host": "here",
        "boot_id": BOOT_ID,
        "state": "finished",
        "start_ns": start,
        "start_wall_ns": start,
        "duration_ns": at + other_ns,
        **{f"{stage}_ns": spent for stage, spent in wide.items()},
        "other_ns": at + other_ns - sum(wide.values()),
        "stages": spans,
        "batch_ids": [],
        "method": "GET",
        "path": "/",
        "route": "/",
        "status": client["status"],
        "error": "",
        "profiled": False,
        "stalls": [],
        "source": "agent",
        "stages_dropped": 0,
    }
    return row | changes


def batch_row(number: int, *, size: int, start_ns: int, **stages: int) -> dict[str, Any]:
    """Return a finished batch; *stages* by name with `__` for the dot, ns each."""
    spans, at = [], 0
    for name, spent in stages.items():
        spans.append(
            {
                "stage": name.replace("__", "."),
                "start_ns": at,
                "end_ns": at + spent,
                "self_ns": spent,
                "failed": False,
            }
        )
        at += spent
    return {
        "batch_id": f"{number + 1:016x}",
        "trace_id": f"{number + 1:031x}b",
        "ring_id": "a" * 32,
        "seq": number,
        "model": "test",
        "state": "finished",
        "start_ns": start_ns,
        "duration_ns": at,
        "size": size,
        "members": [],
        "device_ns": 0,
        "stages": spans,
        "error": "",
    }


def amount_row(
    name: str, value: float, start_ns: int, end_ns: int, **changes: Any
) -> dict[str, Any]:
    """Return a sample: how much there was of something, of process 1 where nothing else is said."""
    row = {"name": name, "start_ns": start_ns, "end_ns": end_ns, "value": value, "unit": "s"}
    return row | {"kind": AMOUNT, "pid": 1, "device": "", "detail": ""} | changes


def level_row(
    name: str, value: float, start_ns: int, end_ns: int | None = None, **changes: Any
) -> dict[str, Any]:
    """Return a sample: how high something stood, at one moment where no end is given."""
    end = start_ns if end_ns is None else end_ns
    return amount_row(name, value, start_ns, end, unit="By") | {"kind": LEVEL} | changes


def stack_row(
    stage: str, start_ns: int, *frames: str, samples: int = 1, **changes: Any
) -> dict[str, Any]:
    """Return a running stack of process 1, seen *samples* times at 50 Hz; *frames* outermost first."""
    row = {
        "pid": 1,
        "thread_id": 1,
        "thread": "MainThread",
        "start_ns": start_ns,
        "end_ns": start_ns + samples * 20 * MS,
        "samples": samples,
        "stage": stage,
        "by": "marker" if stage else "none",
        "running": True,
        "frames": list(frames),
        "reason": "window",
        "how": "py-spy",
    }
    return row | changes


def kernel_row(
    stage: str, kind: str, name: str, busy_ns: int, *, launches: int = 1, **changes: Any
) -> dict[str, Any]:
    """Return a kernel's row of the capture `c`; of kind `stage`, without a name, a stage's sum."""
    row = {
        "capture_id": "c",
        "pid": 1,
        "start_ns": 0,
        "end_ns": 0,
        "stage": stage,
        "kind": kind,
        "name": name,
        "device": "cuda:0",
        "launches": launches,
        "busy_ns": busy_ns,
        "span_ns": 0,
        "idle_ns": 0,
        "host_wait_ns": 0,
        "bound": "",
        "unmatched": 0,
    }
    return row | changes


def example_run(**changes: Any) -> Run:
    """Return the `run.json` of a valid run at 10 requests/s."""
    given: dict[str, Any] = {
        "run_id": "test",
        "plan": Plan(
            url="http://127.0.0.1:8000/predict",
            method="GET",
            rate_per_s=10.0,
            duration_s=10.0,
            warmup_s=0.0,
            arrivals="constant",
            seed=1,
            timeout_s=30.0,
            body_bytes=0,
        ),
        "host": Host("here", BOOT_ID, 2, "Linux", "3.11"),
        "started_wall_ns": 0,
        "started_ns": 0,
        "measured_s": 10.0,
        "server_source": "agent",
        "driver": {"planned": 100.0, "sent": 100.0, "late_p99_ms": 0.1},
        "instrument": {"request_us": 3.0, "stage_us": 0.5, "overwritten": 0.0, "dropped": 0.0},
    }
    return Run(**given | changes)


def write_run_folder(
    folder: Path,
    client: Sequence[Row],
    server: Sequence[Row] = (),
    batches: Sequence[Row] = (),
    *,
    samples: Sequence[Row] | None = None,
    stacks: Sequence[Row] | None = None,
    kernels: Sequence[Row] | None = None,
    run: Run | None = None,
) -> Path:
    """Write a run folder of these rows; a column that a row does not name is null.

    *samples*, *stacks* and *kernels* have no file where they are None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for table, rows in ((CLIENT, client), (SERVER, server), (BATCHES, batches)):
        write_table(folder, table, rows)
    for table, evidence in ((SAMPLES, samples), (STACKS, stacks), (KERNELS, kernels)):
        if evidence is not None:
            write_table(folder, table, evidence)
    write_run(folder, run or example_run())
    return folder


def write_table(folder: Path, table: Table, rows: Sequence[Row]) -> None:
    """Write the Parquet file of *table* into *folder*."""
    stored = pa.Table.from_pylist(list(rows), schema=arrow_schema(table))
    pq.write_table(stored, folder / table.file_name)
