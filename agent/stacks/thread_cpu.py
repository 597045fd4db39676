"""The CPU time that each thread really used, laid over the stacks that were seen of it.

A thread may look as if it ran and use nothing: it sits in a read of a pipe, or waits for the
interpreter's lock. So a sample's weight is not its length but the CPU time that the kernel counted
for its thread between two readings, shared out over what the thread was seen to run between them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from stagescope.stacks import StackSpan, ThreadCpu

IDLE_SHARE = 0.02
"""A stack on which its thread used less of a core than this did not run, whatever it is called."""
READ_EVERY_NS = 200_000_000
A_THREAD_NS = 10_000_000
"""For each thread that a process has, one reading takes place so much later: about 0.2 % of a core."""


def with_cpu(
    spans: Sequence[StackSpan], readings: Sequence[ThreadCpu], ours: Collection[int]
) -> list[StackSpan]:
    """Return *spans* of one process with the CPU time of each; unchanged below two *readings*.

    *ours* are ids of threads of stagescope's own: what they use is nobody's stage.
    """
    if len(readings) < 2 or not readings[0].used_ns:
        return list(spans)
    by_thread: dict[int, list[int]] = {}
    for index, span in enumerate(spans):
        by_thread.setdefault(span.thread_id, []).append(index)
    used_ns = [0.0] * len(spans)
    for before, after in pairwise(sorted(readings)):
        found = _charged(spans, by_thread, before, after, set(ours))
        for index, amount in found.items():
            used_ns[index] += amount
    return [_with(span, round(own)) for span, own in zip(spans, used_ns, strict=True)]


def _with(span: StackSpan, cpu_ns: int) -> StackSpan:
    ran = cpu_ns >= IDLE_SHARE * (span.end_ns - span.start_ns)
    return replace(span, cpu_ns=cpu_ns, running=span.running and ran)


def _charged(
    spans: Sequence[StackSpan],
    by_thread: Mapping[int, Sequence[int]],
    before: ThreadCpu,
    after: ThreadCpu,
    ours: set[int],
) -> dict[int, float]:
    """Return by span what was used between two readings."""
    charged: dict[int, float] = {}
    rest = 0
    for thread, amount in _spent(by_thread, before, after, ours).items():
        own = by_thread.get(thread, ())
        shares = _shares(spans, own, before.at_ns, after.at_ns)
        whole = sum(shares.values())
        if not whole:
            rest += amount
        for index, share in shares.items():
            charged[index] = charged.get(index, 0.0) + amount * share / whole
    # Native threads, of BLAS or of torch's operators, work for the Python threads that use the
    # processor beside them.
    factor = 1 + rest / (sum(charged.values()) or 1)
    return {index: own * factor for index, own in charged.items()}


def _spent(
    by_thread: Mapping[int, object], before: ThreadCpu, after: ThreadCpu, ours: set[int]
) -> dict[int, int]:
    """Return by thread what it used between two readings.

    Threads that began meanwhile, which a sampler may not know by their ids, are together thread 0.
    """
    spent: dict[int, int] = {}
    for thread, total in after.used_ns.items():
        if thread not in ours:
            known = thread in by_thread or thread in before.used_ns or 0 not in by_thread
            key = thread if known else 0
            spent[key] = spent.get(key, 0) + max(0, total - before.used_ns.get(thread, 0))
    return spent


def _shares(
    spans: Sequence[StackSpan], own: Sequence[int], since_ns: int, until_ns: int
) -> dict[int, int]:
    """Return for how long each span of one thread, *own*, ran between the two moments.

    Where it was only seen to wait then, it ran too shortly to be seen: as it ran at other times.
    A thread that was never seen to run, used it by waiting.
    """
    there = {
        index: length
        for index in own
        if (length := min(spans[index].end_ns, until_ns) - max(spans[index].start_ns, since_ns)) > 0
    }
    ran = [index for index in own if spans[index].running]
    return (
        {index: length for index, length in there.items() if spans[index].running}
        or {index: spans[index].end_ns - spans[index].start_ns for index in ran}
        or there
    )
