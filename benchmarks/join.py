"""Time the join and the breakdown on a made-up run folder of any size.

    python benchmarks/join.py                     # 2,000,000 requests, 12,000,000 stage spans
    python benchmarks/join.py --requests 50000 --keep /tmp/run --json result.json

The folder holds what a real one does: warm-up, a few failed, unmatched and doubled requests,
six stage spans a request, four of them sub-stages, and batches of eight.
Prints a table; nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stagescope.runfolder.parquet import arrow_schema
from stagescope.runfolder.run import Host, Plan, Run, write_run
from stagescope.runfolder.schema import BATCHES, CLIENT, SERVER, Table

Ints = npt.NDArray[np.int64]
SPANS = (
    "queue.batch",
    "preprocess.parse",
    "batch.wait",
    "inference",
    "postprocess.serialize",
    "respond",
)
MEAN_NS = (2_000_000, 1_500_000, 800_000, 6_000_000, 400_000, 50_000)
BATCH = 8
RATE_PER_S = 2000
BOOT = "b" * 36


def hex_ids(rng: np.random.Generator, count: int, digits: int) -> pa.Array:
    """Return *count* random ids of *digits* hex digits."""
    text = rng.bytes(count * digits // 2).hex().encode()
    offsets = np.arange(count + 1, dtype=np.int32) * digits
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(text))


def words(codes: Ints, names: tuple[str, ...]) -> pa.Array:
    """Return the name of each code."""
    return pa.DictionaryArray.from_arrays(codes.astype(np.int32), pa.array(names)).cast(pa.string())


def table(kind: Table, count: int, columns: dict[str, object]) -> pa.Table:
    """Make a table of *kind*; a scalar fills its column, what is not named is 0, empty or null."""
    arrays = []
    for field in arrow_schema(kind):
        value = columns.get(field.name, "" if pa.types.is_string(field.type) else 0)
        absent = pa.types.is_list(field.type) or pa.types.is_boolean(field.type)
        if absent and field.name not in columns:
            arrays.append(pa.nulls(count, field.type))
        elif isinstance(value, str | int | bool):
            arrays.append(pa.repeat(pa.scalar(value, field.type), count))
        else:
            arrays.append(pa.array(value, field.type) if isinstance(value, np.ndarray) else value)
    return pa.table(arrays, schema=arrow_schema(kind))


def spans_of(self_ns: Ints, ends: Ints) -> pa.Array:
    """Return the `stages` list of each row from its (row, span) self times and ends."""
    rows, width = self_ns.shape
    kind = arrow_schema(SERVER).field("stages").type
    flat = self_ns.reshape(-1)
    names = words(np.tile(np.arange(width), rows), SPANS)
    struct = pa.StructArray.from_arrays(
        [
            names,
            pa.array((ends - self_ns).reshape(-1)),
            pa.array(ends.reshape(-1)),
            pa.array(flat),
            pa.repeat(False, len(flat)),
        ],
        fields=list(kind.value_type),
    )
    return pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * width, struct)


def make_folder(folder: Path, requests: int, seed: int) -> None:
    """Write a run folder of *requests* requests."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    trace_ids, span_ids = hex_ids(rng, requests, 32), hex_ids(rng, requests, 16)
    self_ns = np.stack([rng.exponential(mean, requests) for mean in MEAN_NS], 1).astype(np.int64)
    ends = np.cumsum(self_ns, 1)
    other = rng.integers(1_000, 50_000, requests)
    duration = ends[:, -1] + other
    intended = np.cumsum(rng.exponential(1e9 / RATE_PER_S, requests)).astype(np.int64)
    started = intended + rng.integers(0, 200_000, requests)
    connected = started + np.where(rng.random(requests) < 0.01, 300_000, 2_000)
    sent = connected + 5_000
    start = sent + rng.integers(100_000, 300_000, requests)
    last_byte = start + duration + rng.integers(-20_000, 200_000, requests)
    refused = rng.random(requests) < 0.001
    measured = np.arange(requests) >= requests // 20
    client = {
        "seq": np.arange(requests),
        "trace_id": trace_ids,
        "span_id": span_ids,
        "phase": words(measured.astype(np.int64), ("warmup", "measure")),
        "intended_ns": intended,
        "started_ns": started,
        "connected_ns": np.where(refused, last_byte, connected),
        "sent_ns": np.where(refused, last_byte, sent),
        "first_byte_ns": pa.array(last_byte, mask=refused),
        "last_byte_ns": last_byte,
        "reused": True,
        "status": np.where(refused, 0, 200).astype(np.int32),
        "error": words(refused.astype(np.int64), ("", "refused")),
    }
    write(folder, CLIENT, requests, client)
    # Some records lost, some doubled by a retry; in the order in which they finished.
    served = np.flatnonzero(~refused & (rng.random(requests) >= 0.001))
    served = np.concatenate([served, served[:: max(1, len(served) // 100)]])
    served = served[np.argsort((start + duration)[served], kind="stable")]
    rings = (rng.bytes(16).hex(), rng.bytes(16).hex())
    server = {
        "trace_id": trace_ids.take(served),
        "span_id": hex_ids(rng, len(served), 16),
        "parent_span_id": span_ids.take(served),
        "ring_id": words(served % 2, rings),
        "seq": np.arange(len(served)),
        "service": "benchmark",
        "boot_id": BOOT,
        "state": "finished",
        "start_ns": start[served],
        "start_wall_ns": start[served],
        "duration_ns": duration[served],
        "queue_ns": self_ns[served, 0],
        "preprocess_ns": self_ns[served, 1],
        "batch_ns": self_ns[served, 2],
        "inference_ns": self_ns[served, 3],
        "postprocess_ns": self_ns[served, 4],
        "respond_ns": self_ns[served, 5],
        "other_ns": other[served],
        "stages": spans_of(self_ns[served], ends[served]),
        "batch_ids": pa.ListArray.from_arrays(
            np.arange(len(served) + 1, dtype=np.int32), hex_ids(rng, len(served), 16)
        ),
        "method": "POST",
        "path": "/predict",
        "status": np.full(len(served), 200, np.int32),
        "source": "agent",
    }
    write(folder, SERVER, len(served), server)
    leaders = served[::BATCH]
    batches = {
        "batch_id": hex_ids(rng, len(leaders), 16),
        "trace_id": hex_ids(rng, len(leaders), 32),
        "ring_id": words(leaders % 2, rings),
        "state": "finished",
        "start_ns": start[leaders],
        "duration_ns": duration[leaders],
        "size": np.full(len(leaders), BATCH, np.int32),
        "members": pa.nulls(len(leaders), arrow_schema(BATCHES).field("members").type),
        "stages": spans_of(self_ns[leaders], ends[leaders]),
    }
    write(folder, BATCHES, len(leaders), batches)
    write_run(folder, run_of(requests, float(intended[-1]) / 1e9, seed))


def write(folder: Path, kind: Table, count: int, columns: dict[str, object]) -> None:
    """Write one table of the folder, as the exporter does."""
    pq.write_table(table(kind, count, columns), folder / kind.file_name, compression="zstd")


def run_of(requests: int, duration_s: float, seed: int) -> Run:
    """Return the `run.json` of the made-up run."""
    return Run(
        run_id="benchmark",
        plan=Plan(
            url="http://127.0.0.1:8000/predict",
            method="POST",
            rate_per_s=RATE_PER_S,
            duration_s=duration_s * 0.95,
            warmup_s=duration_s * 0.05,
            arrivals="poisson",
            seed=seed,
            timeout_s=30.0,
            body_bytes=0,
        ),
        host=Host("here", BOOT, os.cpu_count() or 1, platform.platform(), ""),
        started_wall_ns=0,
        started_ns=0,
        measured_s=duration_s * 0.95,
        server_source="agent",
        driver={"planned": float(requests), "sent": float(requests), "late_p99_ms": 0.2},
        instrument={"request_us": 3.0, "stage_us": 0.4, "overwritten": 0, "dropped": 0},
    )


def main() -> None:
    """Make the folder, build its report a few times, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=2_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="keep the run folder here, and use it if there")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch) / "run"
        if not (folder / "run.json").exists():
            make_folder(folder, args.requests, args.seed)
        result = measure(folder, args.repeats)
    print_result(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def measure(folder: Path, repeats: int) -> dict[str, float | int | str]:
    """Time *repeats* reports of *folder*, after the import of the engine, timed by itself."""
    began = time.perf_counter()
    from stagescope.analysis.build import build_report

    imported = time.perf_counter() - began
    wall: list[float] = []
    cpu: list[float] = []
    for _ in range(repeats):
        began, busy = time.perf_counter(), time.process_time()
        report = build_report(folder)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - busy)
    server_rows = pq.read_metadata(folder / SERVER.file_name).num_rows
    return {
        "client_rows": pq.read_metadata(folder / CLIENT.file_name).num_rows,
        "joined": report.join.requests,
        "stage_spans": round(server_rows * report.instrument.stages_per_request),
        "parquet_bytes": sum(file.stat().st_size for file in folder.glob("*.parquet")),
        "cores": os.cpu_count() or 1,
        "system": platform.platform(),
        "import_s": imported,
        "wall_best_s": min(wall),
        "wall_median_s": statistics.median(wall),
        "cpu_median_s": statistics.median(cpu),
    }


def print_result(result: dict[str, float | int | str]) -> None:
    """Print one figure a line."""
    for name, value in result.items():
        text = f"{value:,.2f}" if isinstance(value, float) else value
        print(f"{name:<16} {text:>16,}" if isinstance(text, int) else f"{name:<16} {text:>16}")


if __name__ == "__main__":
    main()
