"""The recorder file: read back exactly, said clearly when damaged, whole at every instant."""

import mmap
import os
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagescope.errors import RecorderFileError
from stagescope.middleware.batch import batch
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.timeline import Timeline
from stagescope.middleware.stage import stage
from stagescope.recorder import format as fmt
from stagescope.recorder.reader import RecorderReader
from stagescope.records import RequestRecord, State, last_stage
from stagescope.testing.recording import Recording


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """A small recorder file."""
    with closing(Recording(tmp_path / "spool", in_flight_slots=4, ring_slots=8)) as found:
        yield found


def write(recorder: Recorder, number: int, stages: int = 1) -> None:
    """Write one request in which every field tells the same number."""
    identity = (number + 1).to_bytes(16, "big")  # Ids of zero are none.
    start = 1 + number
    timeline = Timeline(
        recorder, fmt.KIND_REQUEST, start, identity, identity[8:], identity[8:],
        path=b"/%d" % number,
    )  # fmt: skip
    for index in range(stages):
        timeline.close_at(timeline.open_at(2 + number % 6, start + index), start + index + 1)
    timeline.finish(start + stages, number, number, number, number, number % 1000, 200, b"", b"")


def number_told(record: RequestRecord) -> int:
    """Return the number that a record's trace id tells."""
    return int(record.trace_id, 16) - 1


def number_of(record: RequestRecord, stages: int = 1) -> int:
    """Return the number that a record tells, if every field tells the same."""
    number = number_told(record)
    assert record.span_id == record.parent_span_id == record.trace_id[16:]
    assert (record.start_ns, record.duration_ns) == (1 + number, stages)
    assert record.path == f"/{number}"
    assert {
        record.request_bytes, record.response_bytes, record.first_byte_ns, record.send_wait_ns
    } == {number}  # fmt: skip
    assert record.chunks == number % 1000
    assert len(record.stages) == stages
    assert len({span.stage for span in record.stages}) <= 1
    return number


# --- damage ------------------------------------------------------------------------------------


def whole_file(folder: Path) -> bytes:
    """Return the bytes of a file with three requests in it."""
    with closing(Recording(folder, in_flight_slots=2, ring_slots=4)) as recording:
        for number in range(1, 4):
            write(recording.recorder, number)
        return recording.path.read_bytes()


