"""Stacks: what Python code ran in a served process, and in which stage."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from stagescope.columns import HOST_CLOCK, column


class Frame(NamedTuple):
    """One frame: never its locals or arguments."""

    function: str
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class StackSpan:
    """One thread's stack, as long as sampling saw it unchanged."""

    pid: int = field(metadata=column("process id"))
    thread_id: int = field(metadata=column("the operating system's id of the thread; 0: not known"))
    thread: str = field(metadata=column("the thread's name"))
    start_ns: int = field(metadata=column(f"when it was first seen; {HOST_CLOCK}"))
    end_ns: int = field(metadata=column("start_ns and what its samples stand for"))
    samples: int = field(metadata=column("how often it was seen", small=True))
    stage: str = field(
        metadata=column("full name of the stage whose code it is; empty: none known")
    )
    by: str = field(
        metadata=column(
            "how the stage is known: `marker` (a frame of stagescope's), `block` (the line lies in "
            "a `with stage(...)`), `interval` (one request alone was served), or `none`"
        )
    )
    running: bool = field(
        metadata=column("false where the thread waits, by the name of what it waits in")
    )
    frames: tuple[Frame, ...] = field(
        metadata=column("`function (file:line)`, outermost first, without stagescope's own")
    )
    reason: str = field(
        metadata=column("why it was sampled: `window`, `loop_lag`, `slow`, `oom` or `demand`")
    )
    how: str = field(metadata=column("who sampled: `py-spy` or `in-process`"))
    cpu_ns: int | None = field(
        default=None,
        metadata=column(
            "CPU time that the thread used meanwhile, with that of native threads that worked for "
            "it; null: not read"
        ),
    )

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
