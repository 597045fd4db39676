"""The cold start of a real server: its parts in order, its sum, its death, its end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from stagescope.middleware.runtime.cold_start import process_start_ns
from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import ring_files
from stagescope.records import ColdStartRecord, Record, RequestRecord, State, last_stage
from stagescope.stages import COLD_START_PARTS
from stagescope.testing import wait_until

SERVER = Path(__file__).parent / "cold_server.py"


@contextmanager
def server(spool: Path, wait_at: str = "-", **environ: str) -> Iterator[subprocess.Popen[str]]:
    """Start the server; killed at the end."""
    with subprocess.Popen(
        [sys.executable, str(SERVER), str(spool), wait_at],
        stdout=subprocess.PIPE, text=True, env=os.environ | environ,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def told(process: subprocess.Popen[str]) -> str:
    """Return the next line that the server says."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def get(port: str) -> None:
    """Ask once."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as response:
        assert response.read() == b"ok"


def records(spool: Path) -> list[Record]:
    """Read the one recorder file, what was in flight included where its process is gone."""
    (path,) = ring_files(spool)
    with RecorderReader(path) as reader:
        found = reader.poll()
        return found if reader.writer_alive() else found + reader.in_flight(time.monotonic_ns())


def cold_starts(spool: Path) -> list[ColdStartRecord]:
    """Return the cold starts."""
    return [record for record in records(spool) if isinstance(record, ColdStartRecord)]


def both_requests(spool: Path) -> list[RequestRecord]:
    """Return the two requests, once both are recorded: an answer is read before its record is."""
    found = [record for record in records(spool) if isinstance(record, RequestRecord)]
    return found if len(found) == 2 else []


def test_a_cold_start_has_its_parts_in_order_and_sums_to_its_wall_time(tmp_path: Path) -> None:
    """Imports, startup, idle, first request follow each other; loads lie in the right ones."""
    before_ns = time.monotonic_ns()
    with server(tmp_path) as process:
        port = told(process)
        get(port)
        get(port)
        (cold,) = wait_until(lambda: cold_starts(tmp_path))
        requests = wait_until(lambda: both_requests(tmp_path))
    after_ns = time.monotonic_ns()

    parts = [span for span in cold.stages if span.stage in COLD_START_PARTS]
    assert tuple(span.stage for span in parts) == COLD_START_PARTS
    assert all(a.end_ns == b.start_ns for a, b in pairwise(parts))
    assert (parts[0].start_ns, parts[-1].end_ns) == (0, cold.duration_ns)
    assert sum(span.self_ns for span in cold.stages) == cold.duration_ns
    at_import, at_startup = [span for span in cold.stages if span.stage == "load.weights"]
    assert parts[0].start_ns < at_import.start_ns < at_import.end_ns < parts[0].end_ns
    assert parts[1].start_ns < at_startup.start_ns < at_startup.end_ns < parts[1].end_ns
    assert before_ns - 20_000_000 <= cold.start_ns <= cold.start_ns + cold.duration_ns <= after_ns
    assert cold.first_request is not None
    assert cold.first_request.span_id == requests[0].span_id
    assert cold.first_request.trace_id == requests[0].trace_id != cold.trace_id
    assert [span.stage for span in requests[1].stages] == ["inference", "respond"]
    assert cold.ready_ns() == parts[2].start_ns


@pytest.mark.parametrize(
    ("wait_at", "part", "environ"),
    [("startup", "startup", {}), ("import", "imports", {"STAGESCOPE_RUN": "1"})],
)
def test_a_server_killed_while_it_loads_says_so(
    tmp_path: Path, wait_at: str, part: str, environ: dict[str, str]
) -> None:
    """The record of a start that was cut short names the load; at import under `run` too."""
    with server(tmp_path, wait_at, STAGESCOPE_SPOOL=str(tmp_path), **environ) as process:
        while told(process) != "loading":
            assert process.poll() is None
    (cold,) = cold_starts(tmp_path)

    assert cold.state is State.DIED
    assert last_stage(cold) == "load.weights"
    assert [span.stage for span in cold.stages if span.open] == [part, "load.weights"]
    assert cold.ready_ns() is None
    assert sum(span.self_ns for span in cold.stages) == cold.duration_ns


def test_a_server_that_nobody_asks_ends_its_cold_start_with_itself(tmp_path: Path) -> None:
    """Ended politely before its first request, the record is finished, without a first request."""
    with server(tmp_path) as process:
        told(process)
        wait_until(lambda: list(ring_files(tmp_path)))
        with RecorderReader(next(iter(ring_files(tmp_path)))) as reader:
            wait_until(lambda: any("idle" in str(r) for r in reader.in_flight(1 << 62)))
        process.terminate()
        process.wait(20)
    (cold,) = cold_starts(tmp_path)

    assert cold.state is State.FINISHED
    assert cold.first_request is None
    assert "first_request" not in [span.stage for span in cold.stages]


def test_the_start_of_a_process_is_the_kernels(tmp_path: Path) -> None:
    """Taken from `/proc`, whatever the program's name; now where that cannot be read."""
    own = Path("/proc/self/stat").read_bytes()
    odd = tmp_path / "stat"
    odd.write_bytes(b"1 (a) b (c) " + own.rpartition(b")")[2])

    # Two readings of two clocks lie between: a busy machine may take its time there.
    assert abs(process_start_ns(odd) - process_start_ns()) < 1_000_000_000
    assert process_start_ns() < time.monotonic_ns()
    before_ns = time.monotonic_ns()
    assert before_ns <= process_start_ns(tmp_path / "none") <= time.monotonic_ns()
