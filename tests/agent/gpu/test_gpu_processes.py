"""Whose PID it is that the driver names."""

import os
from pathlib import Path

from stagescope.agent.gpu.nvml_processes import resolver


def process(proc: Path, pid: int, *namespaces: int) -> None:
    """Make a process in a /proc tree."""
    (proc / str(pid)).mkdir()
    numbers = "\t".join(map(str, (pid, *namespaces)))
    (proc / str(pid) / "status").write_text(f"Name:\tx\nNSpid:\t{numbers}\nThreads:\t1\n")


def test_a_process_of_this_host() -> None:
    """The real /proc: our own PID is ours; one above what Linux gives is nobody's."""
    resolve = resolver(set)
    assert resolve(os.getpid()) == os.getpid()
    assert resolve(2**22 + 1) == 0


def test_a_served_process_in_a_container(tmp_path: Path) -> None:
    """Seen from the host it has two PIDs: the row has the one that its records are written under."""
    process(tmp_path, 4711, 7)
    process(tmp_path, 4712, 8)
    resolve = resolver(lambda: {7, 4712}, tmp_path)
    assert resolve(4711) == 7
    assert resolve(4712) == 4712
    assert resolver(set, tmp_path)(4711) == 4711
