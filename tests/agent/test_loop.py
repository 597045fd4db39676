"""The agent as a whole, on a thread: restarts, checkpoints, counters, faults."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from stagescope.agent.collectors import PeriodicTask
from stagescope.agent.loop import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, Agent, next_pause_s
from stagescope.records import Record
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import running_agent
from tests.support.rings import write_ring
from tests.support.sinks import KeepingSink


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as folder:
        yield folder


def test_clean_restarts_neither_lose_nor_double_a_record(spool: Path) -> None:
    """Ten agents, one after the other, on two workers that go on writing: each record once."""
    kept = [KeepingSink() for _ in range(10)]
    with write_ring(spool / "a.ring", 0) as one, write_ring(spool / "b.ring", 0) as two:
        for sink in kept:
            for _ in range(9):
                one.request("run")
                two.batch("run")
            with running_agent(spool, kept=sink) as agent:
                assert agent.catch_up()
                one.request("run")
        found = Counter(
            (record.process.ring_id, record.seq) for sink in kept for record in sink.records
        )
        assert set(found.values()) == {1}
        assert len(found) == one.next_seq + two.next_seq == 190
        with running_agent(spool) as agent:
            counts = agent.runs.counts("run")
            assert counts is not None
            assert (counts.requests, counts.batches) == (100, 90)


def test_what_a_sink_has_not_settled_is_read_again(spool: Path) -> None:
    """An agent that dies before a sink has sent its records gives them to the next agent."""
    with write_ring(spool / "a.ring", 5) as writer:
        slow = KeepingSink(settles=False)
        dies = Agent(spool, {"slow": slow})
        dies.step()
        slow.settle()
        dies.hurry()
        dies.step()  # saves: five are settled
        writer.request()
        dies.hurry()
        dies.step()
        dies.step()
        assert len(slow.records) == 6
        dies._drain.close()  # no clean end: what was not settled was not saved
        again = KeepingSink()
        after = Agent(spool, {"again": again})
        after.step()
        assert [record.seq for record in again.records] == [5]
        after.close()


def test_a_dead_workers_file_goes_only_when_all_is_settled(spool: Path) -> None:
    """The file of a dead process stays until the slowest sink has settled its records."""
    writer = write_ring(spool / "a.ring", 5)
    writer.begin(0)
    writer.close()
    slow = KeepingSink(settles=False)
    with running_agent(spool, slow=slow) as agent:
        wait_until(lambda: len(slow.records) == 6)
        assert agent.catch_up()
        assert writer.path.exists()
        slow.settle()
        wait_until(lambda: not writer.path.exists())
        assert agent.counters()["rings_ended"] == 1


def test_counters_are_flat_numbers_with_the_sinks_by_name(spool: Path) -> None:
    """Every counter and gauge is a number; a sink's stand under its name."""
    with write_ring(spool / "a.ring", 3) as writer:
        writer.set_counter("faults", 2)
        with running_agent(spool, mine=KeepingSink()) as agent:
            assert agent.catch_up()
            numbers = agent.counters() | agent.gauges()
    assert all(isinstance(number, int | float) for number in numbers.values())
    assert numbers["mine_kept"] == 3
    assert numbers["records"] == 3
    assert numbers["writer_faults"] == 2
    assert numbers["faults"] == 0
    assert numbers["rings"] == 1
    assert numbers["request_base_ns"] == 3000
    assert numbers["request_stage_ns"] == 500
    assert numbers["cpu_s"] > 0


class BrokenSink(KeepingSink):
    """A sink with a fault of its own."""

    def accept(self, records: Sequence[Record]) -> None:
        """Fail."""
        raise RuntimeError("a planted fault")


def test_a_faulty_sink_ends_no_other(
    spool: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A sink that raises is counted and logged once; the other sinks get every record."""
    monkeypatch.delenv("STAGESCOPE_RAISE")
    good = KeepingSink()
    with (
        write_ring(spool / "a.ring", 3) as writer,
        caplog.at_level(logging.ERROR, "stagescope"),
        running_agent(spool, bad=BrokenSink(), good=good) as agent,
    ):
        assert agent.catch_up()
        writer.request()
        assert agent.catch_up()
        assert len(good.records) == 4
        assert agent.counters()["faults"] == 2
    assert caplog.text.count("RuntimeError: a planted fault") == 1


def test_collectors_are_called_at_their_period(spool: Path) -> None:
    """A collector is called at once, then when its period is over, by the agent's clock."""
    now = 0
    calls: list[int] = []
    agent = Agent(
        spool,
        {},
        clock=lambda: now,
        samplers=lambda _: [PeriodicTask("calls", 2.0, lambda: calls.append(now))],
    )
    for now in range(0, 5_000_000_000, 500_000_000):  # noqa: B007 - the clock reads it
        agent.step()
    assert calls == [0, 2_000_000_000, 4_000_000_000]
    agent.close()


def test_pauses_grow_while_nothing_comes() -> None:
    """No pause where more waits, the shortest after records, growing to the longest in silence."""
    assert next_pause_s(0.2, records=9, more=True) == 0
    assert next_pause_s(0.2, records=9, more=False) == SHORTEST_PAUSE_S
    pause = SHORTEST_PAUSE_S
    for _ in range(10):
        pause = next_pause_s(pause, records=0, more=False)
    assert pause == LONGEST_PAUSE_S


def test_an_unreadable_cursor_file_is_put_aside(
    spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged cursor file is said, kept, and costs at most records read twice."""
    (spool / "agent.cursors").write_text('{"torn": ')
    sink = KeepingSink()
    with write_ring(spool / "a.ring", 3), running_agent(spool, sink=sink) as agent:
        assert agent.catch_up()
        assert len(sink.records) == 3
    assert "agent.cursors" in caplog.text
    assert (spool / "agent.broken").exists()
