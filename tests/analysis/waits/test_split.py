"""Waits told apart from work, on facts made by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from stagescope.analysis.waits.requests import Served, Waits, segments
from stagescope.analysis.waits.split import split
from stagescope.stages import WaitFact, partition

MS = 1_000_000


def request(
    key: str,
    start: int,
    stages: Sequence[tuple[str, int, int]],
    facts: Sequence[tuple[str, int, int]],
    sent: int | None = None,
) -> Served:
    """Make a request of one process and loop; all times in ms."""
    return Served(
        key=key,
        process="p",
        start_ns=start * MS,
        duration_ns=max(end for _, _, end in stages) * MS,
        sent_ns=(start if sent is None else sent) * MS,
        stages=[(name, first * MS, last * MS) for name, first, last in stages],
        facts=[WaitFact(kind, 0, first * MS, last * MS) for kind, first, last in facts],
    )


def charged(waits: Waits) -> dict[tuple[str, str], int]:
    """Return the estimates, in ms."""
    return {key: charge.ns // MS for key, charge in waits.charges.items()}


HOLDER = request("a", 100, [("preprocess", 0, 20), ("respond", 20, 21)], [("ran", 0, 21)])


def test_stages_opened_later_are_charged_first() -> None:
    """The partition rule, as stretches of time, the time before the first line in front."""
    served = request("a", 10, [("inference", 0, 9), ("inference.h2d", 2, 4)], [], sent=8)
    assert [(a // MS, b // MS, name) for a, b, name in segments(served)] == [
        (8, 10, "network.request"),
        (10, 12, "inference"),
        (12, 14, "inference.h2d"),
        (14, 19, "inference"),
    ]


def test_ready_until_resumed_is_a_wait_for_the_loop_held_by_who_ran() -> None:
    """It is exact, charged to the stage that waited, and laid at the door of who ran."""
    waiting = request("b", 95, [("inference", 0, 27)], [("ready", 7, 26)])
    waits = split([HOLDER, waiting])["b"]
    assert charged(waits) == {("inference", "event_loop"): 19}
    charge = waits.charges["inference", "event_loop"]
    assert charge.ns == charge.low_ns == charge.high_ns
    assert waits.held == {("inference", "preprocess"): 18 * MS, ("inference", "respond"): MS}


def test_what_another_task_of_the_request_runs_is_its_own_time() -> None:
    """Behind `@app.middleware("http")` an app runs in a task of its own, for which one waits."""
    facts = [("ran", 5, 25), ("ready", 0, 30)]
    waits = split([request("b", 0, [("endpoint", 0, 30)], facts)])["b"]
    assert charged(waits) == {("endpoint", "event_loop"): 10}


def test_a_late_timer_of_a_free_loop_is_no_wait() -> None:
    """A timer that comes a millisecond late while nobody ran stays with the stage."""
    waits = split([request("b", 0, [("inference", 0, 10)], [("due", 9, 10)])])["b"]
    assert charged(waits) == {}


def test_what_came_from_outside_has_bounds() -> None:
    """Ready at an unknown moment: between when the loop was last free and when it resumed."""
    waiting = request("b", 95, [("inference", 0, 27)], [("awaited", 0, 26)])
    free = [
        request(f"f{n}", 1_000 * n, [("inference", 0, 9)], [("awaited", 0, 9)])
        for n in range(5, 11)
    ]
    waits = split([HOLDER, waiting, *free])["b"]
    charge = waits.charges["inference", "event_loop"]
    assert (charge.low_ns, charge.ns, charge.high_ns) == (0, 17 * MS, 21 * MS)
    alone = split([HOLDER, waiting])["b"].charges["inference", "event_loop"]
    # Where nothing says more, the middle of the bounds, not one of them.
    assert (alone.low_ns, alone.ns, alone.high_ns) == (0, 10.5 * MS, 21 * MS)


def test_each_thing_that_a_stage_awaits_has_a_usual_time_of_its_own() -> None:
    """None found the loop free for both: the connection takes 1 ms, the answer 9, not what both
    took in the requests that waited least."""
    served: list[Served] = []
    for n in range(6):
        at = 1_000 * (n + 5)
        # Its connection is ready at once, and its answer is held up for 40 ms.
        facts = [("awaited", 0, 1), ("ran", 1, 2), ("awaited", 2, 51)]
        served.append(request(f"c{n}", at, [("inference", 0, 51)], facts))
        served.append(request(f"h{n}", at + 5, [("preprocess", 0, 46)], [("ran", 0, 46)]))
        # The other way round.
        at += 500
        facts = [("awaited", 0, 31), ("ran", 31, 32), ("awaited", 32, 41)]
        served.append(request(f"d{n}", at, [("inference", 0, 41)], facts))
        served.append(request(f"g{n}", at, [("preprocess", 0, 31)], [("ran", 0, 31)]))

    found = split(served)

    assert charged(found["c0"]) == {("inference", "event_loop"): 40}
    assert charged(found["d0"]) == {("inference", "event_loop"): 30}


def test_a_short_break_bounds_no_wait() -> None:
    """Between two holds lie 4 ms: the estimate takes them for idle, the bounds do not."""
    later = request("c", 125, [("preprocess", 0, 20)], [("ran", 0, 20)])
    waiting = request("b", 95, [("inference", 0, 51)], [("awaited", 0, 50)])
    charge = split([HOLDER, later, waiting])["b"].charges["inference", "event_loop"]
    assert (charge.low_ns, charge.high_ns) == (0, 45 * MS)
    assert charge.ns == 10 * MS


def test_before_the_first_line_the_network_has_what_the_loop_was_free_for() -> None:
    """Sent 5 ms into a hold of 21 ms: 16 ms are the loop's, the rest is the network's."""
    waiting = request("b", 123, [("inference", 0, 5)], [("ran", 0, 1)], sent=105)
    waits = split([HOLDER, waiting])["b"]
    assert charged(waits) == {("network.request", "event_loop"): 16}


def test_breaks_of_a_loop_that_has_something_to_do_are_no_sleep() -> None:
    """Two stages held the loop, and 3 ms between them nobody known: none of it is the network's."""
    later = request("c", 124, [("preprocess", 0, 20)], [("ran", 0, 20)])
    waiting = request("b", 144, [("inference", 0, 5)], [("ran", 0, 1)], sent=105)
    waits = split([HOLDER, later, waiting])["b"]
    assert charged(waits) == {("network.request", "event_loop"): 39}


