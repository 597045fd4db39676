"""What the drain hands over: every record once, from many files, the dead reported and buried."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from stagescope.agent.drain import Drain
from stagescope.recorder import format as fmt
from stagescope.records import Record, RequestRecord, State, last_stage
from stagescope.testing.spool import short_spool
from tests.support.rings import Opening, RingWriter, write_ring


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as folder:
        yield folder


def drained(drain: Drain, *, again: bool = True) -> list[Record]:
    """Look for files and read all that is there."""
    found: list[Record] = []
    drain.discover()
    while drain.poll(found.extend) and again:
        pass
    return found


def seqs(records: Sequence[Record], writer: RingWriter) -> list[int]:
    """Return the sequence numbers of one writer's records."""
    return [record.seq for record in records if record.process.ring_id == writer.ring_id]


def test_many_rings_give_every_record_in_order(spool: Path) -> None:
    """Twelve workers' records all come, each worker's in the order in which it wrote them."""
    writers = [write_ring(spool / f"{n}.ring", 5 + n) for n in range(12)]
    drain = Drain(spool, {})
    found = drained(drain)
    assert [seqs(found, writer) for writer in writers] == [list(range(5 + n)) for n in range(12)]
    assert drain.records == sum(5 + n for n in range(12))
    assert drained(drain) == []
    drain.close()
    for writer in writers:
        writer.close()


def test_small_batches_lose_nothing_and_give_way_between(spool: Path) -> None:
    """An embedded agent's small batches read the same records, and let the server in between."""
    ways: list[int] = []
    with write_ring(spool / "a.ring", 50) as writer:
        drain = Drain(spool, {}, batch=8, give_way=lambda: ways.append(1))
        assert seqs(drained(drain), writer) == list(range(50))
        assert len(ways) == 6
        drain.close()


def test_a_worker_that_comes_later_is_found(spool: Path) -> None:
    """A file that appears while the agent runs is read from its start."""
    drain = Drain(spool, {})
    assert drained(drain) == []
    with write_ring(spool / "late.ring", 3) as writer:
        assert seqs(drained(drain), writer) == [0, 1, 2]
        writer.request()
        assert seqs(drained(drain), writer) == [3]
        drain.close()


def test_overwritten_records_are_counted_exactly(spool: Path) -> None:
    """What a full ring wrote over before it was read is counted to the record, the rest comes."""
    with write_ring(spool / "a.ring", 64 + 37, ring_slots=64) as writer:
        drain = Drain(spool, {})
        assert seqs(drained(drain), writer) == list(range(37, 101))
        assert drain.counters()["overwritten"] == 37
        drain.close()
        assert drain.counters()["overwritten"] == 37


def test_a_dead_process_is_read_to_its_end_and_its_requests_in_flight_reported(
    spool: Path,
) -> None:
    """After the finished records come those in flight, in the state died, with their stage."""
    writer = write_ring(spool / "a.ring", 4)
    span = writer.begin(2, run_id="r", stage="preprocess")
    drain = Drain(spool, {})
    assert len(drained(drain)) == 4
    writer.request()
    writer.close()
    finished, died = drained(drain)
    assert (finished.seq, finished.state) == (4, State.FINISHED)
    assert isinstance(died, RequestRecord)
    assert (died.seq, died.state, died.span_id) == (-1, State.DIED, span)
    assert last_stage(died) == "preprocess"
    assert drain.ended() == [writer.path]
    assert drained(drain) == []
    drain.remove(drain.ended())
    assert not writer.path.exists()
    assert drain.counters()["died"] == 1


def test_a_living_process_is_never_buried(spool: Path) -> None:
    """The file of a process that still holds it is not at its end, however idle."""
    with write_ring(spool / "a.ring", 1):
        drain = Drain(spool, {})
        drained(drain)
        drained(drain)
        assert drain.ended() == []
        drain.close()


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("foreign", b"hello" * 500, "it is no recorder file"),
        ("empty", b"", "it is no recorder file"),
        ("short", fmt.MAGIC + bytes(80), "it is cut off after 88 bytes"),
    ],
)
def test_a_broken_file_is_said_once_and_loses_nothing_else(
    spool: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes, cause: str
) -> None:
    """One sentence that names file and cause, one count, and all other files are read."""
    (spool / f"{name}.ring").write_bytes(content)
    with write_ring(spool / "good.ring", 3), caplog.at_level(logging.WARNING, "stagescope"):
        drain = Drain(spool, {})
        assert len(drained(drain)) == 3
        drained(drain)
        drain.close()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert f"{name}.ring" in said[0]
    assert cause in said[0]
    assert drain.counters()["rings_broken"] == 1
    assert (spool / f"{name}.ring").exists()


