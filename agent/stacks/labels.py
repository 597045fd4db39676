"""Which stage a stack is in: by marks between its frames, and by the blocks that its lines lie in.

Neither needs a clock: the stack itself says it. The innermost of both wins, as the stage opened
last is the one that is charged.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stagescope.agent.stacks.source_blocks import Source, SourceFiles
from stagescope.agent.stacks.thread_cpu import with_cpu
from stagescope.records import RequestRecord
from stagescope.stacks import Frame, StackSpan, ThreadCpu
from stagescope.stages import opened_last

MARK = re.compile(r"(?:.*\.)?__stage_(.+)__")
"""`middleware/stage.py`; py-spy puts a class before a method's name."""
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

    def label(
        self,
        pid: int,
        raws: Sequence[RawStack],
        reason: str,
        how: str,
        readings: Sequence[ThreadCpu] = (),
    ) -> list[StackSpan]:
        """Return the spans of *raws*, all of process *pid*, without threads and frames of ours.

        *readings* are of the CPU time of its threads while these were seen.
        """
        sources = self._sources.of(pid, {frame.file for raw in raws for frame in raw.frames})
        spans = [
            _span(pid, raw, sources, reason, how)
            for raw in raws
            if not raw.thread.startswith(OUR_THREADS)
        ]
        ours = {raw.thread_id for raw in raws if raw.thread.startswith(OUR_THREADS)}
        return with_cpu([span for span in spans if span.frames], readings, ours)


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
    """Return stage and how it is known (`StackSpan.by`), from *frames*, outermost first."""
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
    """Return whether the thread waits, by the name of its innermost function, or of what it calls."""
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
    """Return whether *frame* is of stagescope itself."""
    return bool(OURS.search(frame.file)) or MARK.fullmatch(frame.function) is not None


# The last resort for a stack whose frames show no stage: what the one request did at that time.
#
# Only where exactly one request was being served in the process, and no other thread ran. The
# times of samples have an error (py-spy's: 10 ms and one period), marks and blocks have none: so a
# stage is named only where it lasted from *error* before the sample to *error* after it.


def with_intervals(
    spans: Sequence[StackSpan],
    served: Sequence[RequestRecord],
    serving_since_ns: Sequence[int],
    whole_since_ns: int,
    error_ns: int,
) -> list[StackSpan]:
    """Return *spans* of one process, with a stage where its requests show one.

    *served* are those that ended, all from *whole_since_ns* on; *serving_since_ns* the starts of
    those that did not; *error_ns* is how far the times of *spans* may be off.
    """
    running = sorted((s for s in spans if s.running), key=lambda span: span.start_ns)
    starts = [span.start_ns for span in running]
    oldest_ns = min(serving_since_ns, default=1 << 63)

    def alone(span: StackSpan, at_ns: int) -> bool:
        before = running[: bisect_right(starts, at_ns)]
        return not any(
            other.end_ns > at_ns and other.thread_id != span.thread_id for other in before
        )

    def labelled(span: StackSpan) -> StackSpan:
        at_ns = span.seen_ns
        since_ns, until_ns = at_ns - error_ns, at_ns + error_ns
        if span.stage or not span.running or not whole_since_ns <= since_ns < until_ns < oldest_ns:
            return span
        there = [
            one
            for one in served
            if one.start_ns <= until_ns and since_ns < one.start_ns + one.duration_ns
        ]
        if len(there) != 1 or not alone(span, at_ns):
            return span
        stages = {stage_at(there[0], ns) for ns in (since_ns, at_ns, until_ns)}
        stage = stages.pop() if len(stages) == 1 else ""
        return replace(span, stage=stage, by="interval") if stage else span

    return [labelled(span) for span in spans]


def stage_at(request: RequestRecord, at_ns: int) -> str:
    """Return the stage that is charged at *at_ns*; empty where none is open."""
    since_ns = at_ns - request.start_ns
    last = opened_last([span for span in request.stages if span.start_ns <= since_ns < span.end_ns])
    return last.stage if last else ""
