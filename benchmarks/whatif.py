"""Hold the predictions of `stagescope whatif` against real runs of the changed setting.

    python benchmarks/whatif.py drive DIR            # about 8 minutes; --server NAME for a part
    python benchmarks/whatif.py judge DIR            # predicts and prints; needs no quiet machine

Three servers: the torch example, and two of whatif_server.py. Each is run as it is, then once for
each change, with the same arrivals. Prints each prediction beside what was measured, the median
absolute errors, and how many intervals held the truth. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagescope.analysis.build import build_report
from stagescope.analysis.whatif.predict import predict
from stagescope.cli.whatif import planned
from stagescope.examples.image_server.images import sample_jpeg
from stagescope.load_run.plan import LoadPlan
from stagescope.load_run.run import execute
from stagescope.testing import wait_until

DURATION_S, WARMUP_S = 15.0, 2.0
PLANTED = "benchmarks.whatif_server:app"
FIGURES = ("p50_ms", "p99_ms", "throughput_per_s")


@dataclass(frozen=True, slots=True)
class Setting:
    """One run: what differs from the server's base run."""

    change: str
    """As `stagescope whatif` takes it; `{}`: the stage's own mean is read from the changed run."""
    environ: Mapping[str, str] = field(default_factory=dict[str, str])
    rate_per_s: float | None = None
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Server:
    """One server, its base, and what is changed of it."""

    name: str
    app: str
    path: str
    rate_per_s: float
    settings: tuple[Setting, ...]
    environ: Mapping[str, str] = field(default_factory=dict[str, str])


def _env(change: str, **environ: str) -> Setting:
    return Setting(change, environ)


def _rate(rate: float) -> Setting:
    return Setting(f"rate={rate:g}", rate_per_s=rate)


SERVERS = (
    Server(
        "torch",
        "stagescope.examples.torch_server.app:app",
        "/predict",
        32.0,
        (
            _rate(16),
            _rate(24),
            _rate(40),
            _env("batch.delay=0ms", IMAGE_SERVER_MAX_DELAY_S="0"),
            _env("batch.delay=10ms", IMAGE_SERVER_MAX_DELAY_S="0.01"),
            _env("batch.delay=20ms", IMAGE_SERVER_MAX_DELAY_S="0.02"),
            _env("batch.delay=40ms", IMAGE_SERVER_MAX_DELAY_S="0.04"),
            _env("batch.size=2", IMAGE_SERVER_MAX_BATCH="2"),
            _env("batch.size=1", IMAGE_SERVER_MAX_BATCH="1"),
            _env("inference {}", IMAGE_SERVER_WIDTH="30"),
            _env("inference {}", IMAGE_SERVER_WIDTH="16"),
            _env("threads=2", IMAGE_SERVER_DECODE_THREADS="2"),
            Setting("rate=24,batch.delay=20ms", {"IMAGE_SERVER_MAX_DELAY_S": "0.02"}, 24.0),
        ),
        {"IMAGE_SERVER_WIDTH": "24"},
    ),
    Server(
        "loop",
        PLANTED,
        "/loop",
        80.0,
        (
            _env("preprocess -50%", WHATIF_PREPROCESS="4"),
            _env("preprocess +2ms", WHATIF_PREPROCESS="10"),
            _env("inference -50%", WHATIF_INFERENCE="10"),
            _rate(100),
        ),
    ),
    Server(
        "threads",
        PLANTED,
        "/threads",
        75.0,
        (
            _env("threads=3", WHATIF_THREADS="3"),
            _env("inference -25%", WHATIF_INFERENCE="15"),
            _rate(85),
            Setting("workers=2", workers=2),
        ),
    ),
)


