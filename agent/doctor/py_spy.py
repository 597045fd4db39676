"""Does py-spy work here? Tried on a child of our own, and on the served processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from stagescope.agent.doctor.environment import Environment, Served
from stagescope.agent.doctor.finding import NO, OK, STACKS, WARN, Finding
from stagescope.agent.doctor.ptrace import rights
from stagescope.agent.probe import ask
from stagescope.agent.stacks.py_spy import dump, find_py_spy, run_once
from stagescope.errors import StagescopeError

DUMP_S: Final = 1.0
MOST_TARGETS: Final = 2
CHILD: Final = "import time\nprint(flush=True)\ntime.sleep(10)"


def py_spy(around: Environment) -> Finding:
    """Is there a py-spy, and does it give stacks?"""
    program = find_py_spy(around.environment)
    if program is None:
        do = (f"{sys.executable} -m pip install py-spy",)
        text = "py-spy is not installed: stacks only from within the server, 20 a second"
        return Finding(WARN, text, do, lacks=(STACKS,), facts={"path": None})
    facts: dict[str, Any] = {"path": str(program), "version": None, "dumped": []}
    try:
        said = run_once([str(program), "--version"], DUMP_S).stdout.decode("utf-8", "replace")
        facts["version"] = said.removeprefix("py-spy").strip()
        with _child() as pid:
            dump(program, pid, DUMP_S)
    except StagescopeError as problem:
        do = (f"{sys.executable} -m pip install --force-reinstall py-spy",)
        denied = tuple(rights(around).grants())
        told = f"py-spy does not work, tried on a child of our own: {problem}"
        return Finding(WARN, told, denied or do, lacks=(STACKS,), facts=facts)
    return _of_targets(around, program, facts)


def _of_targets(around: Environment, program: Path, facts: dict[str, Any]) -> Finding:
    said = f"py-spy {facts['version']}"
    for pid in around.pids()[:MOST_TARGETS]:
        for one in around.served:
            if one.process.pid == pid:
                _ask_leave(around, one)
        try:
            dump(program, pid, DUMP_S)
        except StagescopeError as problem:
            told = f"{said} works, but not on pid {pid}: {problem}"
            return Finding(NO, told, tuple(rights(around, pid).grants()),
                           lacks=(STACKS,), facts=facts)  # fmt: skip
        facts["dumped"].append(pid)
    if facts["dumped"]:
        whose = f"pid {', '.join(map(str, facts['dumped']))}"
        return Finding(OK, f"{said}: stacks of {whose}, 49 a second, without pausing it",
                       gives=(STACKS,), facts=facts)  # fmt: skip
    if rights(around).obstacles():
        told = f"{said} works on a child of our own, which is no proof for a server; see ptrace"
        return Finding(WARN, told, lacks=(STACKS,), facts=facts)
    return Finding(OK, f"{said}: stacks 49 a second, without pausing the server",
                   gives=(STACKS,), facts=facts)  # fmt: skip


def _ask_leave(around: Environment, one: Served) -> None:
    """Where Yama is 1: have the server name us, so that what we start may read it."""
    found = rights(around, one.process.pid)
    if found.yama == 1 and found.asks_leave and not found.capable:
        ask(one.probe, "allow_ptrace", timeout_s=DUMP_S, pid=os.getpid())


@contextmanager
def _child() -> Generator[int]:
    """A Python of our own that sleeps."""
    words = [sys.executable, "-S", "-E", "-c", CHILD]
    try:
        started = subprocess.Popen(words, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    except OSError as problem:
        raise StagescopeError(f"{sys.executable} cannot be started: {problem.strerror}") from None
    with started as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            yield child.pid
        finally:
            child.kill()