def test_code_of_no_request_holds_the_loop_unnamed() -> None:
    """What a task of the app ran while a request was ready is a wait for the loop, held unnamed."""
    waiting = request("b", 0, [("inference", 0, 30)], [("ready", 5, 25), ("busy", 5, 25)])
    waits = split([waiting])["b"]
    assert charged(waits) == {("inference", "event_loop"): 20}
    assert waits.held == {("inference", ""): 20 * MS}


def test_ready_while_only_threads_compute_waits_for_the_interpreters_lock() -> None:
    """The loop ran nobody, and a worker thread computed: the loop had no lock."""
    thread = request("a", 0, [("preprocess", 0, 40)], [("thread", 0, 40)])
    waiting = request("b", 0, [("inference", 0, 30)], [("ready", 5, 25)])
    assert charged(split([thread, waiting])["b"]) == {("inference", "gil"): 20}


def test_a_collection_within_a_sleep_is_no_wait() -> None:
    """Until its timer is due a request waits for nobody, whatever the process does meanwhile."""
    sleeping = request(
        "b", 0, [("inference", 0, 20)], [("gc", 2, 8), ("gc", 12, 16), ("due", 10, 20)]
    )
    assert charged(split([sleeping])["b"])["inference", "gc"] == 4


def test_a_process_that_was_stopped_waits_for_nothing_else() -> None:
    """Of 30 ms in which it was ready, 20 went by while the process was stopped."""
    waiting = request("b", 0, [("inference", 0, 40)], [("ready", 5, 35), ("stopped", 10, 30)])
    assert charged(split([waiting])["b"]) == {
        ("inference", "stopped"): 20,
        ("inference", "event_loop"): 10,
    }


