"""py-spy where it fails: each time one sentence, nothing left."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from stagescope.agent.stacks import py_spy
from stagescope.agent.stacks.in_process import Target
from stagescope.agent.stacks.labels import RawStack
from stagescope.agent.stacks.permissions import why_not
from stagescope.agent.stacks.py_spy import PySpy, find_py_spy, read_trace, why_failed
from stagescope.errors import StagescopeError
from stagescope.testing import wait_until
from stagescope.testing.recording import Recording
from stagescope.testing.records import PROCESS

NOBODY = 65534


def target(pid: int, ring: Path = Path("/spool/1-a.ring")) -> Target:
    """A process to look at."""
    return Target(ring, replace(PROCESS, pid=pid))


@contextmanager
def killed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill it at the end of the block, however that comes."""
    try:
        yield
    finally:
        process.kill()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that sleeps."""
    words = [sys.executable, "-c", "import threading, time; print(1, flush=True); time.sleep(600)"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process, killed(process):
        assert process.stdout
        process.stdout.readline()
        yield process


def spy(folder: Path) -> PySpy:
    """The real one."""
    found = find_py_spy()
    assert found
    return PySpy(found, folder)


def over(window: py_spy.PySpyWindow) -> list[RawStack]:
    """Poll *window* to its end."""
    seen: list[list[RawStack]] = []

    def ended() -> bool:
        raws = window.poll()
        if raws is not None:
            seen.append(raws)
        return bool(seen)

    wait_until(ended, 20)
    return seen[0]


def test_a_window_may_be_cut_short(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """What it saw is given, with the thread's id and name; its files go."""
    window = spy(tmp_path).begin(target(sleeper.pid), 60)
    wait_until(lambda: (tmp_path / "window-1.threads").stat().st_size)
    window.finish()
    raws = over(window)
    assert {(raw.thread_id, raw.thread) for raw in raws} <= {(sleeper.pid, "MainThread")}
    assert not list(tmp_path.iterdir())


