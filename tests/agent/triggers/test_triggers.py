"""Triggers: a real agent, real recorder files; what is noticed starts one look, and no flood."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.agent.events import KINDS, LOOP_LAG, OOM, SLOW, THROTTLE, XID, EventQueue, Notice
from stagescope.agent.loop import Agent
from stagescope.agent.stacks import loop_watchdog
from stagescope.agent.triggers.sources import AT_LEAST, CgroupOom, NoticeFiles, SlowWatch
from stagescope.agent.triggers.triggers import (
    MIN_GAP_S,
    MOST,
    MOST_AN_HOUR,
    Reason,
    Settings,
    TriggerLimits,
    Triggers,
    keep_reason,
    make,
    settings,
)
from stagescope.records import Process, State
from stagescope.stages import StageStall
from stagescope.testing import wait_until
from stagescope.testing.clock import HandClock
from stagescope.testing.records import PROCESS, request_record
from stagescope.testing.spool import short_spool
from tests.support.rings import RingWriter, write_ring

S = 10**9

BLOCKED = """
import asyncio, pathlib, sys, time
from stagescope.middleware.process import process_recorder
from stagescope.middleware.runtime.pauses import watch

def the_culprit():
    time.sleep(30)

async def main():
    watch(process_recorder(pathlib.Path(sys.argv[1]), "served"))
    await asyncio.sleep(1.5)
    print("blocks", flush=True)
    the_culprit()

asyncio.run(main())
"""


class Windows:
    """A stack action that dumps the stacks of a real process once, by py-spy."""

    def __init__(self, *, able: bool = True, dumps: bool = False) -> None:
        self.able = able
        self.dumps = dumps
        self.asked: list[tuple[Path, int, str, float]] = []
        self.seen = ""

    def window(self, ring: Path, process: Process, reason: str, seconds: float) -> bool:
        """Dump, and remember."""
        self.asked.append((ring, process.pid, reason, seconds))
        if self.dumps:
            spy = Path(sys.executable).with_name("py-spy")
            command = [str(spy), "dump", "--nonblocking", "--pid", str(process.pid)]
            self.seen = subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=20
            ).stdout
        return self.able


class Captures:
    """A capture action that remembers what it was asked."""

    def __init__(self, answer: str | None) -> None:
        self.answer = answer
        self.asked: list[tuple[int, str]] = []

    def start(self, ring: Path, process: Process, reason: str) -> str | None:
        """Remember."""
        self.asked.append((process.pid, reason))
        return self.answer


class World:
    """An agent stepped by hand on a spool with one live process, and its triggers."""

    def __init__(self, spool: Path, chosen: Settings | None = None) -> None:
        self.spool = spool
        self.clock = HandClock(1000 * S)
        self.writer: RingWriter = write_ring(spool / "a.ring", 1)
        self.agent = Agent(spool, {}, clock=self.clock)
        self.windows = Windows()
        self.agent.actions.stacks = self.windows
        self.triggers = Triggers(self.agent, chosen or Settings(), clock=self.clock)
        self.agent.step()

    def notice(self, kind: str, *, pid: int | None = None, device: str = "") -> None:
        """Put a notice of this process, and let the triggers act."""
        pid = os.getpid() if pid is None else pid
        self.agent.notices.put(Notice(kind, pid, device, self.clock(), f"{kind} happened"))
        self.triggers.collect()

    def reasons(self) -> list[dict[str, object]]:
        """Return what was kept, oldest first."""
        kept = self.spool.glob("triggers/*.json")
        return sorted((json.loads(path.read_text()) for path in kept), key=_started)

    def close(self) -> None:
        """Let go of everything."""
        self.agent.close()
        self.writer.close()


def _started(reason: dict[str, object]) -> str:
    return f"{reason['started_ns']:>30}"


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """An agent with triggers; faults of ours are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as spool:
        made = World(spool)
        yield made
        made.close()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_starts_one_window_and_its_reason_is_kept(world: World, kind: str) -> None:
    """One window of two seconds; reason file, counter, sample and memory tell why."""
    world.notice(kind)
    assert world.windows.asked == [(world.writer.path, os.getpid(), kind, 2.0)]
    (reason,) = world.reasons()
    assert reason["kind"] == kind
    assert reason["action"] == "stacks"
    assert reason["sentence"] == f"{kind} happened"
    assert reason["pid"] == os.getpid()
    assert [reason] == world.triggers.recent()
    assert world.triggers.counters()[kind] == 1
    samples = world.agent.evidence.samples.between(0, 2**62)
    (sample,) = [sample for sample in samples if sample.name == "stagescope.trigger.starts"]
    assert (sample.value, sample.pid, sample.detail) == (1, os.getpid(), kind)


