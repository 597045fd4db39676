"""The sampler `torch`: real sockets, this process as the served one, a simulated device."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stagescope.agent.loop import Agent
from stagescope.agent.probe import Question, probe_of
from stagescope.agent.torch import TorchSampler, samples_between
from stagescope.middleware.probe.server import Probe, bind
from stagescope.middleware.stage import stage
from stagescope.middleware.torch import device_time
from stagescope.sample_names import SAMPLE_NAMES
from stagescope.samples import Sample
from stagescope.testing import wait_until
from stagescope.testing.clock import HandClock
from stagescope.testing.recording import Recording
from stagescope.testing.spool import short_spool
from tests.support.devices import UUID, Device, SimulatedTorch, allocator_stats, pinned_stats

GPU = f"GPU-{UUID.format(0)}"
FOREVER = 1 << 62


@pytest.fixture
def spool() -> Iterator[Path]:
    """A spool."""
    with short_spool() as folder:
        yield folder


@pytest.fixture
def recording(spool: Path) -> Iterator[Recording]:
    """This process as a served one, with a probe."""
    made = Recording(spool)
    probe = Probe(probe_of(made.path), made.recorder)
    yield made
    probe.stop()
    made.close()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A device that this process's torch uses."""
    made = Device(HandClock())
    made.stats, made.pinned = allocator_stats(1000, 3000, retries=2), pinned_stats(4096)
    monkeypatch.setitem(sys.modules, "torch", SimulatedTorch(made))
    yield made
    device_time.end()


@pytest.fixture
def agent(spool: Path) -> Iterator[Agent]:
    """An agent with this sampler alone; a test makes its steps."""
    made = Agent(spool, {}, samplers=lambda of: [TorchSampler(of)])
    yield made
    made.close()


def samples(agent: Agent, name: str) -> list[Sample]:
    """Let the agent work, and give all samples of *name*."""
    agent.hurry()
    agent.step()
    return [sample for sample in agent.evidence.samples.between(0, FOREVER) if sample.name == name]


def test_device_times_and_memory_come_as_samples(
    agent: Agent, recording: Recording, device: Device
) -> None:
    """By process, stage and device; what grew between two answers, and what stood at each."""
    wait_until(lambda: samples(agent, "model_server.torch.memory.reserved"))
    for _ in range(3):
        with recording.request(), stage("inference"):
            device.stream(0).launch(5_000_000)
        device.clock.tick(10_000_000)
    device.stats = allocator_stats(2000, 3000, retries=5)
    (time_, *_) = wait_until(lambda: samples(agent, "model_server.stage.device_time"))
    assert (time_.pid, time_.device, time_.detail) == (os.getpid(), GPU, "inference")
    assert time_.value == pytest.approx(0.010)  # the third one's end is not asked for yet
    assert time_.start_ns < time_.end_ns <= time.monotonic_ns()
    assert sum(one.value for one in samples(agent, "model_server.stage.device_timed")) == 2
    assert sum(one.value for one in samples(agent, "model_server.stage.device_opened")) == 3
    assert samples(agent, "model_server.torch.memory.allocated")[-1].value == 2000
    assert samples(agent, "model_server.torch.memory.fragmentation")[-1].value == pytest.approx(
        1 / 6
    )
    assert samples(agent, "model_server.torch.memory.rounding")[-1].value == 100
    assert samples(agent, "model_server.torch.pinned.allocated")[-1].value == 4096
    (retries,) = samples(agent, "model_server.torch.memory.events")
    assert (retries.detail, retries.value) == ("num_alloc_retries", 3)
    published = {name.name for name in SAMPLE_NAMES}
    assert {one.name for one in agent.evidence.samples.between(0, FOREVER)} <= published


def test_a_process_with_two_recorder_files_is_asked_once(
    agent: Agent, recording: Recording, device: Device, spool: Path
) -> None:
    """Both tell of the same device: a level is read once each time."""
    second = Recording(spool)
    probe = Probe(probe_of(second.path), second.recorder)
    found = wait_until(lambda: samples(agent, "model_server.torch.memory.reserved"))
    assert len(found) == 1
    probe.stop()
    second.close()


def test_a_process_without_a_device_is_asked_seldom(
    agent: Agent, recording: Recording, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is said of it."""
    monkeypatch.delitem(sys.modules, "torch")
    asked: list[object] = []

    class Noted(Question):
        def __init__(self, probe: Path, op: str) -> None:
            asked.append(op)
            super().__init__(probe, op)

    monkeypatch.setattr("stagescope.agent.torch.Question", Noted)
    for _ in range(40):  # twenty rounds
        assert not samples(agent, "model_server.torch.memory.reserved")
        time.sleep(0.01)  # as long as an answer takes
    assert 2 <= len(asked) <= 4


def test_a_busy_process_has_time_to_answer(agent: Agent, spool: Path) -> None:
    """One that takes the question and says nothing holds up nobody, and is given up in the end."""
    silent = Recording(spool)
    with socket.socket(socket.AF_UNIX) as listener:
        bind(listener, probe_of(silent.path))
        listener.listen()
        listener.setblocking(False)
        begun = time.monotonic()
        for _ in range(30):
            samples(agent, "")
        assert time.monotonic() - begun < 2
        connections = 0
        while True:
            try:
                listener.accept()[0].close()
            except BlockingIOError:
                break
            connections += 1
    assert 1 <= connections <= 3
    silent.close()


@pytest.mark.parametrize("said", [b"", b"no json\n", b"[1]\n", b'{"error": "a fault"}\n', b'{"a'])
def test_nonsense_is_no_answer(tmp_path: Path, said: bytes) -> None:
    """Whatever a process says, it is passed over."""
    path = tmp_path / "1.probe"
    with socket.socket(socket.AF_UNIX) as listener:
        bind(listener, path)
        listener.listen()
        question = Question(path, "torch")
        assert question.answer() is None
        connection, _ = listener.accept()
        with connection:
            connection.recv(100)
            connection.sendall(said)
            if not said.endswith(b"\n"):
                connection.close()
            if said != b'{"a':
                assert wait_until(lambda: question.answer() == {})
    question.close()
    assert Question(tmp_path / "none.probe", "torch").answer() == {}


def test_twenty_samplers_leave_nothing(agent: Agent, recording: Recording, device: Device) -> None:
    """However they end, no descriptor stays."""
    wait_until(lambda: samples(agent, "model_server.torch.memory.reserved"))
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        sampler = TorchSampler(agent)
        sampler.collect()
        sampler.close()
    assert wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)


def test_what_went_back_did_not_grow() -> None:
    """A count below the last one began anew: it gives no sample, never a negative one."""
    base: dict[str, Any] = {"memory": [], "pinned": None}
    one = {"stage": "inference", "device": GPU, "opened": 5, "timed": 5, "ns": 1_000}
    before = {"at_ns": 1, "times": {"stages": [one]}, **base}
    now = {"at_ns": 2, "times": {"stages": [one | {"ns": 10, "opened": 1, "timed": 1}]}, **base}
    assert samples_between(before, now, 7) == []
    assert samples_between(None, before, 7) == []
    assert samples_between(before, {"at_ns": 3, "times": None, **base}, 7) == []
