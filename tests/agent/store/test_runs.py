"""The run store: each record once, whole lines, bounded."""

import errno
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stagescope.agent.store import runs
from stagescope.agent.store.runs import BLOCK_BYTES, IDLE_S, MAX_AGE_S, MAX_UNOPENED, RunStore
from stagescope.agent.store.serialize import parse_lines
from stagescope.errors import UsageError
from stagescope.recorder.reader import RecorderReader
from stagescope.records import BatchRecord, Record, RequestRecord, State
from tests.support.rings import RingWriter


def some_records(spool: Path, run_id: str = "run", count: int = 10) -> list[Record]:
    """Return *count* records of one process, one a batch, one died in flight."""
    path = spool / f"{run_id}.ring"
    with RingWriter(path) as writer:
        for _ in range(count - 2):
            writer.request(run_id)
        writer.batch(run_id)
        writer.begin(0, run_id)
    with RecorderReader(path) as reader:
        found = reader.poll() + reader.in_flight(2**62)
    assert len(found) == count
    return found


def stored(store: RunStore, run_id: str = "run") -> list[Record]:
    """Read a run back."""
    blocks = store.read(run_id)
    assert blocks is not None
    return list(parse_lines(b"".join(blocks).splitlines()))


def test_records_are_kept_and_counted(tmp_path: Path) -> None:
    """What is accepted is read back equal; requests, batches and deaths are counted apart."""
    store, records = RunStore(tmp_path / "runs"), some_records(tmp_path)
    store.accept(records[:5])
    store.accept(records[5:])
    assert stored(store) == records
    counts = store.counts("run")
    assert counts == runs.RunCounts("run", requests=9, batches=1, finished=8, died=1)
    assert store.accepted == store.settled == 10


def test_each_record_is_kept_once(tmp_path: Path) -> None:
    """Records that an agent reads again after SIGKILL are known again, the dead too."""
    records = some_records(tmp_path)
    RunStore(tmp_path / "runs").accept(records[:6])
    store = RunStore(tmp_path / "runs")
    store.accept(records[2:])
    store.accept(records)
    assert stored(store) == records
    assert store.counters()["duplicates"] == 4 + 10


def test_a_torn_tail_is_cut_and_written_again(tmp_path: Path) -> None:
    """Wherever the agent was killed in writing, the file goes on after its last whole line."""
    records = some_records(tmp_path)
    RunStore(tmp_path / "runs").accept(records)
    path = tmp_path / "runs" / "run.ndjson"
    whole = path.read_bytes()
    for cut in (len(whole) - 1, len(whole) // 2, 10, 1):
        path.write_bytes(whole[:cut])
        before = RunStore(tmp_path / "runs")
        assert len(stored(before)) < len(records)
        after = RunStore(tmp_path / "runs")
        after.accept(records)
        assert stored(after) == records


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    """The folder is 0700, its files are 0600, whatever the umask."""
    before = os.umask(0)
    try:
        store = RunStore(tmp_path / "runs")
        store.accept(some_records(tmp_path))
    finally:
        os.umask(before)
    assert (tmp_path / "runs").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "runs" / "run.ndjson").stat().st_mode & 0o777 == 0o600


def test_records_of_no_run_are_not_kept(tmp_path: Path) -> None:
    """Requests outside load runs leave nothing here."""
    store = RunStore(tmp_path / "runs")
    store.accept([replace(record, run_id="") for record in some_records(tmp_path)])
    assert list((tmp_path / "runs").iterdir()) == []
    assert store.settled == 10


@pytest.mark.parametrize("run_id", ["../evil", "a/b", ".hidden", "x" * 41, "a b"])
def test_an_id_that_names_a_file_elsewhere_is_refused(tmp_path: Path, run_id: str) -> None:
    """A recorder file with an odd run id writes nowhere; asking for one is a usage error."""
    store = RunStore(tmp_path / "runs")
    store.accept([replace(record, run_id=run_id) for record in some_records(tmp_path)])
    assert list((tmp_path / "runs").iterdir()) == []
    assert store.counters()["refused"] == 10
    with pytest.raises(UsageError, match="is no run id"):
        store.counts(run_id)


def test_the_oldest_whole_run_makes_room(tmp_path: Path) -> None:
    """Over the cap the run goes that was written to longest ago, and is counted."""
    of = {name: some_records(tmp_path, name) for name in ("one", "two", "three")}
    first = RunStore(tmp_path / "runs")
    first.accept(of["one"])
    size = first.gauges()["runs_bytes"]
    store = RunStore(tmp_path / "runs", max_bytes=int(size * 2.5))
    store.accept(of["two"])
    os.utime(tmp_path / "runs" / "one.ndjson", (1e9, 1e9))
    os.utime(tmp_path / "runs" / "two.ndjson", (2e9, 2e9))
    store.accept(of["three"])
    assert store.counts("one") is None
    assert stored(store, "two") == of["two"]
    assert stored(store, "three") == of["three"]
    assert store.counters()["evicted_runs"] == 1