def with_header(data: bytes, at: int, new: bytes) -> bytes:
    """Change the header and make its checksum right again."""
    changed = data[:at] + new + data[at + len(new) :]
    crc = zlib.crc32(changed[: fmt.HEADER_CRC_AT]).to_bytes(4, "little")
    return changed[: fmt.HEADER_CRC_AT] + crc + changed[fmt.HEADER_CRC_AT + 4 :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], int, str]] = {
    "empty": (lambda data: b"", 0, "no recorder file"),
    "foreign": (lambda data: b"PAR1" + data[4:], 0, "no recorder file"),
    "text": (lambda data: b"hello\n", 0, "no recorder file"),
    "magic alone": (lambda data: data[:8], 8, "inside the header"),
    "half a header": (lambda data: data[:200], 200, "inside the header"),
    "header alone": (lambda data: data[:1024], 1024, "cut off: 1024 bytes of"),
    "names cut off": (lambda data: data[:5000], 5000, "cut off: 5000 bytes of"),
    "slots cut off": (lambda data: data[: fmt.DATA_AT + 100], fmt.DATA_AT + 100, "cut off"),
    "a byte short": (lambda data: data[:-1], 26_623, "cut off: 26623 bytes of 26624"),
    "newer": (lambda data: with_header(data, 8, b"\x02\0"), 8, "upgrade stagescope"),
    "newer, other header": (lambda data: data[:8] + b"\x02\0" + bytes(2000), 8, "upgrade"),
    "version 0": (lambda data: with_header(data, 8, b"\0\0"), 8, "its format is 0"),
    "a flipped bit": (
        lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:],
        fmt.HEADER_CRC_AT,
        "damaged",
    ),
    "no ring": (lambda data: with_header(data, 24, bytes(4)), 12, "layout"),
    "tiny slots": (lambda data: with_header(data, 16, b"\x08\0\0\0"), 12, "layout"),
    "huge": (lambda data: with_header(data, 32, b"\xff" * 8), 12, "layout"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_said_with_file_offset_and_cause(name: str, tmp_path: Path) -> None:
    """Torn, cut off, foreign, damaged and newer files get one sentence, and are closed again."""
    change, offset, cause = DAMAGES[name]
    path = tmp_path / "damaged.ring"
    path.write_bytes(change(whole_file(tmp_path)))

    with pytest.raises(RecorderFileError) as told:
        RecorderReader(path)

    assert str(told.value).startswith(f"recorder file {path}, byte {offset}: ")
    assert cause in str(told.value)


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    """A folder or a pipe of that name is no recorder file, and nobody waits for it."""
    folder, pipe = tmp_path / "folder.ring", tmp_path / "pipe.ring"
    folder.mkdir()
    os.mkfifo(pipe)

    for path in (folder, pipe):
        with pytest.raises(RecorderFileError, match="no regular file"):
            RecorderReader(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.integers(0, 1100), st.integers(fmt.DATA_AT, 26_600), st.integers(0, 26_600)
            ),
            st.one_of(st.binary(min_size=1, max_size=64), st.just(b"\xff" * 8)),
        ),
        max_size=12,
    ),
    st.booleans(),
    st.integers(0, 30_000),
)
def test_garbage_raises_one_error_or_reads(
    tmp_path: Path, scribbles: list[tuple[int, bytes]], mended: bool, length: int
) -> None:
    """Whatever is scribbled over a file, reading ends, with records or with RecorderFileError."""
    data = bytearray(whole_file(tmp_path))
    for at, garbage in scribbles:
        data[at : at + len(garbage)] = garbage
    path = tmp_path / "garbage.ring"
    path.write_bytes(
        (with_header(bytes(data), 0, b"") if mended else bytes(data))[: max(length, 1)]
    )
    clock = iter(range(10**9, 10**15, 2 * 10**9)).__next__
    with suppress(RecorderFileError), RecorderReader(path, clock=clock) as reader:
        reader.poll()
        reader.in_flight(10**12)
        reader.counters()
        assert reader.process.pid >= 0


def test_a_scribbled_record_harms_no_other(recording: Recording) -> None:
    """A slot full of garbage is passed over; those around it are read."""
    for number in range(1, 4):
        write(recording.recorder, number)
    with recording.path.open("r+b") as file:
        file.seek(fmt.DATA_AT + (4 + 1) * fmt.SLOT_BYTES)
        file.write(b"\xff" * fmt.SLOT_BYTES)

    clock = iter((10**9, 10**10, 10**11, 10**12)).__next__
    with RecorderReader(recording.path, clock=clock) as reader:
        records = reader.poll() + reader.poll()
        assert [number_of(r) for r in records if isinstance(r, RequestRecord)] == [1, 3]
        assert reader.counters()["lost"] == 1


# --- room --------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", [0, 1, 7, 8, 9, 16, 100])
def test_overwriting_the_oldest_is_counted_exactly(recording: Recording, written: int) -> None:
    """The newest records that the ring holds are read in order; the others are a number."""
    for number in range(written):
        write(recording.recorder, number)

    assert [number_of(record) for record in recording.requests] == list(range(written))[-8:]
    assert recording.reader.overwritten == max(0, written - 8)


def test_reading_goes_on_where_it_stopped(recording: Recording) -> None:
    """A reader with a saved position neither loses nor doubles a record."""
    seen: list[int] = []
    position = 0
    for number in range(20):
        write(recording.recorder, number)
        if number % 3 == 0:
            with RecorderReader(recording.path, next_seq=position) as reader:
                seen += [number_of(r) for r in reader.poll() if isinstance(r, RequestRecord)]
                position = reader.next_seq

    assert seen == list(range(19))


