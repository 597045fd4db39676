"""The collector `kernels`: micro-captures of a real server, and what people captured."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.agent.kernels.capture import FOLDER, KEPT
from stagescope.agent.kernels.micro_captures import MICRO, KernelCaptures, request_for
from stagescope.agent.kernels.rows import ROWS_NAME, Recorded, read_rows, row, write_rows
from stagescope.agent.kernels.trace import CaptureFacts
from stagescope.agent.store.telemetry import TelemetryBuffer
from stagescope.errors import StagescopeError
from stagescope.recorder.reader import RecorderReader
from stagescope.records import Process
from stagescope.testing import wait_until
from tests.support.torch_served import TorchServed, torch_served

FACTS = CaptureFacts(
    "c1", 7, "2.13", False, True, 1_000, 2_000, 3_000, 4_000, 2, "batches", 0.01, 0.02
)
ROWS = (row(FACTS, "inference", "stage", "", "cpu", 3, 500, span_ns=900, idle_ns=400),)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServed]:
    """A real server."""
    with torch_served(tmp_path_factory.mktemp("served")) as server:
        yield server


def alive(served: TorchServed) -> list[tuple[Path, Process]]:
    """What an agent knows of it."""
    with RecorderReader(served.ring) as reader:
        return [(served.ring, reader.process)]


def test_two_batches_now_and_then(served: TorchServed) -> None:
    """A micro-capture's rows and its stretch are evidence, and nothing stays in the spool."""
    evidence = TelemetryBuffer()
    collector = KernelCaptures(
        served.spool, lambda: alive(served), evidence,
        micro=request_for("micro", device=False), every_s=0.0,
    )  # fmt: skip
    with served.load():
        collector.collect()
        wait_until(lambda: evidence.kernels.between(0, 2**63), 30)
        collector.close()

    rows = evidence.kernels.between(0, 2**63)
    assert {row.pid for row in rows} == {served.process.pid}
    assert "inference" in {row.stage for row in rows}
    (sample,) = evidence.samples.between(0, 2**63)
    assert (sample.name, sample.pid, sample.detail) == (
        "stagescope.capture.recording", served.process.pid, rows[0].capture_id
    )  # fmt: skip
    assert sample.value == pytest.approx((sample.end_ns - sample.start_ns) / 1e9)
    wait_until(lambda: os.listdir(served.spool / FOLDER) == [])


def test_a_triggers_capture_keeps_its_trace(served: TorchServed) -> None:
    """Beside what the trigger has put there already; the newest eight stay."""
    evidence = TelemetryBuffer()
    collector = KernelCaptures(served.spool, list, evidence, micro=None)
    folders = served.spool / FOLDER
    for number in range(KEPT + 2):
        old = folders / f"2001010{number}"
        old.mkdir(parents=True)
        (old / "trace.json").touch()
    ring, process = alive(served)[0]
    with served.load():
        capture_id = collector.start(ring, process, "slow")
        assert capture_id
        (folders / capture_id).mkdir(exist_ok=True)
        (folders / capture_id / "reason.json").write_text("{}")
        wait_until(lambda: evidence.kernels.between(0, 2**63), 30)
        wait_until(lambda: not _running(), 10)
        collector.close()

    assert {"reason.json", "trace.json"} == set(os.listdir(folders / capture_id))
    assert len(os.listdir(folders)) == KEPT + 1  # the oldest went when this one began
    shutil.rmtree(folders)


def _running() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "stagescope-kernels"]


def test_one_under_way_ends_with_the_agent(served: TorchServed) -> None:
    """Closed in the midst of it, no thread stays, and the server can be captured again."""
    evidence = TelemetryBuffer()
    collector = KernelCaptures(
        served.spool, lambda: alive(served), evidence, micro=None, every_s=0.0
    )
    ring, process = alive(served)[0]
    assert collector.start(ring, process, "slow")  # no traffic: it waits
    assert collector.start(ring, process, "slow") is None
    collector.close()

    assert not _running()
    assert not evidence.kernels.between(0, 2**63)


def test_the_governor_is_asked(served: TorchServed) -> None:
    """Where it does not allow them there are none."""
    asked: list[str] = []

    def never(what: str) -> bool:
        asked.append(what)
        return False

    collector = KernelCaptures(
        served.spool,
        lambda: alive(served),
        TelemetryBuffer(),
        micro=MICRO,
        allowed=never,
        every_s=0.0,
    )
    collector.collect()
    collector.close()
    assert asked == ["micro-capture"]
    assert not _running()


def test_what_people_captured_is_taken_up_once(tmp_path: Path) -> None:
    """Rows and stretch become evidence, the folder goes; a torn one goes too."""
    for name in ("good", "torn"):
        (tmp_path / FOLDER / name).mkdir(parents=True)
    write_rows(tmp_path / FOLDER / "good", Recorded(FACTS, ROWS))
    (tmp_path / FOLDER / "torn" / ROWS_NAME).write_text('{"capture_id": "x"')
    evidence = TelemetryBuffer()
    collector = KernelCaptures(tmp_path, list, evidence, micro=None)
    collector.collect()
    collector.collect()

    assert evidence.kernels.between(0, 2**63) == list(ROWS)
    assert [sample.detail for sample in evidence.samples.between(0, 2**63)] == ["c1"]
    assert os.listdir(tmp_path / FOLDER) == []


def test_rows_travel_whole(tmp_path: Path) -> None:
    """What was written is read; another version's is a sentence."""
    write_rows(tmp_path, Recorded(FACTS, ROWS))
    assert read_rows(tmp_path / ROWS_NAME) == Recorded(FACTS, ROWS)
    (tmp_path / ROWS_NAME).write_text('{"newer": 1}\n')
    with pytest.raises(StagescopeError, match="cannot be read"):
        read_rows(tmp_path / ROWS_NAME)


def test_when_there_are_micro_captures() -> None:
    """Unset: where there is a device, and only of processes that use it; asked for: anywhere."""
    assert request_for("", device=False) is None
    assert request_for("off", device=True) is None
    on_device, anywhere = request_for("", device=True), request_for("micro", device=False)
    assert on_device
    assert on_device.device_only
    assert anywhere
    assert not anywhere.device_only
