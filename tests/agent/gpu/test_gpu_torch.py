"""Accelerators as torch tells of them, asked of a served process through its real probe."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stagescope.agent.gpu.torch import TorchProbe
from stagescope.agent.probe import ask, probe_of
from stagescope.recorder.reader import RecorderReader
from stagescope.records import Process
from stagescope.testing.spool import short_spool

GIB = 1 << 30
Serve = Callable[[str], tuple[Path, Process]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a served process with torch in it; returns its recorder file and who it is."""
    started: list[subprocess.Popen[str]] = []
    with short_spool() as spool:

        def start(how: str) -> tuple[Path, Process]:
            process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("accelerated.py")), str(spool), how],
                env=os.environ | {"STAGESCOPE_AGENT": "off"},
                text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
            started.append(process)
            assert process.stdout is not None
            ring = Path(process.stdout.readline().strip())
            reader = RecorderReader(ring)
            who = reader.process
            reader.close()
            return ring, who

        yield start
        for process in started:
            process.kill()
            process.communicate()


def test_a_process_with_accelerators(serve: Serve) -> None:
    """Devices, their memory, and what the process has of it; what torch does not know is absent."""
    ring, process = serve("initialised")
    probe = TorchProbe(lambda: [(ring, process)])
    assert probe.poll("fast") == []  # who has not answered yet is asked at slow polls
    samples = probe.poll("slow")
    assert [(one.id, one.name, one.vendor, one.total_bytes) for one in probe.devices()] == [
        ("xpu:0", "Accelerator 0", "Intel", 64 * GIB),
        ("xpu:1", "Accelerator 1", "Intel", 64 * GIB),
    ]
    assert {(one.name, one.pid, one.value) for one in samples if one.device == "xpu:1"} == {
        ("hw.gpu.memory.usage", 0, 4 * GIB),
        ("hw.gpu.memory.limit", 0, 64 * GIB),
        ("model_server.gpu.process.memory", process.pid, 3 * GIB),
    }
    assert len(probe.poll("fast")) == 6
    assert probe.poll("slow") == []
    assert list(probe.events()) == []


@pytest.mark.parametrize("how", ["uninitialised", "plain"])
def test_a_process_that_has_not_touched_a_device(serve: Serve, how: str) -> None:
    """It has none, and asking does not initialise one: it may be about to fork."""
    ring, process = serve(how)
    assert ask(probe_of(ring), "torch", driver=True, timeout_s=30)["memory"] == []
    probe = TorchProbe(lambda: [(ring, process)])
    assert probe.poll("slow") == []
    assert probe.devices() == []


def test_a_process_that_is_gone(tmp_path: Path, serve: Serve) -> None:
    """Nobody answers: no samples, and no fault."""
    _, process = serve("plain")
    assert TorchProbe(lambda: [(tmp_path / "1-a.ring", process)]).poll("slow") == []
