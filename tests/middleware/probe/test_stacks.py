"""The probe's `stacks`, `dump` and `allow_ptrace`, over its real socket."""

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from stagescope.agent.probe import ask, converse
from stagescope.agent.stacks.in_process import raw_stacks
from stagescope.errors import StagescopeError
from stagescope.middleware.probe.server import Probe
from stagescope.testing import wait_until
from stagescope.testing.recording import Recording

PERIOD_NS = 20_000_000


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[Path]:
    """A probe of this process."""
    recording = Recording(tmp_path)
    probe = Probe(tmp_path / "1-a.probe", recording.recorder)
    yield probe.path
    probe.stop()
    recording.close()


@pytest.fixture
def waiter() -> Iterator[str]:
    """A thread that waits in a function of a known name."""
    leave = threading.Event()

    def planted_wait() -> None:
        leave.wait()

    thread = threading.Thread(target=planted_wait, name="waiter")
    thread.start()
    yield "planted_wait"
    leave.set()
    thread.join()


def test_a_dump_has_every_thread_but_the_one_that_takes_it(probe: Path, waiter: str) -> None:
    """With the system's ids, names, and frames outermost first."""
    raws = {raw.thread: raw for raw in raw_stacks(ask(probe, "dump"))}
    assert raws["MainThread"].thread_id == threading.main_thread().native_id
    names = [frame.function.rpartition(".")[2] for frame in raws["waiter"].frames]
    assert names.index("_bootstrap") < names.index(waiter) < names.index("wait")
    assert all(raw.start_ns == raw.end_ns for raw in raws.values())


def test_stacks_come_as_they_are_seen_and_stand_for_their_time(probe: Path, waiter: str) -> None:
    """A thread that does not move is one span an answer, whose samples make up its time."""
    answers = list(converse(probe, "stacks", seconds=1.3, hz=50))
    assert len(answers) >= 2
    spans = [raw for answer in answers for raw in raw_stacks(answer) if raw.thread == "waiter"]
    seen_s = sum(span.end_ns - span.start_ns for span in spans) / 1e9
    assert 0.5 < seen_s < 1.5
    assert all(one.end_ns <= two.start_ns + PERIOD_NS for one, two in pairwise(spans))
    assert sum(span.samples for span in spans) <= 66


def test_it_ends_when_the_asker_goes_and_has_one_asker_at_a_time(probe: Path) -> None:
    """The second is refused in a sentence; after the first has gone he is served."""
    with closing(converse(probe, "stacks", seconds=60, hz=50)) as first:
        next(first)
        with pytest.raises(StagescopeError, match="for another asker"):
            ask(probe, "stacks", seconds=0.1)
    wait_until(lambda: _asks(probe))


def _asks(probe: Path) -> bool:
    try:
        return bool(ask(probe, "stacks", seconds=0.05)["done"])
    except StagescopeError:
        return False


@pytest.mark.parametrize(
    ("op", "question", "sentence"),
    [
        ("stacks", {"seconds": "long"}, "`seconds` and `hz` are numbers"),
        ("allow_ptrace", {}, "`pid` is the process that may read this one"),
        ("allow_ptrace", {"pid": -1}, "`pid` is the process that may read this one"),
        ("allow_ptrace", {"pid": 2**64 - 1}, "`pid` is the process that may read this one"),
        ("allow_ptrace", {"pid": 1}, "`pid` is the process that may read this one"),
    ],
)
def test_nonsense_is_refused(
    probe: Path, op: str, question: dict[str, object], sentence: str
) -> None:
    """In a sentence."""
    with pytest.raises(StagescopeError, match=sentence):
        ask(probe, op, **question)  # type: ignore[arg-type]


def test_leave_to_read_is_given_or_the_system_says_why(probe: Path) -> None:
    """Where the kernel has Yama it is given, else there is nothing to give."""
    if Path("/proc/sys/kernel/yama/ptrace_scope").exists():
        assert ask(probe, "allow_ptrace", pid=os.getpid())["allowed"] == os.getpid()
    else:
        with pytest.raises(StagescopeError, match=r"refuses to name process .* Invalid argument"):
            ask(probe, "allow_ptrace", pid=os.getpid())
