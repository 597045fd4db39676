"""The host sampler on real processes: burning, growing, forked, killed while it watches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from stagescope.agent.collectors import Collector
from stagescope.agent.drain import Drain
from stagescope.agent.host import memory
from stagescope.agent.host.sampler import HostSampler
from stagescope.agent.loop import Agent
from stagescope.agent.samplers import chosen
from stagescope.agent.store.samples import SampleStore
from stagescope.sample_names import SAMPLE_NAMES
from stagescope.samples import AMOUNT, Sample
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool

KINDS = {name.name: name.kind for name in SAMPLE_NAMES}

CHILD = """
import os, sys, threading, time
from pathlib import Path
from stagescope.middleware.recording.file import create_recorder_file

recorder = create_recorder_file(Path(sys.argv[1]), "test", ring_slots=64)
held = []
for line in sys.stdin:
    word, number = line.split()
    if word == "burn":
        end = time.process_time() + float(number)
        while time.process_time() < end:
            pass
    if word == "grow":
        held.append(bytearray(os.urandom(1 << 20) * int(number)))
    if word == "switch":  # in a thread of its own, which stays
        def sleep():
            for _ in range(int(number)):
                time.sleep(0.0001)
            print("done", flush=True)
            time.sleep(1000)
        threading.Thread(target=sleep, daemon=True).start()
        continue
    if word == "open":
        held += [open(os.devnull) for _ in range(int(number))]
    if word == "fork":
        ready, tell = os.pipe()
        if not os.fork():
            end = time.process_time() + float(number)
            while time.process_time() < end:
                pass
            os.write(tell, b".")
            time.sleep(1000)
        os.read(ready, 1)
    print("done", flush=True)
"""


class Worker:
    """A process with a recorder file, which does as it is told."""

    def __init__(self, spool: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(spool)],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.pid = self.process.pid
        self.do("open", 1)  # also: it is up

    def do(self, word: str, number: float) -> None:
        """Have it do something, and be done with it."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{word} {number}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def close(self) -> None:
        """End it, and its children."""
        family = psutil.Process(self.pid).children() if self.process.poll() is None else []
        for child in family:
            child.kill()
        self.process.kill()
        self.process.communicate()
        psutil.wait_procs(family, timeout=5)


class Watching:
    """A sampler of the processes of a spool, and what it has found."""

    def __init__(self, spool: Path) -> None:
        self.store = SampleStore()
        self._drain = Drain(spool, {})
        self._sampler = HostSampler(self._drain.alive, self.store.add)

    def collect(self) -> None:
        """Read everything once more."""
        self._drain.discover()
        self._sampler.collect()

    def find(self, name: str, pid: int = 0, detail: str | None = None) -> list[Sample]:
        """Return the samples of a name found so far, in the order of their times."""
        found = [
            sample
            for sample in self.store.between(0, 1 << 62)
            if (sample.name, sample.pid) == (name, pid) and detail in (None, sample.detail)
        ]
        return sorted(found, key=lambda sample: sample.end_ns)

    def close(self) -> None:
        """End it."""
        self._sampler.close()
        self._drain.close()


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as folder:
        yield folder


@pytest.fixture
def worker(spool: Path) -> Iterator[Worker]:
    """One process that serves."""
    with closing(Worker(spool)) as process:
        yield process


@pytest.fixture
def watching(spool: Path) -> Iterator[Watching]:
    """A sampler on the spool."""
    with closing(Watching(spool)) as sampler:
        yield sampler


def test_cpu_that_a_process_burns_is_its_own(worker: Worker, watching: Watching) -> None:
    """Half a second of computing is half a second of user time, from one reading to the next."""
    watching.collect()
    worker.do("burn", 0.5)
    watching.collect()

    (user,) = watching.find("process.cpu.time", worker.pid, "user")
    (system,) = watching.find("process.cpu.time", worker.pid, "system")
    assert 0.45 <= user.value + system.value <= 1.5
    assert (user.end_ns - user.start_ns) / 1e9 >= 0.45


def test_memory_that_a_process_takes_is_seen(worker: Worker, watching: Watching) -> None:
    """64 MiB more in use are 64 MiB more resident, and the page faults that it took."""
    watching.collect()
    worker.do("grow", 64)
    watching.collect()

    before, after = watching.find("process.memory.usage", worker.pid)
    (faults,) = watching.find("process.paging.faults", worker.pid, "minor")
    assert 60 << 20 <= after.value - before.value <= 100 << 20
    assert faults.value > 0


def test_open_files_are_counted(worker: Worker, watching: Watching) -> None:
    """Ten files more are ten descriptors more."""
    for _ in range(10):  # Where counting takes long, only one reading in ten has it.
        watching.collect()
    worker.do("open", 10)
    for _ in range(10):
        watching.collect()

    found = watching.find("process.unix.file_descriptor.count", worker.pid)
    assert found[-1].value == found[0].value + 10


