"""`benchmarks/overhead.py` runs and gives what docs/performance.md promises; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IN_PROCESS = {
    "bare", "stagescope-0", "stagescope-6", "stagescope-6-run", "otel-asgi-0", "otel-asgi-5",
    "fastapi-bare", "fastapi-stagescope-6", "fastapi-starlette-exporter", "fastapi-otel-asgi-5",
    "fastapi-otel-native-5", "apart-bare", "apart-hooks-0", "apart-hooks-6",
}  # fmt: skip
UNDER_LOAD = {
    "bare", "agent-off", "agent-off-run", "agent-thread", "agent-process", "otel-otlp", "def-bare",
    "def-off", "def-off-run",
}  # fmt: skip


@pytest.mark.timeout(300)  # Ten servers start at once.
def test_quick_run_has_every_variant(tmp_path: Path) -> None:
    """A quick run measures all variants, and OpenTelemetry's make the spans they claim."""
    figures = tmp_path / "figures.json"
    script = str(ROOT / "benchmarks" / "overhead.py")
    command = [sys.executable, script, "--quick", "--json", str(figures)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())
    assert set(found) == {"machine", "plan", "in_process", "under_load"}
    inside = {line["variant"]: line for line in found["in_process"]}
    assert set(inside) == IN_PROCESS
    for variant, line in inside.items():
        assert line["cost"]["q1_us"] <= line["cost"]["median_us"] <= line["cost"]["q3_us"]
        assert (line["over_bare"] is None) == (variant == line["bare"])
        assert (line["spans_per_request"] > 0) == ("otel" in variant)
    # The server's span and the five, at least: nothing was dropped on the way.
    assert all(inside[v]["spans_per_request"] >= 6 for v in inside if v.endswith("otel-asgi-5"))
    loaded = {line["variant"]: line for line in found["under_load"]}
    assert set(loaded) == UNDER_LOAD
    for line in loaded.values():
        assert not line["absent"]
        assert line["requests"] > 0
        assert line["cost"]["median_us"] > 0
    assert loaded["agent-process"]["beside"] is not None