def test_a_request_without_a_free_slot_is_recorded_unlisted(recording: Recording) -> None:
    """More requests in flight than slots: all are recorded, those without are counted."""
    entered = [recording.request() for _ in range(7)]
    for request in entered:
        request.__enter__()
    assert len(recording.reader.in_flight(10**18)) == 4
    for request in reversed(entered):
        request.__exit__(None, None, None)

    assert len(recording.requests) == 7
    assert recording.reader.counters()["unlisted"] == 3
    assert not recording.reader.in_flight(10**18)


@pytest.mark.parametrize("many", [31, 32, 33, 64, 65, 700, 32 * fmt.MAX_CHAIN])
def test_a_long_timeline_is_read_back_exactly(tmp_path: Path, many: int) -> None:
    """Hundreds of openings go on in further slots and come back in order, none missing."""
    with closing(Recording(tmp_path, in_flight_slots=80)) as recording:
        for number in (5, 6):
            write(recording.recorder, number, many)

        records = recording.requests
        assert [number_of(record, many) for record in records] == [5, 6]
        for record in records:
            expected = [(index, index + 1, 1) for index in range(many)]
            assert [span[1:4] for span in record.stages] == expected
            assert record.stages_dropped == 0
        assert recording.reader.counters()["unlisted"] == 0
        assert not recording.reader.in_flight(10**18)


def test_what_outgrows_its_slots_is_counted(tmp_path: Path) -> None:
    """Openings beyond the last slot are dropped and counted in the record."""
    many = 32 * fmt.MAX_CHAIN
    with closing(Recording(tmp_path, in_flight_slots=80)) as recording:
        write(recording.recorder, 5, many + 10)

        (record,) = recording.requests
        assert (len(record.stages), record.stages_dropped) == (many, 10)
        assert sum(record.self_ns().values()) == record.duration_ns == many + 10
        assert recording.reader.counters()["chains_refused"] == 1


def test_continuations_that_were_written_over_are_counted(recording: Recording) -> None:
    """A long timeline of which the ring holds only the end says how much is missing."""
    write(recording.recorder, 5, 32 * 4)
    for number in range(6):
        write(recording.recorder, number)

    first = recording.requests[0]
    assert (number_told(first), len(first.stages), first.stages_dropped) == (5, 64, 64)
    assert recording.reader.overwritten == 2


# --- many at once ------------------------------------------------------------------------------


def test_threads_never_lose_or_mix_records(tmp_path: Path) -> None:
    """Eight threads write short and long timelines into one file: each is read once, whole."""
    with closing(Recording(tmp_path, in_flight_slots=64, ring_slots=8192)) as recording:

        def work(first: int) -> None:
            for number in range(first, first + 200):
                write(recording.recorder, number, 70 if number % 10 == 0 else 3)

        threads = [threading.Thread(target=work, args=(1000 * n,)) for n in range(1, 9)]
        with switching_often():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        numbers = Counter(
            number_of(record, 70 if number_told(record) % 10 == 0 else 3)
            for record in recording.requests
        )
        expected = {1000 * n + index for n in range(1, 9) for index in range(200)}
        assert numbers == dict.fromkeys(expected, 1)
        assert not recording.reader.in_flight(10**18)
        assert recording.reader.counters()["lost"] == 0


class switching_often:
    """Let threads take turns every few bytecodes."""

    def __enter__(self) -> None:
        self._before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)

    def __exit__(self, *_: object) -> None:
        sys.setswitchinterval(self._before)


@pytest.mark.parametrize("ring_slots", [1, 8, 4096])
def test_a_live_file_is_never_read_torn(tmp_path: Path, ring_slots: int) -> None:
    """While another process writes at full speed each record is whole, in order, and accounted."""
    wanted = 30_000
    with closing(Recording(tmp_path, in_flight_slots=4, ring_slots=ring_slots)) as recording:
        pid = os.fork()
        if pid == 0:
            write_and_exit(recording.path, ring_slots, wanted)
        reader, last, read = recording.reader, -1, 0
        ended = False
        while not ended:
            ended = os.waitpid(pid, os.WNOHANG)[0] == pid
            while records := reader.poll(256):
                for record in records:
                    assert isinstance(record, RequestRecord)
                    number = number_of(record)
                    assert number == record.seq > last
                    last = number
                    read += 1

        assert last == wanted - 1
        assert read + reader.overwritten == wanted
        assert reader.counters()["lost"] == 0


