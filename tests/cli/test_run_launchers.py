"""`stagescope run` and another launcher that works by a `sitecustomize` on PYTHONPATH too."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.records import RequestRecord
from stagescope.testing import wait_until
from stagescope.testing.spool import Spool, short_spool
from tests.support.commands import Running, ask, run_command

APP = """
import os
import sys

from opentelemetry import trace

async def app(scope, receive, send):
    if scope["type"] == "http":
        provider = type(trace.get_tracer_provider()).__name__
        print("provider", provider, "theirs", os.environ.get("THEIRS"), flush=True)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"here"})
"""
LAUNCHER = """
import os
import subprocess
import sys

path = os.environ.get("PYTHONPATH", "")
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.join(os.getcwd(), "theirs"), path])
{start}
"""
THEIRS = """
import os

# Like OpenTelemetry's: it puts its own folder first again, and runs no other sitecustomize.
here = os.path.dirname(os.path.abspath(__file__))
rest = [entry for entry in os.environ["PYTHONPATH"].split(os.pathsep) if entry != here]
os.environ["PYTHONPATH"] = os.pathsep.join([here, *rest])
os.environ["THEIRS"] = "ran"
"""
STARTS = {
    "execl": "os.execl(sys.argv[1], *sys.argv[1:])",
    "execvp": "os.execvp(sys.argv[1], sys.argv[1:])",
    "execve": "os.execve(sys.argv[1], sys.argv[1:], dict(os.environ))",
    "execvpe": "os.execvpe(sys.argv[1], sys.argv[1:], os.environ)",
}
INSTRUMENT = [str(Path(sys.executable).with_name("opentelemetry-instrument"))]
QUIET = {
    "OTEL_TRACES_EXPORTER": "none",
    "OTEL_METRICS_EXPORTER": "none",
    "OTEL_LOGS_EXPORTER": "none",
}
UVICORN = [sys.executable, "-m", "uvicorn", "--port", "0", "--lifespan", "off", "plain:app"]
TRACES = [f"{number:032x}" for number in range(1, 11)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an app that says which other instruments it runs under."""
    (tmp_path / "plain.py").write_text(APP)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "sitecustomize.py").write_text(THEIRS)
    return tmp_path


@pytest.fixture
def spool() -> Iterator[Path]:
    """A spool of the test's own."""
    with short_spool() as made:
        yield made


def ask_all(running: Running, spool: Path) -> list[str]:
    """Send a request for each trace, and return the traces that were recorded."""
    port = running.port()
    for trace in TRACES:
        assert ask(port, trace) == 200
    reader = Spool(spool)
    try:
        wait_until(lambda: len(requests(reader)) >= len(TRACES), 20)
        return sorted(record.trace_id for record in requests(reader))
    finally:
        reader.close()


def requests(reader: Spool) -> list[RequestRecord]:
    """Return the requests recorded so far."""
    return [record for record in reader.records() if isinstance(record, RequestRecord)]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_opentelemetry_instrument_under_run(folder: Path, spool: Path, workers: str) -> None:
    """Every request is recorded, in workers that a process spawns too, and the app has its SDK."""
    with run_command(
        folder, "--no-agent", "--spool", str(spool), "--", *INSTRUMENT, *UVICORN,
        "--workers", workers, environment=QUIET,
    ) as running:  # fmt: skip
        assert ask_all(running, spool) == TRACES, running.text()
    assert running.text().count("provider TracerProvider") == len(TRACES), running.text()


@pytest.mark.parametrize("start", STARTS)
def test_a_launcher_that_puts_its_folder_before_ours(folder: Path, spool: Path, start: str) -> None:
    """However it becomes the server, both run: its sitecustomize and ours."""
    (folder / "launcher.py").write_text(LAUNCHER.format(start=STARTS[start]))
    launcher = [sys.executable, "launcher.py"]
    with run_command(
        folder, "--no-agent", "--spool", str(spool), "--", *launcher, *UVICORN
    ) as running:
        assert ask_all(running, spool) == TRACES, running.text()
    assert running.text().count("theirs ran") == len(TRACES), running.text()
