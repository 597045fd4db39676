"""Which stage a stack is in: by marks between its frames, and by the blocks that its lines lie in.

Neither needs a clock: the stack itself says it. The innermost of both wins, as the stage opened
last is the one that is charged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stagescope.agent.source_files import SourceFiles
from stagescope.agent.stage_blocks import Source
from stagescope.stacks import Frame, StackSpan

MARK = re.compile(r"(?:.*\.)?__stage_(.+)__")
"""`middleware/marks.py`; py-spy puts a class before a method's name."""
OURS = re.compile(
    r"/stagescope/(?:(?:agent|analysis|cli|exporters|loadgen|middleware)/|[a-z_]+\.py$)"
)
OUR_THREADS = "stagescope"

WAITS = frozenset(
    [
        "select",
        "poll",
        "epoll",
        "epoll_wait",
        "wait",
        "wait_for",
        "acquire",
        "get",
        "sleep",
        "recv",
        "recv_into",
        "accept",
        "read",
        "readinto",
        "join",
        "_wait_for_tstate_lock",
        "flock",
    ]
)
"""Functions of `_WAITING_FILES` whose innermost frame waits, as their name says."""
_WAITING_FILES = re.compile(
    r"/(?:threading|selectors|queue|socket|socketserver|ssl|subprocess)\.py$"
    r"|/(?:asyncio|concurrent/futures|multiprocessing|uvloop|zmq)/"
)
"""An app's own function may be called `get` or `read` and work hard."""
WAITING_PLACES = (("_worker", "concurrent/futures/thread.py"), ("run", "asyncio/runners.py"),
                  ("run_until_complete", "uvloop/loop.pyx"))  # fmt: skip
"""Functions that wait in C, without a frame of its own: (name, end of file)."""
INLINE = re.compile(r"(?:.*\.)?<(?:lambda|genexpr|listcomp|setcomp|dictcomp)>")


@dataclass(frozen=True, slots=True)
class RawStack:
    """What a sampler saw: a `StackSpan` without a stage, with frames of ours."""

    thread_id: int
    thread: str
    start_ns: int
    end_ns: int
    samples: int
    frames: tuple[Frame, ...]


class StageLabels:
    """Turns raw stacks into spans; keeps what it read of sources."""

    def __init__(self, sources: SourceFiles | None = None) -> None:
        self._sources = sources or SourceFiles()

    def label(self, pid: int, raws: Sequence[RawStack], reason: str, how: str) -> list[StackSpan]:
        """Give the spans of *raws*, all of process *pid*, without threads and frames of ours."""
        sources = self._sources.of(pid, {frame.file for raw in raws for frame in raw.frames})
        spans = [
            _span(pid, raw, sources, reason, how)
            for raw in raws
            if not raw.thread.startswith(OUR_THREADS)
        ]
        return [span for span in spans if span.frames]


def _span(pid: int, raw: RawStack, sources: dict[str, Source], reason: str, how: str) -> StackSpan:
    stage, by = stage_of(raw.frames, sources)
    return StackSpan(
        pid=pid,
        thread_id=raw.thread_id,
        thread=raw.thread,
        start_ns=raw.start_ns,
        end_ns=raw.end_ns,
        samples=raw.samples,
        stage=stage,
        by=by,
        running=not waits(raw.frames, sources),
        frames=tuple([frame for frame in raw.frames if not is_ours(frame)]),
        reason=reason,
        how=how,
    )


def stage_of(frames: Sequence[Frame], sources: dict[str, Source]) -> tuple[str, str]:
    """Give stage and how it is known (`StackSpan.by`), from *frames*, outermost first."""
    for frame in reversed(frames):
        if found := MARK.fullmatch(frame.function):
            return found[1], "marker"
        # What is between angles shares its line with the code around it, which is in the stack
        # where the block is executing: the frame outside it knows.
        if frame.line and not INLINE.fullmatch(frame.function):
            stage = sources[frame.file].stages.get(frame.line)
            if stage:
                return stage, "block"
    return "", "none"


def waits(frames: Sequence[Frame], sources: dict[str, Source]) -> bool:
    """Tell whether the thread waits, by the name of its innermost function, or of what it calls."""
    if not frames:
        return True
    leaf = frames[-1]
    name = leaf.function.rpartition(".")[2]
    if name in WAITS and _WAITING_FILES.search(leaf.file):
        return True
    if leaf.line in sources[leaf.file].waits:
        return True
    return any(name == place and leaf.file.endswith(end) for place, end in WAITING_PLACES)


def is_ours(frame: Frame) -> bool:
    """Tell whether *frame* is of stagescope itself."""
    return bool(OURS.search(frame.file)) or MARK.fullmatch(frame.function) is not None