def test_a_file_of_a_newer_format_is_said(spool: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A newer stagescope's file is left alone with the advice to upgrade."""
    with RingWriter(spool / "new.ring", version=fmt.VERSION + 1):
        drain = Drain(spool, {})
        assert drained(drain) == []
    assert "upgrade stagescope" in caplog.text


def test_a_file_cut_off_while_it_is_read_ends_no_other(
    spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Truncating a file under the agent is one sentence, not the agent's death by SIGBUS."""
    bad, good = write_ring(spool / "bad.ring", 3), write_ring(spool / "good.ring", 3)
    drain = Drain(spool, {})
    assert len(drained(drain)) == 6
    good.request()
    os.truncate(bad.path, 4096)
    assert seqs(drained(drain), good) == [3]
    assert "bad.ring" in caplog.text
    assert "cut off" in caplog.text
    drain.close()
    bad.close()
    good.close()


def test_a_spool_that_is_gone_is_no_fault(tmp_path: Path) -> None:
    """An agent whose spool was deleted finds nothing and goes on."""
    assert drained(Drain(tmp_path / "nowhere", {})) == []


def test_a_restart_inside_a_chained_timeline_keeps_it_whole(spool: Path) -> None:
    """A timeline of several slots, half read when the agent ended, is whole for the next one."""
    long = [Opening("inference", n * 10, n * 10 + 5) for n in range(fmt.ENTRIES_PER_SLOT)]
    span = "00000000000000aa"
    with RingWriter(spool / "a.ring") as writer:
        writer.request()
        writer.commit_chain_only(span, [Opening("respond", 5000, 5010)])
        first = Drain(spool, {})
        assert seqs(drained(first), writer) == [0]
        cursors = first.places()
        first.close()
        assert cursors[writer.ring_id].next_seq == 2
        assert cursors[writer.ring_id].chains_from == 1
        writer.request(stages=long, span_id=span)
        second = Drain(spool, cursors)
        (record,) = drained(second)
        assert isinstance(record, RequestRecord)
        assert len(record.stages) == fmt.ENTRIES_PER_SLOT + 1
        assert "respond" in record.self_ns()
        second.close()


def test_writers_counters_are_summed_and_outlive_their_files(spool: Path) -> None:
    """The sum over all processes never shrinks when one of them goes."""
    one, two = write_ring(spool / "1.ring", 1), write_ring(spool / "2.ring", 1)
    one.set_counter("unlisted", 3)
    two.set_counter("unlisted", 4)
    drain = Drain(spool, {})
    drained(drain)
    assert drain.counters()["unlisted"] == 7
    one.close()
    drained(drain)
    drain.remove(drain.ended())
    assert drain.counters()["unlisted"] == 7
    assert drain.rings() == 1
    drain.close()
    two.close()


def test_cost_is_the_mean_of_the_processes(spool: Path) -> None:
    """What the middleware costs is the mean over the live processes."""
    one, two = write_ring(spool / "1.ring", 0), write_ring(spool / "2.ring", 0)
    one.set_cost(base_ns=1000, stage_ns=100)
    two.set_cost(base_ns=3000, stage_ns=300)
    drain = Drain(spool, {})
    drained(drain)
    cost = drain.cost()
    assert (cost.base_ns, cost.stage_ns) == (2000, 200)
    drain.close()
    one.close()
    two.close()


def test_requests_in_flight_are_counted_by_service(spool: Path) -> None:
    """The gauge of active requests counts living processes' open requests, then zero."""
    writer = write_ring(spool / "1.ring", 2)
    writer.begin(0)
    writer.begin(3)
    drain = Drain(spool, {})
    drained(drain)
    assert drain.in_flight() == {"test": 2}
    writer.close()
    drained(drain)
    assert drain.in_flight() == {"test": 0}
    drain.close()
