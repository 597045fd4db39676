"""What a capture costs and sees on a real CUDA device: eager, CUDA graphs, prewarmed, left behind.

    python benchmarks/gpu_capture.py             prints one JSON object, a minute or two
    python benchmarks/gpu_capture.py --cpu       tries the script where there is no device

`gpu_check.py` calls `measure()`. Each case is a process of its own (`gpu_capture_served.py`), so
that a first start is a first start. Nothing here is a test: it reports, and judges nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from stagescope.agent.kernels.capture import (
    Capture,
    State,
    degraded_reason,
    recorded,
)
from stagescope.agent.kernels.rows import by_stage
from stagescope.errors import StagescopeError
from stagescope.kernels import CaptureRequest
from stagescope.recorder.spool import ring_files
from stagescope.testing import wait_until

SERVED = Path(__file__).with_name("gpu_capture_served.py")
SETTLE_S = 3.0
"""Served before the first capture, between captures, and after the last."""
SMALL = CaptureRequest(batches=2, seconds=20.0, max_events=10_000, force=True)
DEEP = CaptureRequest(batches=3, seconds=20.0, deep=True, force=True)


@dataclass(frozen=True, slots=True)
class Case:
    """One process, and the captures of it."""

    name: str
    mode: str
    wishes: tuple[CaptureRequest, ...]
    environment: tuple[tuple[str, str], ...] = ()
    settle_s: float = SETTLE_S


CASES = (
    Case("eager", "eager", (SMALL, SMALL, DEEP)),
    Case("eager, CUPTI left in place", "eager", (SMALL, SMALL, DEEP), (("TEARDOWN_CUPTI", "0"),)),
    Case("graphs", "graphs", (SMALL, SMALL, DEEP)),
    Case("graphs, prewarmed", "prewarmed", (SMALL, DEEP)),
)
TRIAL = Case("cpu", "cpu", (SMALL, DEEP), settle_s=0.3)


def measure(cases: tuple[Case, ...] = CASES) -> dict[str, Any]:
    """Run every case; give its figures by name, or why it failed."""
    return {case.name: _measured(case) for case in cases}


def _measured(case: Case) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        spool = Path(folder)
        with subprocess.Popen(
            [sys.executable, str(SERVED), folder, case.mode], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | dict(case.environment),
        ) as process:  # fmt: skip
            wait_until(lambda: ring_files(spool) or process.poll() is not None, 120)
            if process.poll() is not None:
                return {"failed": f"the served process ended with {process.returncode}"}
            time.sleep(case.settle_s)
            captures = []
            for wish in case.wishes:
                captures.append(_captured(ring_files(spool)[0], wish))
                time.sleep(case.settle_s)
            output, _ = process.communicate(timeout=60)
    batches: list[tuple[int, int, float]] = json.loads(output)["batches"]
    return _beside(batches, captures)


def _captured(ring: Path, wish: CaptureRequest) -> dict[str, Any]:
    """Run one capture; give what it told and saw."""
    capture = Capture(ring, wish)
    states: list[State] = []
    try:
        with closing(capture):
            states += capture.states()
        read = capture.read()
        _, table = recorded(read)
    except StagescopeError as problem:
        return {"failed": str(problem), "states": [state.name for state in states]}
    finally:
        capture.discard()
    began = {state.name: state.at_ns for state in reversed(states)}
    facts = read.facts
    return {
        "deep": wish.deep,
        "degraded": degraded_reason(read, table),
        "warming_s": (began["recording"] - began["warming"]) / 1e9,
        "stop_s": facts.stop_s,
        "save_s": facts.save_s,
        "ended_by": facts.ended_by,
        "batches": facts.batches,
        "events": len(read.events),
        "kernels": sum([row.launches for row in table.rows if row.kind == "kernel"]),
        "works": table.works,
        "told_by_time": table.by_time,
        "ambiguous": table.ambiguous,
        "nowhere": table.nowhere,
        "stages": [
            {
                "stage": head.stage, "device": head.device, "busy_ms": head.busy_ns / 1e6,
                "span_ms": head.span_ns / 1e6, "idle_ms": head.idle_ns / 1e6,
                "host_wait_ms": head.host_wait_ns / 1e6, "bound": head.bound,
                "launches": head.launches, "unmatched": head.unmatched,
                "longest": [row.name for row in rows[:3]],
            }
            for head, rows in by_stage(table.rows)
        ],
        "profiled_since_ns": facts.profiled_since_ns,
        "since_ns": facts.since_ns,
        "until_ns": facts.until_ns,
        "profiled_until_ns": facts.profiled_until_ns,
    }  # fmt: skip


def _beside(
    batches: list[tuple[int, int, float]], captures: list[dict[str, Any]]
) -> dict[str, Any]:
    """Lay the captures beside what the batches took; what is left behind is in `after`."""
    for one in captures:
        if "failed" in one:
            continue
        profiled = [
            took
            for start, took, _ in batches
            if start < one["profiled_until_ns"] and start + took > one["profiled_since_ns"]
        ]
        window = [b for b in batches if one["since_ns"] <= b[0] < one["until_ns"]]
        one["longest_batch_ms"] = max(profiled, default=0) / 1e6
        one["recorded_batch_ms"] = _median_ms([took for _, took, _ in window])
        one["recorded_device_ms"] = sum([device for _, _, device in window])
        """By events around the model; beside it `busy_ms` of `inference`, which is of kernels."""
    edges = [one for one in captures if "failed" not in one]
    first = min([one["profiled_since_ns"] for one in edges], default=1 << 63)
    last = max([one["profiled_until_ns"] for one in edges], default=0)
    warm = batches[0][0] + int(1e9) if batches else 0
    before = [took for start, took, _ in batches if warm < start and start + took < first]
    after = [took for start, took, _ in batches if start > last]
    return {
        "batches": len(batches),
        "before_ms": _median_ms(before),
        "after_ms": _median_ms(after),
        "left_behind": median(after) / median(before) - 1 if before and after else None,
        "captures": captures,
    }


def _median_ms(took_ns: list[int]) -> float | None:
    return median(took_ns) / 1e6 if took_ns else None


def main(words: list[str]) -> int:
    """Print the figures; say so where there is no device."""
    try:
        import torch
    except ImportError:
        print(
            "gpu_capture: this needs torch with CUDA, and torch is not installed", file=sys.stderr
        )
        return 1
    if words == ["--cpu"]:
        print(json.dumps({"device": "cpu", **measure((TRIAL,))}, indent=2))
        return 0
    if not torch.cuda.is_available():
        print("gpu_capture: torch sees no CUDA device here, so there is nothing to measure",
              file=sys.stderr)  # fmt: skip
        return 1
    print(json.dumps({"device": torch.cuda.get_device_name(), **measure()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
