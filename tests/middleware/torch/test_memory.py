"""Torch's memory: what its allocators say, snapshots on demand and where it runs out."""

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stagescope.agent.probe import ask, probe_of
from stagescope.errors import StagescopeError
from stagescope.middleware.probe.server import Probe, Refused
from stagescope.middleware.torch import device_time
from stagescope.middleware.torch import snapshot as snapshots
from stagescope.middleware.torch.memory import device_memory, pinned_memory, state
from stagescope.middleware.torch.snapshot import MOST_KEPT, watch_memory, write_snapshot
from stagescope.testing import wait_until
from stagescope.testing.clock import HandClock
from stagescope.testing.recording import Recording
from tests.support.devices import (
    UUID,
    Device,
    SimulatedTorch,
    allocator_stats,
    pinned_stats,
)

FRAME = {"filename": "model.py", "line": 7, "name": "forward" * 20}
BLOCK = {"size": 512, "state": "active_allocated", "frames": [FRAME | {"line": 1}]}


def snapshot(blocks: int = 1, entries: int = 1) -> dict[str, Any]:
    """What torch's `_snapshot` gives, of that size."""
    held = [BLOCK | {"address": n, "frames": [FRAME | {"line": n}]} for n in range(blocks)]
    trace = [{"action": "alloc", "addr": n, "frames": [FRAME]} for n in range(entries)]
    return {"segments": [{"frames": [FRAME], "blocks": held}], "device_traces": [trace]}


@pytest.fixture
def device() -> Device:
    """A device in use that holds something."""
    made = Device(HandClock())
    made.stats, made.pinned = allocator_stats(1000, 3000, retries=2), pinned_stats(4096)
    made.held = snapshot()
    return made


@pytest.fixture
def torch(device: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedTorch]:
    """The torch of this process."""
    made = SimulatedTorch(device)
    monkeypatch.setitem(sys.modules, "torch", made)
    yield made
    device_time.end()


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """A recorder file, so that there is a spool."""
    made = Recording(tmp_path)
    yield made
    made.close()


@pytest.fixture
def probe(recording: Recording) -> Iterator[Path]:
    """The path of a probe of this process."""
    path = probe_of(recording.path)
    made = Probe(path, recording.recorder)
    yield path
    made.stop()


def test_a_device_that_holds_something_is_told(device: Device) -> None:
    """Levels, peaks and counters of the first device; the second one was never used."""
    (memory,) = device_memory("cuda", device)
    assert memory == {
        "device": f"GPU-{UUID.format(0)}",
        "bytes": {"allocated": 1000, "active": 1000, "reserved": 3000, "inactive_split": 1000,
                  "requested": 900},
        "peak_bytes": {"allocated": 2000, "active": 2000, "reserved": 6000,
                       "inactive_split": 2000, "requested": 1800},
        "events": {"num_alloc_retries": 2, "num_ooms": 0, "num_sync_all_streams": 1,
                   "num_device_alloc": 7, "num_device_free": 3},
    }  # fmt: skip
    assert pinned_memory(device) == {
        "bytes": {"allocated": 4096, "active": 4096},
        "peak_bytes": {"allocated": 4096, "active": 4096},
        "events": {"num_host_alloc": 2, "num_host_free": 0},
        "time_us": {"alloc": 1500},
    }


def test_an_older_torch_tells_what_it_has(device: Device) -> None:
    """What a version does not count is absent, never 0."""
    del device.stats["requested_bytes"], device.stats["num_device_alloc"]
    del device.memory.host_memory_stats_as_nested_dict
    (memory,) = device_memory("cuda", device)
    assert "requested" not in memory["bytes"]
    assert "num_device_alloc" not in memory["events"]
    assert pinned_memory(device) is None


def test_the_probe_tells_times_and_memory(torch: SimulatedTorch, probe: Path) -> None:
    """One question gives all; torch is found among the loaded modules."""
    answer = ask(probe, "torch")
    assert (answer["state"], answer["kind"]) == ("in use", "cuda")
    assert answer["memory"][0]["bytes"]["reserved"] == 3000
    assert answer["times"]["stages"] == []
    assert ask(probe, "hello")["device"] == "in use"


def test_an_allocator_that_tells_nothing_is_said(torch: SimulatedTorch, probe: Path) -> None:
    """Device times are told all the same."""

    def refuse(index: int) -> None:
        raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats")

    torch.cuda.memory.memory_stats_as_nested_dict = refuse
    answer = ask(probe, "torch")
    assert answer["memory"] == []
    assert "getDeviceStats" in answer["why_no_memory"]
    assert answer["times"] is not None


