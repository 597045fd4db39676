"""The probe of a served process, over its real socket."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from stagescope.agent.probe import ask, converse, probe_of
from stagescope.errors import StagescopeError
from stagescope.middleware.probe.server import Probe
from stagescope.middleware.recording.recorder import Recorder
from stagescope.testing import wait_until
from stagescope.testing.recording import Recording

SERVED = """
import sys, pathlib
from stagescope.middleware.process import process_recorder
recorder = process_recorder(pathlib.Path(sys.argv[1]), "served")
print(recorder.path, flush=True)
sys.stdin.read()
"""


@contextmanager
def recording(spool: Path) -> Iterator[Recorder]:
    """A recorder for a probe to count its faults in."""
    made = Recording(spool)
    yield made.recorder
    made.close()


@pytest.fixture
def probe(tmp_path: Path) -> Iterator[Probe]:
    """A probe of this process."""
    with recording(tmp_path) as recorder:
        probe = Probe(tmp_path / "1-a.probe", recorder)
        yield probe
        probe.stop()


def test_it_says_who_it_is(probe: Probe) -> None:
    """`hello` gives the process and what it can be asked; the socket is its owner's alone."""
    answer = ask(probe.path, "hello")
    assert answer["pid"] == os.getpid()
    assert "hello" in answer["ops"]
    assert probe.path.stat().st_mode & 0o777 == 0o600


def test_the_socket_is_never_open_to_others(tmp_path: Path) -> None:
    """It is made 0600: whatever the umask, and no change of its mode comes after."""
    with recording(tmp_path) as recorder:
        before = os.umask(0)
        try:
            probe = Probe(tmp_path / "1-b.probe", recorder)
        finally:
            os.umask(before)
        assert probe.path.stat().st_mode & 0o777 == 0o600
        probe.stop()


def test_a_path_may_be_long(tmp_path: Path) -> None:
    """A spool whose path is longer than a socket's may be has a probe all the same."""
    folder = tmp_path / ("long" * 50)
    folder.mkdir()
    with recording(tmp_path) as recorder:
        probe = Probe(folder / "1-a.probe", recorder)
        assert ask(probe.path, "hello")["pid"] == os.getpid()
        probe.stop()


@pytest.mark.parametrize("line", [b"no json\n", b"[1]\n", b"x" * 100_000, b"", b'{"op": 3}\n'])
def test_nonsense_ends_its_own_connection_only(probe: Probe, line: bytes) -> None:
    """Whatever is sent, the next question is answered."""
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(probe.path))
        with suppress(ConnectionError):  # it does not listen to the end
            stranger.sendall(line)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    assert ask(probe.path, "hello")["pid"] == os.getpid()


def test_an_unknown_question_is_refused_in_a_sentence(probe: Probe) -> None:
    """The sentence names what is known."""
    with pytest.raises(StagescopeError, match=r"knows no 'brew'; it knows .*hello"):
        ask(probe.path, "brew")


def test_nothing_is_left_when_it_stops(tmp_path: Path) -> None:
    """Twenty probes come and go: no thread, file or descriptor stays."""
    before = set(threading.enumerate())
    with recording(tmp_path) as recorder:
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            probe = Probe(tmp_path / "1-a.probe", recorder)
            ask(probe.path, "hello")
            probe.stop()
        assert wait_until(lambda: set(threading.enumerate()) <= before, timeout_s=5)
        assert wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files, timeout_s=5)
    assert not (tmp_path / "1-a.probe").exists()


@pytest.mark.parametrize("off", [False, True])
def test_a_served_process_has_one_unless_it_is_off(tmp_path: Path, off: bool) -> None:
    """It lies beside the recorder file and goes with the process; STAGESCOPE_PROBE=off: none."""
    environment = os.environ | ({"STAGESCOPE_PROBE": "off"} if off else {})
    with subprocess.Popen(
        [sys.executable, "-c", SERVED, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout
        assert process.stdin
        path = probe_of(Path(process.stdout.readline().strip()))
        try:
            assert path.exists() != off
            if not off:
                assert ask(path, "hello")["pid"] == process.pid
                assert len(list(converse(path, "hello"))) == 1
        finally:
            process.stdin.close()
            process.wait(10)
    assert not path.exists()


def test_nobody_there_is_one_sentence(tmp_path: Path) -> None:
    """A process that is gone, and a socket that it left, are told alike."""
    left = tmp_path / "1-b.probe"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(left))
    for path in (left, tmp_path / "1-c.probe"):
        with pytest.raises(StagescopeError, match="no process answers at"):
            ask(path, "hello")