def test_no_python_and_nobody_are_sentences(tmp_path: Path) -> None:
    """A process that is none of Python's, and one that is gone; by dump and by window."""
    with subprocess.Popen(["sleep", "20"]) as process, killed(process):
        with pytest.raises(StagescopeError, match=f"process {process.pid} is no Python that"):
            spy(tmp_path).dump(target(process.pid), 5)
        with pytest.raises(StagescopeError, match="is no Python that py-spy knows"):
            over(spy(tmp_path).begin(target(process.pid), 1))
    with pytest.raises(StagescopeError, match="has ended"):
        spy(tmp_path).dump(target(process.pid), 5)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_sentence(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """It names the folder."""
    (tmp_path / "window-1.trace").symlink_to("/dev/full")
    with pytest.raises(StagescopeError, match=f"there is no room left in {tmp_path}"):
        over(spy(tmp_path).begin(target(sleeper.pid), 1))
    assert not list(tmp_path.iterdir())


def test_one_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its patience, by its id; a dump after its own limit."""
    hangs = tmp_path / "py-spy"
    hangs.write_text("#!/bin/sh\nexec sleep 600\n")
    hangs.chmod(0o700)
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setattr(py_spy, "PATIENCE_S", 0.1)
    with pytest.raises(StagescopeError, match="did not finish with process 1 and was"):
        over(PySpy(hangs, folder).begin(target(1), 0.1))
    with pytest.raises(StagescopeError, match=r"py-spy gave nothing within 0\.1 s"):
        PySpy(hangs, folder).dump(target(1), 0.1)
    assert not list(folder.iterdir())


def test_one_that_cannot_be_started_is_a_sentence(tmp_path: Path) -> None:
    """No program, or no folder to write to."""
    for program, folder in ((tmp_path / "none", tmp_path), (Path("/bin/true"), tmp_path / "none")):
        with pytest.raises(StagescopeError, match="py-spy cannot be started"):
            PySpy(program, folder).begin(target(1), 1)
    assert not list(tmp_path.iterdir())


def as_nobody(do: Callable[[], str]) -> str:
    """Return what *do* says in a process that may read none of ours."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        if os.geteuid() == 0:
            os.setresuid(NOBODY, NOBODY, NOBODY)
        os.write(writes, do().encode())
        os._exit(0)
    os.close(writes)
    os.waitpid(child, 0)
    with open(reads, "rb") as file:
        return file.read().decode()


def test_a_process_of_another_user_is_a_sentence(tmp_path: Path) -> None:
    """It names what to grant; and where py-spy is refused all the same, that is said."""
    foreign = os.getpid() if os.geteuid() == 0 else 1

    def refused() -> str:
        try:
            return str(spy(tmp_path).dump(target(foreign), 5))
        except StagescopeError as problem:
            return str(problem)

    why = as_nobody(lambda: why_not(target(foreign)))
    assert f"process {foreign} belongs to another user" in why
    assert "run the agent as that user, or grant it CAP_SYS_PTRACE" in why
    assert f"does not let this user read process {foreign}" in as_nobody(refused)


def proc(folder: Path, ring: Path, *, uid: int = os.geteuid(), scope: str = "") -> Path:
    """A /proc without capabilities, with this process in it and Yama as *scope*."""
    process = folder / str(os.getpid())
    (process / "fd").mkdir(parents=True)
    (process / "fd" / "3").symlink_to(ring)
    (process / "status").write_text(f"Name:\tx\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n")
    (folder / "self").mkdir()
    (folder / "self" / "status").write_text("CapEff:\t0000000000000000\n")
    if scope:
        (folder / "sys/kernel/yama").mkdir(parents=True)
        (folder / "sys/kernel/yama/ptrace_scope").write_text(f"{scope}\n")
    return folder


@pytest.mark.parametrize(
    ("uid", "scope", "sentence"),
    [
        (os.geteuid(), "", ""),
        (os.geteuid(), "0", ""),
        (
            os.geteuid(),
            "1",
            "ptrace_scope is 1 and CAP_SYS_PTRACE is missing, and no process answers at",
        ),
        (os.geteuid(), "2", "ptrace_scope is 2 and CAP_SYS_PTRACE is missing; do: sudo setcap"),
        (4242, "", "it belongs to uid 4242, you are"),
    ],
)
def test_the_missing_grant_is_named(tmp_path: Path, uid: int, scope: str, sentence: str) -> None:
    """By user and by Yama; with neither in the way, nothing."""
    recording = Recording(tmp_path)
    found = proc(tmp_path / "proc", recording.path, uid=uid, scope=scope)
    why = why_not(target(os.getpid(), recording.path), found)
    recording.close()
    assert (sentence in why) if sentence else not why


def test_another_namespace_is_named(tmp_path: Path) -> None:
    """A process of that number that does not write the recorder file is another one."""
    ring = tmp_path / "1-other.ring"
    for pid in (os.getpid(), 4_000_000):
        assert "another PID namespace" in why_not(target(pid, ring))


def test_what_py_spy_says_is_read_whatever_it_is() -> None:
    """Known reasons in our words, others in its own; a cut trace is an error."""
    said = why_failed("Error: something new\n\nStack backtrace:\n 0: x", 7, Path("/f"))
    assert said == "py-spy sampled nothing of process 7: Error: something new"
    assert read_trace(b"", 0, 1, {}) == []
    with pytest.raises(ValueError, match="Expecting"):
        read_trace(b'[{"ph":"B"', 0, 1, {})


AGENT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_py_spy import spy, target
window = spy(Path(sys.argv[1])).begin(target(int(sys.argv[2])), 30, 1.0)
print(*[process.pid for process in window._processes], flush=True)
time.sleep(60)
"""


def runs(pid: int) -> bool:
    """Return whether there is such a process that has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_none_outlives_an_agent_that_is_killed(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    """Half a minute's window ends at once with the process that began it."""
    words = [
        sys.executable,
        "-c",
        AGENT,
        str(tmp_path),
        str(sleeper.pid),
        str(Path(__file__).parent),
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        pids = [int(word) for word in agent.stdout.readline().split()]
        agent.kill()
    assert pids
    wait_until(lambda: not any(map(runs, pids)), timeout_s=10)