def test_context_switches_are_those_of_all_threads(worker: Worker, watching: Watching) -> None:
    """A thread that sleeps 300 times gave up its core 300 times, while the main thread waited."""
    for _ in range(10):
        watching.collect()
    worker.do("switch", 300)
    for _ in range(10):
        watching.collect()

    assert watching.find("process.thread.count", worker.pid)[-1].value == 2
    switches = watching.find("process.context_switches", worker.pid, "voluntary")
    assert sum(sample.value for sample in switches) >= 300


def test_a_killed_process_is_absent(spool: Path, worker: Worker, watching: Watching) -> None:
    """From a kill on there is nothing of the process, and of the one beside it there is."""
    with closing(Worker(spool)) as other:
        watching.collect()
        worker.close()
        watching.collect()
        watching.collect()

        assert len(watching.find("process.memory.usage", worker.pid)) == 1
        assert len(watching.find("process.memory.usage", other.pid)) == 3
        assert watching.find("process.cpu.time", worker.pid) == []


def test_children_without_records_are_told_with_whom_they_work_for(
    worker: Worker, watching: Watching
) -> None:
    """What a forked child burns is told as its own, and that it is the server's child."""
    worker.do("fork", 0.2)
    (child,) = psutil.Process(worker.pid).children()
    watching.collect()

    (works_for,) = watching.find("stagescope.process.works_for", child.pid)
    assert works_for.detail == str(worker.pid)
    assert len(watching.find("process.memory.usage", child.pid)) == 1


def test_two_recorder_files_of_one_process_are_one_process(
    spool: Path, worker: Worker, watching: Watching
) -> None:
    """Each pid is read once, whatever number of recorder files name it."""
    (ring,) = spool.glob("*.ring")
    os.link(ring, spool / f"{worker.pid}-again.ring")
    watching.collect()

    assert len(watching.find("process.memory.usage", worker.pid)) == 1


def test_proportional_memory_is_read_once_a_minute(
    worker: Worker, watching: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PSS and USS are below what is resident; they are read on a thread, with its cost told."""
    monkeypatch.setattr(memory, "FIRST_NS", 0)

    def read_once() -> list[Sample]:
        watching.collect()
        return watching.find("stagescope.process.memory.pss", worker.pid)

    (pss,) = wait_until(read_once)
    watching.collect()
    assert len(read_once()) == 1

    (uss,) = watching.find("stagescope.process.memory.uss", worker.pid)
    resident = watching.find("process.memory.usage", worker.pid)[-1]
    (cost,) = watching.find("stagescope.collector.cpu_time", detail="host.memory")
    assert 0 < uss.value <= pss.value <= resident.value * 1.1
    assert 0 < cost.value < 1


def test_the_host_is_told(worker: Worker, watching: Watching) -> None:
    """Cores, memory and load of the host are sane, and add up over the stretch."""
    watching.collect()
    worker.do("burn", 0.3)
    watching.collect()

    (busy,) = watching.find("system.cpu.utilization")
    used = watching.find("system.memory.usage", detail="used")[-1]
    available = watching.find("system.memory.linux.available")[-1]
    limit = watching.find("system.memory.limit")[-1]
    modes = [s for s in watching.find("system.cpu.time") if s.detail != "idle"]
    assert 0 < busy.value <= 1
    assert used.value + available.value == limit.value
    assert sum(sample.value for sample in modes) >= 0.2


def test_all_that_is_sampled_has_a_published_name(
    worker: Worker, watching: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name without an entry; an amount is of a stretch of time, and never below zero."""
    monkeypatch.setattr(memory, "FIRST_NS", 0)
    for _ in range(21):
        watching.collect()
    wait_until(lambda: watching.find("stagescope.collector.cpu_time"))

    found = list(watching.store.between(0, 1 << 62))
    assert {sample.name for sample in found} <= KINDS.keys()
    for sample in found:
        assert sample.start_ns <= sample.end_ns
        if KINDS[sample.name] == AMOUNT:
            assert sample.start_ns < sample.end_ns
            assert sample.value >= 0


def test_an_agent_samples_who_serves(spool: Path, worker: Worker) -> None:
    """Chosen by its name, the sampler puts into the agent's evidence, and its cost is counted."""
    agent = Agent(spool, {}, samplers=chosen("host"))
    try:
        agent.step()
        agent.hurry()
        agent.step()
        found = list(agent.evidence.samples.between(0, 1 << 62))
        assert worker.pid in {sample.pid for sample in found}
        assert agent.counters()["collector_host_calls"] == 2
        assert agent.counters()["faults"] == 0
    finally:
        agent.close()


def test_twenty_starts_leave_no_file_open(spool: Path, worker: Worker) -> None:
    """A sampler that was closed holds nothing: no descriptor, no thread."""
    before = psutil.Process().num_fds()
    for _ in range(20):
        with closing(Watching(spool)) as sampler:
            sampler.collect()

    assert psutil.Process().num_fds() == before


def test_the_sampler_is_a_collector(watching: Watching) -> None:
    """It has what the loop asks of a collector."""
    collector: Collector = watching._sampler

    assert (collector.name, collector.period_s) == ("host", 1.0)