def test_a_run_queue_is_charged_over_the_stages_that_ran() -> None:
    """A thread without a core for 12 of 24 ms: each stage has its share, and the loop none."""
    served = request(
        "b", 0, [("preprocess", 0, 16), ("inference", 16, 24)], [("ran", 0, 24), ("queued", 0, 12)]
    )
    assert charged(split([served])["b"]) == {("preprocess", "cpu"): 8, ("inference", "cpu"): 4}


def test_a_collection_stops_all_and_is_nobodys_loop_wait() -> None:
    """While the collector runs, a request that waits for the loop waits for the collector."""
    holder = request("a", 100, [("preprocess", 0, 20)], [("ran", 0, 20), ("gc", 5, 15)])
    waiting = request("b", 95, [("inference", 0, 26)], [("ready", 5, 25)])
    assert charged(split([holder, waiting])["b"]) == {
        ("inference", "gc"): 10,
        ("inference", "event_loop"): 10,
    }


def test_the_interpreters_lock_is_an_estimate_between_bounds() -> None:
    """A thread is off its core no more when alone: what it is beside others was the lock's."""
    alone = [
        request(f"f{n}", 1_000 * n, [("inference", 0, 4)], [("thread", 0, 4)]) for n in range(5)
    ]
    beside = request("a", 9_000, [("inference", 0, 8)], [("thread", 0, 8)])
    waiting = request("b", 9_000, [("inference", 0, 8)], [("thread", 0, 8)])

    def waited(slept: int) -> tuple[int, int, int]:
        off = WaitFact("off", slept, 0, 4 * MS)
        served = replace(waiting, facts=[*waiting.facts, off])
        charge = split([*alone, beside, served])["b"].charges["inference", "gil"]
        return charge.low_ns, charge.ns, charge.high_ns

    assert waited(slept=3) == (0, 4 * MS, 4 * MS)
    # Who waits for that lock wakes every 5 ms, to look again: one sleep is mostly something else.
    assert waited(slept=1) == (0, 2.5 * MS, 4 * MS)


def test_a_batch_is_at_work_in_one_thread_for_all_of_its_members() -> None:
    """Its members do not contend for the lock with one another, but with another thread they do."""
    alone = [
        request(f"f{n}", 1_000 * n, [("inference", 0, 4)], [("thread", 0, 4)]) for n in range(5)
    ]
    facts = [("thread", 0, 20), ("off", 0, 12)]
    members = [request(key, 9_000, [("inference", 0, 20)], facts) for key in "ab"]
    assert [charged(split([*alone, *members])[key]) for key in "ab"] == [{}, {}]

    beside = request("c", 9_000, [("preprocess", 0, 20)], [("thread", 1, 20)])
    waits = split([*alone, *members, beside])
    for key in "ab":
        assert 0 < charged(waits[key])["inference", "gil"] <= 12
    assert charged(waits["c"]) == {}


SPANS = st.lists(st.tuples(st.integers(-3, 40), st.integers(-3, 40)).map(sorted), max_size=6)


@given(SPANS)
def test_segments_are_the_partition_as_stretches(spans: list[list[int]]) -> None:
    """Each stage has as many ns of the segments as the partition charges to it."""
    stages = [(str(index), first, last) for index, (first, last) in enumerate(spans)]
    sums: Counter[str] = Counter()
    for first, last, stage in segments(Served("a", "p", 100, 30, 100, stages, [])):
        sums[stage] += last - first
    amounts, other = partition([(first, last) for first, last in spans], 30)
    assert sums == Counter({str(n): ns for n, ns in enumerate(amounts)}) + Counter(other=other)