def test_who_has_no_device_is_told(
    torch: SimulatedTorch, probe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is not in use yet, a build without any, no torch at all."""
    torch.cuda.initialized = False
    assert ask(probe, "torch")["state"] == "waiting"
    torch.version.cuda = None
    assert ask(probe, "torch")["state"] == "none"
    monkeypatch.delitem(sys.modules, "torch")
    assert ask(probe, "torch")["state"] == "none"
    assert state(SimpleNamespace()) == "none"
    with pytest.raises(StagescopeError, match="torch uses no device in this process"):
        ask(probe, "memory_snapshot")


def test_a_snapshot_that_cannot_be_taken_is_one_sentence(
    torch: SimulatedTorch, probe: Path
) -> None:
    """A folder that is a file, an allocator without snapshots, a kind of device without any."""
    (probe.parent / "snapshots").write_text("")
    with pytest.raises(StagescopeError, match=r"no memory snapshot: .*File exists"):
        ask(probe, "memory_snapshot")

    def refuse() -> None:
        raise RuntimeError("does not yet support snapshot")

    torch.cuda.memory._snapshot = refuse
    with pytest.raises(StagescopeError, match="no memory snapshot: does not yet support"):
        ask(probe, "memory_snapshot")
    del torch.cuda.memory._snapshot
    with pytest.raises(StagescopeError, match="torch gives no memory snapshots of cuda"):
        ask(probe, "memory_snapshot")


def test_a_snapshot_is_taken_on_demand(torch: SimulatedTorch, probe: Path) -> None:
    """It lies in the spool, for its owner alone, and is what torch's own dump would be."""
    answer = ask(probe, "memory_snapshot")
    path = Path(answer["path"])
    assert path.parent == probe.parent / "snapshots"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == answer["bytes"]
    assert pickle.loads(path.read_bytes()) == snapshot()
    assert answer["left_out"] == ""
    for _ in range(2 * MOST_KEPT):
        ask(probe, "memory_snapshot")
    assert len(list(path.parent.iterdir())) == MOST_KEPT


def test_a_snapshot_is_bounded(tmp_path: Path) -> None:
    """The history goes first, then the stacks; what is too large even so is refused, and no file
    is left."""
    large = snapshot(blocks=300, entries=3000)
    path, left_out = write_snapshot(large, tmp_path, 1, max_bytes=len(pickle.dumps(large)) - 1)
    assert left_out == "history"
    shorter = large | {"device_traces": [[]]}
    assert pickle.loads(path.read_bytes()) == shorter
    path, left_out = write_snapshot(large, tmp_path, 2, max_bytes=len(pickle.dumps(shorter)) - 1)
    assert left_out == "history and stacks"
    (segment,) = pickle.loads(path.read_bytes())["segments"]
    assert len(segment["blocks"]) == 300
    with pytest.raises(Refused, match=r"no room for a memory snapshot in .*over 100 bytes"):
        write_snapshot(large, tmp_path, 3, max_bytes=100)
    assert len(list((tmp_path / "snapshots").iterdir())) == 2


def test_running_out_of_memory_leaves_a_snapshot_and_a_notice(
    torch: SimulatedTorch, recording: Recording, tmp_path: Path
) -> None:
    """One a minute, however often it happens; it is watched once, however often it is asked for."""
    for _ in range(3):
        watch_memory(torch, "cuda", torch.cuda, recording.recorder)
    assert len(torch.oom_observers) == 1
    for _ in range(10):
        torch.run_out_of_memory()
    (notice,) = wait_until(lambda: list((tmp_path / "notices").glob("*.json")))
    told = json.loads(notice.read_text())
    assert (told["kind"], told["device"], told["asked_bytes"]) == ("oom", 0, 1 << 30)
    assert (told["total_bytes"], told["free_bytes"]) == (2 << 30, 4096)
    assert pickle.loads(Path(told["path"]).read_bytes()) == snapshot()
    assert not torch.cuda.history


def test_a_spool_without_room_still_gets_the_notice(
    torch: SimulatedTorch, recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says why there is no snapshot."""
    monkeypatch.setattr(snapshots, "SPARE_BYTES", 1 << 60)
    watch_memory(torch, "cuda", torch.cuda, recording.recorder)
    torch.run_out_of_memory()
    (notice,) = wait_until(lambda: list((tmp_path / "notices").glob("*.json")))
    told = json.loads(notice.read_text())
    assert told["path"] == ""
    assert "no room for a memory snapshot" in told["why_no_path"]


def test_history_is_kept_where_it_is_asked_for(
    torch: SimulatedTorch, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With bounds: torch's own defaults have none."""
    monkeypatch.setenv("STAGESCOPE_MEMORY_HISTORY", "1")
    watch_memory(torch, "cuda", torch.cuda, recording.recorder)
    assert torch.cuda.history == {
        "enabled": "all", "context": "alloc", "stacks": "python", "max_entries": 100_000,
    }  # fmt: skip


def test_an_allocator_that_cannot_be_watched_harms_nobody(
    torch: SimulatedTorch, recording: Recording
) -> None:
    """It is said, and not tried again."""
    tries = []

    def refuse(observer: object) -> None:
        tries.append(observer)
        raise RuntimeError("does not yet support attachOutOfMemoryObserver")

    torch._C._cuda_attach_out_of_memory_observer = refuse
    for _ in range(2):
        watch_memory(torch, "cuda", torch.cuda, recording.recorder)
    assert len(tries) == 1