def write_and_exit(path: Path, ring_slots: int, many: int) -> None:
    """In a forked child: write *many* records to the file at *path*, and be gone."""
    status = 1
    try:
        with path.open("r+b") as file:
            memory = memoryview(mmap.mmap(file.fileno(), 0))
        recorder = Recorder(memory, in_flight_slots=4, ring_slots=ring_slots)
        for number in range(many):
            write(recorder, number)
        status = 0
    finally:
        os._exit(status)


# --- killed between any two instructions --------------------------------------------------------


def test_the_file_is_whole_at_every_instruction(tmp_path: Path) -> None:
    """A copy of the file after each bytecode of writing a request: there once, or not begun."""
    with closing(Recording(tmp_path / "spool", in_flight_slots=4, ring_slots=4)) as recording:
        write(recording.recorder, 1)  # So that slots are used again.
        snapshots: list[bytes] = []
        # A new descriptor each time would slow this down; the page cache is the same.
        fd = os.open(recording.path, os.O_RDONLY)
        size = fmt.file_bytes(4, 4)

        def look(frame: FrameType, event: str, argument: object) -> Any:
            if frame.f_code not in WATCHED:
                return None
            frame.f_trace_opcodes = True
            snapshot = os.pread(fd, size, 0)
            if not snapshots or snapshots[-1] != snapshot:
                snapshots.append(snapshot)
            return look

        before = sys.gettrace()
        sys.settrace(look)
        try:
            write(recording.recorder, 2, 40)
        finally:
            sys.settrace(before)
        os.close(fd)
        snapshots.append(recording.path.read_bytes())

    assert len(snapshots) > 100
    states = [state_after_death(tmp_path / "copy.ring", snapshot) for snapshot in snapshots]
    # Begun, then finished, and never the other way or twice.
    order = ["nothing", "died", "finished"]
    assert sorted(states, key=order.index) == states
    assert set(states) == set(order)


WATCHED: set[CodeType] = {
    Timeline.__init__.__code__, Timeline.open_at.__code__, Timeline.close_at.__code__,
    Timeline.spill.__code__, Timeline.spill_end.__code__, Timeline.place.__code__,
    Timeline._chained_slot.__code__, Timeline.finish.__code__, Recorder.acquire.__code__,
    Recorder.commit.__code__,
}  # fmt: skip


def state_after_death(path: Path, snapshot: bytes) -> str:
    """Read a copy as the file of a dead process; give what is told of request 2."""
    path.write_bytes(snapshot)
    with RecorderReader(path) as reader:
        records = [*reader.poll(), *reader.in_flight(10**6)]
        assert set(reader.counters().values()) == {0}
    requests = {number_told(r): r for r in records if isinstance(r, RequestRecord)}
    assert len(requests) == len(records), "a request is there twice"
    assert number_of(requests.pop(1)) == 1
    if not requests:
        return "nothing"
    ((number, record),) = requests.items()
    assert number == 2
    assert sum(record.self_ns().values()) == record.duration_ns
    assert all(span.stage == record.stages[0].stage for span in record.stages)
    if record.state is State.DIED:
        assert sum(span.open for span in record.stages) <= 1
        return "died"
    assert number_of(record, 40) == 2
    return "finished"


def test_a_batch_in_flight_dies_with_its_members(recording: Recording) -> None:
    """A process that is gone in the model leaves the batch and each member in `inference`."""
    with recording.request():
        ticket = batch.enqueue()
        with batch(model="m") as formed:
            formed.add(ticket)
            with formed.inference(), stage("inference.forward"):
                found = recording.reader.in_flight(10**18)

    assert sorted(type(record).__name__ for record in found) == ["BatchRecord", "RequestRecord"]
    assert {record.state for record in found} == {State.DIED}
    requests = [record for record in found if isinstance(record, RequestRecord)]
    assert last_stage(requests[0]) == "inference.forward"