def test_a_kind_rests_a_minute_and_all_kinds_share_an_hour(world: World) -> None:
    """A flood of notices starts one of a kind a minute, ten an hour in all; the rest counted."""
    for _ in range(50):
        world.notice(SLOW)
    assert len(world.windows.asked) == 1
    assert world.triggers.counters()["limited"] == 49
    world.notice(OOM)
    assert len(world.windows.asked) == 2
    for _ in range(40):
        world.clock.tick(61 * S)
        world.notice(SLOW)
    assert len(world.windows.asked) == MOST_AN_HOUR
    world.clock.tick(3600 * S)
    world.notice(SLOW)
    assert len(world.windows.asked) == MOST_AN_HOUR + 1


def test_what_could_not_be_started_does_not_use_up_the_limit(world: World) -> None:
    """A sampler that refuses leaves no reason behind, and the next notice is tried."""
    world.windows.able = False
    world.notice(SLOW)
    assert world.reasons() == []
    assert world.triggers.counters()["refused"] == 1
    world.windows.able = True
    world.notice(SLOW)
    assert len(world.reasons()) == 1


def test_notices_of_processes_that_are_gone_start_nothing(world: World) -> None:
    """A pid that no live process has is counted, and no other process suffers for it."""
    world.notice(OOM, pid=999_999_999)
    assert world.windows.asked == []
    assert world.triggers.counters()["gone"] == 1


def test_a_devices_notice_looks_at_a_process(world: World) -> None:
    """Throttling names no process: the one whose record came last, else any that lives."""
    world.notice(THROTTLE, pid=0, device="GPU-1")
    assert world.windows.asked[0][1] == os.getpid()
    assert world.reasons()[0]["device"] == "GPU-1"


def test_kernels_are_captured_only_where_asked_for_and_telling() -> None:
    """With kernels on, slow and throttle start a capture, an OOM a window; the id is the capture's."""
    with short_spool() as spool:
        world = World(spool, Settings(kernels=True))
        world.agent.actions.capture = captures = Captures("c-1")
        for kind in (SLOW, THROTTLE, OOM):
            world.notice(kind)
        assert captures.asked == [(os.getpid(), SLOW), (os.getpid(), THROTTLE)]
        assert [asked[2] for asked in world.windows.asked] == [OOM]
        beside = json.loads((spool / "captures" / "c-1" / "reason.json").read_text())
        assert beside["id"] == "c-1"
        assert beside in world.reasons()
        captures.answer = None
        world.clock.tick(61 * S)
        world.notice(SLOW)
        assert [asked[2] for asked in world.windows.asked] == [OOM, SLOW]
        world.close()