@contextmanager
def served(app: str, environ: Mapping[str, str], workers: int) -> Iterator[tuple[int, Path]]:
    """Serve *app* on a loopback port; yield it and the spool."""
    with tempfile.TemporaryDirectory(prefix="whatif-") as spool, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(2048)
        port: int = listener.getsockname()[1]
        with subprocess.Popen(
            [sys.executable, "-m", "uvicorn", app, "--fd", str(listener.fileno()), "--workers",
             str(workers), "--log-level", "warning", "--no-access-log"],
            pass_fds=[listener.fileno()],
            env=os.environ | {"STAGESCOPE_SPOOL": spool} | dict(environ),
        ) as process:  # fmt: skip
            try:
                wait_until(lambda: _answers(port), 60)
                yield port, Path(spool)
            finally:
                process.terminate()
                process.wait(20)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def drive(folder: Path, names: list[str], settings: list[int] | None) -> None:
    """Run each server as it is, and with each of its changes."""
    for server in (one for one in SERVERS if one.name in names):
        every = (Setting("unchanged"), *server.settings)
        for number, setting in enumerate(every):
            place = folder / f"{server.name}-{number}"
            if place.exists() or (settings is not None and number not in settings):
                continue
            environ = {**server.environ, **setting.environ}
            with served(server.app, environ, setting.workers) as (port, spool):
                plan = LoadPlan(
                    rate_per_s=setting.rate_per_s or server.rate_per_s,
                    duration_s=DURATION_S,
                    warmup_s=WARMUP_S,
                    body=sample_jpeg(320, 240) if server.path == "/predict" else b"x",
                    out=place,
                    spool=spool,
                )
                run = execute(plan, f"http://127.0.0.1:{port}{server.path}").run
            print(f"{place.name}: {setting.change} {'; '.join(run.invalid_reasons)}", flush=True)


def judge(folder: Path, names: list[str], as_json: Path | None) -> None:
    """Predict each changed run from the base run, and print how far off that was."""
    rows: list[dict[str, Any]] = []
    for server in (one for one in SERVERS if one.name in names):
        base = folder / f"{server.name}-0"
        for number, setting in enumerate(server.settings, 1):
            place = folder / f"{server.name}-{number}"
            if base.exists() and place.exists():
                rows += _judged(server, setting, base, place)
    for figure in FIGURES:
        errors = [abs(row["error"]) for row in rows if row["figure"] == figure]
        held = [row["held"] for row in rows if row["figure"] == figure]
        if errors:
            print(
                f"{figure}: median absolute error {statistics.median(errors):.1%}, "
                f"largest {max(errors):.1%}, interval holds {sum(map(bool, held))} of {len(held)}"
            )
    if as_json:
        as_json.write_text(json.dumps(rows, indent=1))


def _judged(server: Server, setting: Setting, base: Path, place: Path) -> list[dict[str, Any]]:
    change = setting.change
    if "{}" in change:
        change = change.format(f"{_stage_change(base, place) * 100:+.1f}%")
    said = predict(base, [change], planned(base))
    real = build_report(place)
    assert real.client.latency is not None
    truth = {
        "p50_ms": real.client.latency.p50_ms,
        "p99_ms": real.client.latency.p99_ms,
        "throughput_per_s": real.client.achieved_rate_per_s,
    }
    (found,) = said.predictions
    rows: list[dict[str, Any]] = []
    shown = f"{server.name:8} {change:26}" + ("" if said.agrees else " (no confidence)")
    for figure in FIGURES:
        one = getattr(found, figure)
        error = one.value / truth[figure] - 1
        held = one.low is not None and one.low <= truth[figure] <= one.high
        rows.append({
            "server": server.name, "change": change, "figure": figure, "predicted": one.value,
            "low": one.low, "high": one.high, "measured": truth[figure], "error": error,
            "held": held,
        })  # fmt: skip
        low, high = (one.low or 0.0, one.high or 0.0)
        shown += (
            f" | {figure[:3]} {one.value:6.1f} ({low:5.1f} to {high:5.1f})"
            f" real {truth[figure]:6.1f} {error:+6.1%}{' ' if held else '!'}"
        )
    print(shown, flush=True)
    return rows


def _stage_change(base: Path, place: Path) -> float:
    """Return by how much a batch of one took longer in `inference`: what the change really was."""
    from stagescope.analysis.sources import open_run, rows

    means: list[float] = []
    for folder in (base, place):
        tables = open_run(folder)
        found = rows(tables.batches.filter(tables.batches["size"] == 1).select("stages"))
        spent = [s["self_ns"] for row in found for s in row["stages"] if s["stage"] == "inference"]
        means.append(statistics.median(spent))
    return float(means[1] / means[0]) - 1


def main() -> None:
    """Drive or judge."""
    parser = argparse.ArgumentParser(description="Drive, or judge")
    parser.add_argument("what", choices=("drive", "judge"))
    parser.add_argument("folder", type=Path)
    names = [server.name for server in SERVERS]
    parser.add_argument("--server", nargs="*", choices=names, default=names)
    parser.add_argument("--setting", nargs="*", type=int, help="0: unchanged")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if asked.what == "drive":
        drive(asked.folder, asked.server, asked.setting)
    else:
        judge(asked.folder, asked.server, asked.json)


if __name__ == "__main__":
    main()
