"""Recordings of a probe, and their replay."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from stagescope.agent.gpu.probe import XID, Device, DeviceEvent
from stagescope.agent.gpu.replay import (
    HEAD,
    RecordedProbe,
    Recording,
    ReplayProbe,
    begin_recording,
    read_recording,
)
from stagescope.errors import UsageError
from stagescope.samples import Sample
from stagescope.testing.clock import HandClock

SECOND = 1_000_000_000
DEVICE = Device("GPU-1", "H0", "NVIDIA", 0, 80)
SAMPLES = (
    Sample("hw.power", 0, SECOND, 300.0, device="GPU-1"),
    Sample("hw.power", SECOND, 2 * SECOND, 310.0, device="GPU-1"),
)
EVENT = DeviceEvent(SECOND // 2, "GPU-1", XID, "79")


def replay(clock: Callable[[], int]) -> ReplayProbe:
    """A replay of two seconds."""
    return ReplayProbe(Recording((DEVICE,), SAMPLES, (EVENT,)), clock)


def test_samples_come_when_their_time_has(tmp_path: Path) -> None:
    """Each is given once, at its time since the beginning, round after round."""
    clock = HandClock()
    probe = replay(clock)
    begun = clock()
    assert probe.poll("fast") == []
    clock.tick(SECOND)
    assert [(one.start_ns - begun, one.value) for one in probe.poll("fast")] == [(0, 300.0)]
    assert probe.poll("fast") == probe.poll("slow") == []
    clock.tick(2 * SECOND)
    assert [((one.end_ns - begun) // SECOND, one.value) for one in probe.poll("fast")] == [
        (2, 310.0),
        (3, 300.0),
    ]


def test_events_come_when_their_time_has() -> None:
    """They too, round after round."""
    clock = HandClock()
    probe = replay(clock)
    begun = clock()
    clock.tick(3 * SECOND)
    told = list(islice(probe.events(), 2))
    assert [(one.at_ns - begun, one.detail) for one in told] == [
        (SECOND // 2, "79"),
        (5 * SECOND // 2, "79"),
    ]


def test_what_is_recorded_is_replayed(tmp_path: Path) -> None:
    """The file holds all that the probe gave, and its devices are marked as a replay's."""
    clock = HandClock()
    path = tmp_path / "gpu.ndjson"
    probe = RecordedProbe(replay(clock), path, begin_recording(path, clock))
    clock.tick(2 * SECOND)
    probe.poll("fast")
    next(iter(probe.events()))
    probe.close()
    recording = read_recording(path)
    assert recording.samples == SAMPLES
    assert recording.events == (EVENT,)
    (device,) = recording.devices
    assert (device.id, device.name, device.vendor, device.replay) == ("GPU-1", "H0", "NVIDIA", True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        ("{}", "line 1"),
        ('{"kind": "gpu-recording", "version": 9}', "version 1 begins with"),
        (json.dumps(HEAD) + '\n{"kind": "sample"}', "line 2"),
        (json.dumps(HEAD) + "\n[]", "line 2"),
        (json.dumps(HEAD) + "\nnot JSON", "line 2"),
    ],
)
def test_what_is_no_recording(tmp_path: Path, text: str, told: str) -> None:
    """One sentence names the file and the line."""
    path = tmp_path / "gpu.ndjson"
    path.write_text(text)
    with pytest.raises(UsageError, match=told) as caught:
        read_recording(path)
    assert str(path) in str(caught.value)


def test_a_recording_that_is_not_there(tmp_path: Path) -> None:
    """It is told, and so is one that cannot be written."""
    with pytest.raises(UsageError, match="cannot be read"):
        read_recording(tmp_path / "none")
    with pytest.raises(UsageError, match="cannot be written"):
        begin_recording(tmp_path / "none" / "gpu.ndjson")