def test_a_reason_that_cannot_be_kept_is_said_and_the_window_stays(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """No room for the note: counted and said, the trigger has worked all the same."""
    (world.spool / "triggers").write_text("in the way")
    world.notice(XID)
    assert world.triggers.counters()["unkept"] == 1
    assert "is not kept" in caplog.text
    assert len(world.windows.asked) == 1


def test_old_reasons_go(tmp_path: Path) -> None:
    """The newest MOST reasons stay, and nothing half written."""
    reason = Reason("0", "stacks", SLOW, 1, "s", "", 0, 0, 0, 2.0, "why")
    for number in range(MOST + 5):
        keep_reason(tmp_path, replace(reason, id=f"{number:04}"))
    kept = sorted(path.name for path in (tmp_path / "triggers").iterdir())
    assert kept == [f"{number:04}.json" for number in range(5, MOST + 5)]


def test_settings_are_read() -> None:
    """Unset: all kinds, no kernels; names; `off`."""
    assert settings({}) == Settings(KINDS, kernels=False)
    assert settings({"STAGESCOPE_TRIGGERS": "slow, oom"}).kinds == (SLOW, OOM)
    assert settings({"STAGESCOPE_TRIGGERS": "off"}).kinds == ()
    assert settings({"STAGESCOPE_KERNELS": "micro"}).kernels
    assert not settings({"STAGESCOPE_KERNELS": "off"}).kernels


# --- slow -----------------------------------------------------------------------------------------


def slow_requests(
    count: int, *, gap_s: float = 0.1, after: int = 300, **changes: object
) -> EventQueue:
    """Return what is noticed of *after* ordinary requests of 10 ms, and *count* slow ones."""
    notices = EventQueue()
    watch = SlowWatch(notices)
    watch.accept([request_record() for _ in range(after)])
    for number in range(count):
        start_ns = 100 * S + int(number * gap_s * S)
        watch.accept([request_record(start_ns=start_ns, duration_ns=400_000_000, **changes)])
    return notices


def test_a_slow_tail_is_noticed_with_its_figures() -> None:
    """Several requests far beyond the route's p99: how many, which route, how slow, where."""
    (notice,) = slow_requests(AT_LEAST).take()
    assert notice.kind == SLOW
    assert notice.pid == PROCESS.pid
    assert "3 requests of POST /predict took more than 2 times its p99 (10.5 ms)" in notice.sentence
    assert "slowest took 400 ms" in notice.sentence
    assert "of them in other" in notice.sentence


def test_what_is_no_slow_tail_is_not_noticed() -> None:
    """One outlier, outliers far apart, too few seen, the dead, and stalls of our own capture."""
    assert slow_requests(AT_LEAST - 1).take() == []
    assert slow_requests(20, gap_s=6.0).take() == []
    assert slow_requests(20, after=100).take() == []
    assert slow_requests(20, state=State.DIED).take() == []
    stall = (StageStall(-1, "other", "capture", 1),)
    assert slow_requests(20, stalls=stall).take() == []


# --- loop lag -------------------------------------------------------------------------------------


def test_a_blocked_loop_is_looked_at_while_it_is_blocked() -> None:
    """A real process that sleeps on its event loop: the dump holds the line that sleeps."""
    with short_spool() as spool:
        windows = Windows(dumps=True)
        agent = Agent(spool, {}, samplers=lambda it: [*make(it), *loop_watchdog.make(it)])
        agent.actions.stacks = windows
        served = subprocess.Popen([sys.executable, "-c", BLOCKED, str(spool)])
        try:
            wait_until(lambda: (agent.step(), windows.asked)[1], 30)
            assert windows.asked[0][1:3] == (served.pid, LOOP_LAG)
            assert "the_culprit" in windows.seen
            assert agent.counters()["triggers_loop_lag"] == 1
            (reason,) = spool.glob("triggers/*.json")
            assert "the event loop of served (process" in reason.read_text()
        finally:
            served.kill()
            served.wait()
            agent.close()


# --- out of memory --------------------------------------------------------------------------------


def test_notices_that_processes_leave_are_taken_once(tmp_path: Path) -> None:
    """A file in notices/ becomes a notice and goes; what is none is set aside, and counted."""
    notices, folder = EventQueue(), tmp_path / "notices"
    files = NoticeFiles(notices, tmp_path)
    files.look(0)
    folder.mkdir()
    said = {"kind": "oom", "pid": 7, "at_ns": 5, "path": "/x/snapshot.pickle"}
    (folder / "1.json").write_text(json.dumps(said))
    for number, wrong in enumerate(["", "[]", '{"kind": "tea"}', '{"kind": "oom"}', "\xff"]):
        (folder / f"2{number}.json").write_bytes(wrong.encode("latin-1"))
    os.mkfifo(folder / "3.json")
    (folder / "4.json").symlink_to(folder / "20.json")
    files.look(0)
    files.look(0)
    assert notices.take() == [
        Notice(OOM, 7, "", 5, "process 7 reported oom; see /x/snapshot.pickle")
    ]
    assert files.bad == 7
    assert list(folder.glob("*.json")) == []
    assert len(list(folder.glob("*.bad"))) == 7


def test_the_kernels_own_count_of_a_control_group_is_watched(tmp_path: Path) -> None:
    """What grows in memory.events is noticed; what was there before we came is not."""
    group = tmp_path / "sys" / "fs" / "cgroup" / "pod"
    group.mkdir(parents=True)
    (group / "cgroup.events").touch()
    (tmp_path / "proc" / "self").mkdir(parents=True)
    mounted = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    (tmp_path / "proc" / "self" / "mountinfo").write_text(mounted)
    (tmp_path / "proc" / "4242").mkdir(parents=True)
    (tmp_path / "proc" / "4242" / "cgroup").write_text("4:memory:/old\n0::/pod\n")
    notices, alive = EventQueue(), [(tmp_path / "a.ring", PROCESS)]
    watch = CgroupOom(notices, lambda: alive, str(tmp_path))
    watch.look(0)
    (group / "memory.events").write_text("low 0\noom 3\noom_kill 1\n")
    watch.look(10 * S)
    assert notices.take() == []
    (group / "memory.events").write_text("low 0\noom 4\noom_kill 2\n")
    watch.look(11 * S)
    assert notices.take() == []
    watch.look(20 * S)
    (notice,) = notices.take()
    assert (notice.kind, notice.pid) == (OOM, PROCESS.pid)
    assert "1 times at its limit, 1 processes killed" in notice.sentence
    watch.look(30 * S)
    assert notices.take() == []


# --- limits ---------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 900 * S)), max_size=80))
def test_limits_hold_whatever_comes(arrivals: list[tuple[str, int]]) -> None:
    """In any hour at most MOST_AN_HOUR; of one kind never two within MIN_GAP_S."""
    limits, now_ns, started = TriggerLimits(), 0, list[tuple[int, str]]()
    for kind, gap_ns in arrivals:
        now_ns += gap_ns
        if limits.allow(kind, now_ns):
            limits.note(kind, now_ns)
            started.append((now_ns, kind))
    for at_ns, kind in started:
        hour = [one for one in started if at_ns <= one[0] < at_ns + 3600 * S]
        assert len(hour) <= MOST_AN_HOUR
        same = [one for one in hour if one[1] == kind and one[0] < at_ns + MIN_GAP_S * S]
        assert len(same) == 1
