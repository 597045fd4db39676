"""Stacks: what Python code ran in a served process, and in which stage."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


class Frame(NamedTuple):
    """One frame: never its locals or arguments."""

    function: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class StackSpan:
    """One thread's stack, as long as sampling saw it unchanged."""

    pid: int
    thread_id: int
    """The operating system's id of the thread; 0 where the sampler cannot tell."""
    thread: str
    """Its name."""
    start_ns: int
    """On the host's monotonic clock, like all of a record's times."""
    end_ns: int
    """start_ns + samples * period: what these samples stand for."""
    samples: int
    stage: str
    """Full name of the stage whose code this is; empty where none is known."""
    by: str
    """How the stage is known: `marker` (a frame of ours), `block` (the frame's line lies in a
    `with stage(...)` of its source), `interval` (one request alone was being served), or `none`."""
    running: bool
    """False where the thread waits, by the name of what it waits in."""
    frames: tuple[Frame, ...]
    """Outermost first, without frames of ours."""
    reason: str
    """Why it was sampled: `window`, `loop_lag`, `slow`, `oom`, `demand`."""
    how: str
    """Who sampled: `py-spy` or `in-process`."""
    cpu_ns: int | None = None
    """CPU time that the thread used meanwhile, native threads' that worked for it included, by the
    kernel's count; None where that was not read."""

    @property
    def seen_ns(self) -> int:
        """The middle of the moments at which it was seen: the first is start_ns, the last a period
        before end_ns."""
        return self.start_ns + (self.end_ns - self.start_ns) * (self.samples - 1) // (
            2 * self.samples
        )


class ThreadCpu(NamedTuple):
    """One reading of the CPU time of all threads of a process."""

    at_ns: int
    used_ns: Mapping[int, int]
    """By the operating system's id of the thread."""


def read_thread_cpu(process: Path, at_ns: int) -> ThreadCpu:
    """Read `schedstat` (sched-stats.rst of Linux) of each thread in *process*, its `/proc/PID`.

    Of a thread that has ended, and where the kernel keeps no such count, nothing is known.
    """
    used_ns: dict[int, int] = {}
    try:
        threads = os.listdir(process / "task")
    except OSError:
        threads = []
    for thread in threads:
        try:
            with open(process / "task" / thread / "schedstat", "rb") as file:
                used_ns[int(thread)] = int(file.read().split()[0])
        except (OSError, ValueError, IndexError):
            continue
    return ThreadCpu(at_ns, used_ns)


_LIBRARY = re.compile(
    r"[/\\](site|dist)-packages[/\\]|[/\\]lib(64)?[/\\]python\d|^<|[/\\]s?bin[/\\][^/\\]+$",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"[/\\]")
_MADE_UP = re.compile(r"[0-9a-f]{16,}|tmp\w{8}")
"""Names of folders that say nothing: TorchServe unpacks each model into one."""


@lru_cache(maxsize=16_384)
def is_library(file: str) -> bool:
    """Return whether *file* is Python's, an installed package's, or a launcher such as `bin/uvicorn`."""
    # py-spy may give a file as it is below its folder of sys.path.
    first = _SEPARATOR.split(file)[0].removesuffix(".py")
    return bool(_LIBRARY.search(file)) or first in sys.stdlib_module_names


def short_file(file: str) -> str:
    """Return the last two names of a path; of an installed package its path inside that."""
    _, packages, inside = file.partition("/site-packages/")
    if packages:
        return inside
    names = [name for name in _SEPARATOR.split(file) if not _MADE_UP.fullmatch(name)]
    return "/".join(names[-2:])


_FRAME = re.compile(r"(.*?) \((.*):(\d+)\)", re.DOTALL)


def frame_text(frame: Frame) -> str:
    """Write *frame* as tables and log lines do: `function (file:line)`."""
    return f"{frame.function} ({frame.file}:{frame.line})"


def parse_frame(text: str) -> Frame:
    """Read what `frame_text` wrote; any other text is a function's name."""
    found = _FRAME.fullmatch(text)
    return Frame(found[1], found[2], int(found[3])) if found else Frame(text, "", 0)
