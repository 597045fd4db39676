"""`stagescope run` between a person and a server: signals, exit codes, the terminal, leftovers."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.commands import SOURCE, Running, run_command

COUNTS = """
import signal, sys
seen = []

def note(number, frame):
    seen.append(signal.Signals(number).name)
    print("got", *seen, flush=True)

for name in sys.argv[1:]:
    signal.signal(signal.Signals[name], note)
print("ready", flush=True)
while "SIGTERM" not in seen:
    signal.pause()
sys.exit(9)
"""
"""Prints each signal that it gets, and ends at SIGTERM."""

ASKS = """
import signal
taken = {signal.SIGINT, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, taken)
print("ready", flush=True)
number = 0
while number != signal.SIGUSR1:
    number = signal.sigwaitinfo(taken).si_signo
    print("got", signal.Signals(number).name, flush=True)
print("told", input(), flush=True)
"""
"""Prints each signal that it gets, without a handler in which two might become one; then asks."""


@pytest.fixture
def spool() -> Iterator[Path]:
    """A spool of the test's own."""
    with short_spool() as made:
        yield made


def options(spool: Path, *more: str) -> list[str]:
    """Return the command line up to the command."""
    return ["--no-agent", "--spool", str(spool), *more, "--"]


def pids_in(running: Running, word: str) -> list[int]:
    """Return the pids that the command has printed behind *word*."""
    return [int(line.split()[1]) for line in running.text().splitlines() if line.startswith(word)]


def gone(pid: int) -> bool:
    """Return whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_each_signal_reaches_the_server_once(tmp_path: Path, spool: Path) -> None:
    """What is sent to us arrives at the server, once each; its exit code is ours."""
    names = ["SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGTTIN", "SIGTTOU"]
    script = [sys.executable, "-c", COUNTS, *names, "SIGTERM"]
    with run_command(tmp_path, *options(spool), *script) as running:
        running.wait_for("ready")
        for count in range(1, len(names) + 1):
            running.process.send_signal(signal.Signals[names[count - 1]])
            running.wait_for(" ".join(["got", *names[:count]]) + "\n")
        assert running.end(signal.SIGTERM) == 9
        assert " ".join(["got", *names, "SIGTERM"]) + "\n" in running.text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_death_by_a_signal_is_told_as_a_shell_does(
    tmp_path: Path, spool: Path, number: signal.Signals
) -> None:
    """128 + N where signal N ended the server."""
    script = f"ulimit -c 0; kill -{int(number)} $$"
    with run_command(tmp_path, *options(spool), "sh", "-c", script) as running:
        assert running.wait() == 128 + number


def test_the_terminals_ctrl_c_arrives_once_and_input_is_the_servers(
    tmp_path: Path, spool: Path
) -> None:
    """At a terminal the server gets Ctrl-C from there and not from us too; it reads what is typed.

    The server is in the terminal's foreground group, as it would be without us.
    """
    terminal, side = pty.openpty()
    leader = (
        "import fcntl, os, sys, termios\n"
        "os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-m", "stagescope", "run", *options(spool), sys.executable, "-c"]
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", leader, *command, ASKS],
        os.environ | {"PYTHONPATH": str(SOURCE)},
        file_actions=[(os.POSIX_SPAWN_DUP2, side, fd) for fd in (0, 1, 2)],
    )
    os.close(side)
    shown = bytearray()

    def showing(text: bytes) -> bool:
        shown.extend(waiting_bytes(terminal))
        return text in shown

    wait_until(lambda: showing(b"ready"), 20)
    os.write(terminal, b"\x03")
    wait_until(lambda: showing(b"got SIGINT\r\n"), 20)
    os.kill(pid, signal.SIGUSR1)  # passed on after whatever we make of the Ctrl-C
    wait_until(lambda: showing(b"got SIGUSR1\r\n"), 20)
    assert shown.count(b"got SIGINT") == 1
    os.write(terminal, b"the word\n")
    wait_until(lambda: showing(b"told the word\r\n"), 20)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0


def waiting_bytes(fd: int) -> bytes:
    """Read what is there on a terminal, without waiting."""
    waiting = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, waiting)
    many = int.from_bytes(waiting, sys.byteorder)
    return os.read(fd, many) if many else b""


def test_what_the_server_leaves_behind_is_ended(tmp_path: Path, spool: Path) -> None:
    """Grandchildren in sessions of their own go too, by SIGKILL if need be; who is told."""
    script = """
import os, signal, subprocess, sys, time
polite = subprocess.Popen(["sleep", "600"], start_new_session=True)
stubborn = os.fork()
if stubborn == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("pid", os.getpid(), flush=True)
    signal.pause()
print("pid", polite.pid, flush=True)
while sum(line.startswith("pid") for line in open("output.txt")) < 2:
    time.sleep(0.01)
os._exit(5)
"""
    command = [sys.executable, "-c", script]
    with run_command(tmp_path, *options(spool, "--grace", "0.3"), *command) as running:
        assert running.wait() == 5, running.text()
        left = pids_in(running, "pid")
    assert len(left) == 2
    assert all(gone(pid) for pid in left)
    told = next(line for line in running.text().splitlines() if "left behind" in line)
    assert all(f"(pid {pid})" in told for pid in left)
    assert told.count("by SIGKILL") == 1


def test_killed_ourselves_we_leave_no_server(tmp_path: Path, spool: Path) -> None:
    """After `kill -9` of us the server gets SIGTERM, and the agent ends too."""
    script = "import os, signal; print('pid', os.getpid(), flush=True); signal.pause()"
    with run_command(
        tmp_path, "--spool", str(spool), "--metrics-port", "off", "--", sys.executable, "-c", script
    ) as running:
        running.wait_for("stagescope agent: reading spool")
        running.wait_for("pid ")
        below = psutil.Process(running.process.pid).children()
        assert len(below) == 2
        running.process.kill()
        running.wait()
        wait_until(lambda: all(gone(process.pid) for process in below), 20)


def test_children_of_the_shell_that_became_us_are_left_alone(tmp_path: Path, spool: Path) -> None:
    """After `helper & exec stagescope run ...` the helper is our child, and not the server's."""
    command = [sys.executable, "-m", "stagescope", "run", *options(spool), "true"]
    output = tmp_path / "output.txt"
    with output.open("wb") as file:
        done = subprocess.run(
            ["sh", "-c", 'sleep 600 & echo pid $!; exec "$@"', "sh", *command],
            env=os.environ | {"PYTHONPATH": str(SOURCE)},
            stdout=file,
            stderr=file,
            timeout=20,
            check=False,
        )
    text = output.read_text()
    assert done.returncode == 0, text
    helper = psutil.Process(int(text.split()[1]))
    assert helper.name() == "sleep"
    helper.kill()
    wait_until(lambda: gone(helper.pid), 20)
    assert "left behind" not in text