def test_a_run_that_is_larger_than_the_cap_keeps_what_it_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What finds no room is left out, counted and logged once; what is there stays whole."""
    records = some_records(tmp_path)
    store = RunStore(tmp_path / "runs", max_bytes=BLOCK_BYTES)
    with caplog.at_level(logging.WARNING, "stagescope"):
        for record in records:
            store.accept([record])
    kept = stored(store)
    assert 0 < len(kept) < len(records)
    assert kept == records[: len(kept)]
    assert store.counters()["refused"] == len(records) - len(kept)
    assert len(caplog.records) == 1


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk takes half of the lines, the file is as it was, and goes on later."""
    records = some_records(tmp_path)
    store = RunStore(tmp_path / "runs")
    store.accept(records[:3])
    pwrite = os.pwrite

    def half(fd: int, data: bytes, at: int) -> int:
        if len(data) < 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, bytes(data[: len(data) // 2]), at)

    monkeypatch.setattr(os, "pwrite", half)
    store.accept(records[3:6])
    monkeypatch.undo()
    assert stored(store) == records[:3]
    assert store.counters()["refused"] == 3
    store.accept(records[6:])
    assert stored(store) == records[:3] + records[6:]


def test_a_run_refused_at_first_is_readable_later(tmp_path: Path) -> None:
    """Records that were refused leave no trace: what is stored later introduces its process."""
    records = some_records(tmp_path)
    store = RunStore(tmp_path / "runs", max_bytes=100)
    store.accept(records[:5])
    assert store.counts("run") is None
    store._max_bytes = 1 << 20
    store.accept(records[5:])
    assert stored(store) == records[5:]


def test_a_file_that_somebody_cut_is_left_alone(tmp_path: Path) -> None:
    """Where the file shrank under the agent, records are refused rather than holes written."""
    records = some_records(tmp_path)
    store = RunStore(tmp_path / "runs")
    store.accept(records[:5])
    os.truncate(tmp_path / "runs" / "run.ndjson", 10)
    store.accept(records[5:])
    assert store.counters()["refused"] == 5
    assert (tmp_path / "runs" / "run.ndjson").stat().st_size == 10


def test_invented_runs_are_few_and_the_opened_one_is_whole(tmp_path: Path) -> None:
    """A client that names a new run in every request makes neither files nor room for itself."""
    store = RunStore(tmp_path / "runs")
    store.open("mine")
    mine = some_records(tmp_path, "mine")
    for number, record in enumerate(mine):
        invented = (replace(record, run_id=f"x{number}-{n}") for n in range(MAX_UNOPENED))
        store.accept([*invented, record])
    files = [path.stem for path in (tmp_path / "runs").glob("*.ndjson")]
    assert len(files) == MAX_UNOPENED + 1
    assert stored(store, "mine") == mine
    assert store.counters()["refused"] == (len(mine) - 1) * MAX_UNOPENED
    assert store.gauges()["runs_bytes"] >= len(files) * BLOCK_BYTES


def test_an_idle_run_gives_way_to_a_new_one(tmp_path: Path) -> None:
    """The one that was written to longest ago, and never one that was opened."""
    now = [time.time()]
    store = RunStore(tmp_path / "runs", wall=lambda: now[0])
    (record, *_) = some_records(tmp_path)
    store.open("opened")
    for name in ("opened", *(f"r{n}" for n in range(MAX_UNOPENED))):
        store.accept([replace(record, run_id=name)])
        os.utime(tmp_path / "runs" / f"{name}.ndjson", (now[0], now[0]))
    os.utime(tmp_path / "runs" / "opened.ndjson", (now[0] - 50, now[0] - 50))
    os.utime(tmp_path / "runs" / "r7.ndjson", (now[0] - 10, now[0] - 10))
    store.accept([replace(record, run_id="new")])
    assert store.counts("new") is None
    now[0] += IDLE_S
    store.accept([replace(record, run_id="new")])
    assert store.counts("new") is not None
    assert store.counts("r7") is None
    assert store.counts("opened") is not None


def test_a_run_stays_open_across_a_restart_of_the_agent(tmp_path: Path) -> None:
    """Until it is closed."""
    RunStore(tmp_path / "runs").open("mine")
    assert (tmp_path / "runs" / "mine.open").exists()
    RunStore(tmp_path / "runs").close_run("mine")
    assert not (tmp_path / "runs" / "mine.open").exists()
    with pytest.raises(UsageError, match="is no run id"):
        RunStore(tmp_path / "runs").open("../elsewhere")


def test_old_runs_are_forgotten(tmp_path: Path) -> None:
    """A run that nothing was added to for a day is deleted."""
    RunStore(tmp_path / "runs").accept(some_records(tmp_path))
    written = (tmp_path / "runs" / "run.ndjson").stat().st_mtime
    store = RunStore(tmp_path / "runs", wall=lambda: written + MAX_AGE_S - 1)
    assert store.counts("run") is not None
    store = RunStore(tmp_path / "runs", wall=lambda: written + MAX_AGE_S + 1)
    assert store.counts("run") is None
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_new_clock_anchor_is_told(tmp_path: Path) -> None:
    """A record is read back with the anchor that its process had then."""
    records = some_records(tmp_path)
    moved = replace(records[0].process, anchor=replace(records[0].process.anchor, wall_ns=7))
    mixed = [
        replace(record, process=moved if number % 2 else record.process)
        for number, record in enumerate(records)
    ]
    store = RunStore(tmp_path / "runs")
    store.accept(mixed)
    assert stored(store) == mixed
    assert {type(record) for record in mixed} == {RequestRecord, BatchRecord}
    assert {record.state for record in mixed} == {State.FINISHED, State.DIED}
