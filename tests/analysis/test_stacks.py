"""Slow against median: stacks laid over requests."""

from dataclasses import replace

from stagescope.analysis.stacks import (
    Request,
    StageInterval,
    diff_text,
    overlaid,
    percentile,
    slow_diff,
    top_text,
)
from stagescope.stacks import Frame, StackSpan

MS = 1_000_000


def span(start_ms: float, function: str, stage: str = "inference", pid: int = 1) -> StackSpan:
    """Ten samples in 20 ms."""
    start = int(start_ms * MS)
    frames = (Frame("main", "a.py", 1), Frame(function, "a.py", 2))
    return StackSpan(pid, 1, "MainThread", start, start + 20 * MS, 10, stage, "block", True, frames,
                     "window", "py-spy")  # fmt: skip


def request(start_ms: int, duration_ms: int, stage: str = "inference", pid: int = 1) -> Request:
    """A request that was in one stage all the time."""
    interval = StageInterval(stage, start_ms * MS, (start_ms + duration_ms) * MS)
    return Request(pid, duration_ms * MS, (interval,))


def test_a_sample_belongs_to_the_requests_in_its_stage_and_process() -> None:
    """Others at that time do not count; one that ended within the error does, if no other."""
    requests = [
        request(0, 100), request(50, 100), request(0, 100, "preprocess"), request(0, 100, pid=2),
    ]  # fmt: skip
    found = {one.start_ns // MS: [requests.index(r) for r in rs]
             for one, rs in overlaid(
                 [replace(span(at, "f"), samples=1) for at in (10, 60, 155, 500)], requests)}  # fmt: skip
    assert found == {10: [0], 60: [0, 1], 155: [1], 500: []}


def test_what_the_slow_ones_have_more_of_comes_first() -> None:
    """99 requests of 30 ms run `usual`, one of 300 ms runs `rare` too."""
    requests = [request(n * 1000, 30) for n in range(99)] + [request(99_000, 300)]
    spans = [span(n * 1000 + 5, "usual") for n in range(99)]
    spans += [span(99_005, "usual"), span(99_105, "rare"), span(99_205, "rare")]
    diff = slow_diff([*spans, span(10, "idle", "")], requests)
    assert (diff.slow_requests, diff.median_requests, diff.unmatched) == (1, 99, 0)
    rare, usual, stage = diff.shares()  # `main` is in all of them, and says nothing
    assert (rare.function, round(rare.difference, 3)) == ("rare", 0.667)
    assert (usual.function, round(usual.difference, 3)) == ("usual", -0.667)
    assert (stage.function, round(stage.slow, 9), round(stage.median, 9)) == ("", 1.0, 1.0)
    text = diff_text(diff, "about", 2)
    assert text.splitlines()[4] == "    67%     0%    +67  inference: rare (a.py)"


def test_nothing_gives_nothing() -> None:
    """No requests, no spans, no percentile."""
    diff = slow_diff([span(0, "f")], [])
    assert (diff.slow, diff.median, diff.unmatched) == ((), (), 1)
    assert percentile([], 0.5) == 0
    assert percentile([1, 2, 3, 4], 0.25) == 2


def test_the_top_is_by_stage() -> None:
    """The stage with most time first; own time before the time below."""
    text = top_text([span(0, "f"), span(20, "g"), span(40, "g"), span(60, "h", "")], "about", 5)
    lines = text.splitlines()
    assert lines[0] == "about"
    assert [line.split()[0] for line in lines if line and not line.startswith(" ")][1:] == [
        "inference", "(no",
    ]  # fmt: skip
    assert lines[4] == "    67%    67%  g (a.py)"
    assert lines[-2:] == [
        "(no stage)  0.02 s, n = 10",
        "   fewer than 20 samples: too few for shares",
    ]


def test_shares_of_almost_nothing_are_not_shown() -> None:
    """Ten samples of slow requests against 990: how many there are, and no percentage."""
    requests = [request(n * 1000, 30) for n in range(99)] + [request(99_000, 300)]
    diff = slow_diff([span(n * 1000 + 5, "usual") for n in range(100)], requests)
    text = diff_text(diff, "about", 5)
    assert "n = 10 samples of slow requests, 990 of median ones" in text
    assert "%" not in text


def test_what_rounds_to_nothing_has_no_row() -> None:
    """One sample in 300 of a function is not shown as 0 %."""
    text = top_text([*(span(n * 20, "f") for n in range(299)), span(9000, "g")], "about", 5)
    assert " f (a.py)" in text
    assert " g (a.py)" not in text
