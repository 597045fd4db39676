"""The reader of recorder files: nothing that is done to a file ends the process that reads it."""

import os
import struct
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from stagescope.agent.drain import Drain
from stagescope.errors import RecorderFileError
from stagescope.recorder import format as fmt
from stagescope.recorder.reader import RecorderReader
from stagescope.records import Record, RequestRecord
from tests.support.rings import RingWriter

SIZES = (0, 100, fmt.NAMES_AT, fmt.DATA_AT, fmt.DATA_AT + 9 * fmt.SLOT_BYTES + 7)
USES: dict[str, Callable[[RecorderReader], object]] = {
    "poll": lambda reader: reader.poll(),
    "in_flight": lambda reader: reader.in_flight(10**18),
    "counters": lambda reader: reader.counters(),
    "waits": lambda reader: reader.waits(),
    "wait": lambda reader: reader.wait("loop_ticks"),
    "process": lambda reader: reader.process,
    "serving_since": lambda reader: reader.serving_since(),
    "requests_in_flight": lambda reader: reader.requests_in_flight(),
    "writer_alive": lambda reader: reader.writer_alive(),
}
RAISE = ("poll",)
"""What gives records says that there are none to be had; figures are those that were last read."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("use", USES)
def test_a_file_that_is_cut_off_is_an_error_and_no_signal(
    use: str, size: int, tmp_path: Path
) -> None:
    """Whatever is asked of a file that somebody truncated, this process lives on to tell."""
    with RingWriter(tmp_path / "cut.ring") as writer:
        writer.request()
        writer.set_counter("unlisted", 3)
        with RecorderReader(writer.path) as reader:
            pid = reader.process.pid
            reader.counters()
            os.truncate(writer.path, size)

            with suppress(RecorderFileError):
                USES[use](reader)
                assert use not in RAISE
            assert reader.process.pid == pid
            assert reader.counters()["unlisted"] == 3


def test_a_drain_outlives_a_file_that_is_cut_off(tmp_path: Path) -> None:
    """The file is set aside, its counters stay in the sums, and the others are read."""
    read: list[Record] = []
    with RingWriter(tmp_path / "cut.ring") as cut, RingWriter(tmp_path / "whole.ring") as whole:
        cut.request()
        whole.request()
        with closing(Drain(tmp_path, {})) as drain:
            drain.discover()
            os.truncate(cut.path, 0)
            drain.poll(read.extend)
            drain.discover()
            whole.request()
            drain.poll(read.extend)

            assert len(read) == 2
            assert drain.counters()["rings_broken"] == 1
            assert [process.ring_id for _, process in drain.alive()] == [whole.ring_id]


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A link to a recorder file is none, wherever it leads; a loop of links ends nothing."""
    with RingWriter(tmp_path / "real.ring") as writer:
        (tmp_path / "link.ring").symlink_to(writer.path)
        (tmp_path / "loop.ring").symlink_to(tmp_path / "loop.ring")
        for name in ("link.ring", "loop.ring"):
            with pytest.raises(RecorderFileError, match="it is a symbolic link"):
                RecorderReader(tmp_path / name)
        with closing(Drain(tmp_path, {})) as drain:
            drain.discover()
            assert [path for path, _ in drain.alive()] == [writer.path]


DURATION_AT = fmt.FINISHED_AT
BROKEN: dict[str, tuple[int, bytes]] = {
    "start": (fmt.OPENED_AT + 8, b"\xff" * 8),
    "start in decades": (fmt.OPENED_AT + 8, struct.pack("<Q", 1 << 61)),
    "duration": (DURATION_AT, b"\xff" * 8),
    "request bytes": (DURATION_AT + 8, b"\xff" * 8),
    "response bytes": (DURATION_AT + 16, b"\xff" * 8),
    "first byte": (DURATION_AT + 24, b"\xff" * 8),
    "send wait": (DURATION_AT + 32, b"\xff" * 8),
    "chunks": (DURATION_AT + 40, b"\xff" * 4),
    "entries dropped": (DURATION_AT + 44, b"\xff" * 4),
    "status": (DURATION_AT + 48, b"\xff" * 2),
    "gaps": (fmt.GAPS_AT, b"\xff" * 4),
    "sum of gaps": (fmt.GAPS_AT + 4, b"\xff" * 8),
    "longest gap": (fmt.GAPS_AT + 12, b"\xff" * 8),
    "state": (fmt.STATE_AT, b"\x07"),
    "trace id": (fmt.OPENED_AT + 16, bytes(16)),
    "kind and all": (fmt.OPENED_AT, b"\xff" * (fmt.SLOT_BYTES - fmt.OPENED_AT)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_record_is_refused_and_counted(name: str, tmp_path: Path) -> None:
    """A number that can't be does not leave the decoder; the records around it do."""
    at, garbage = BROKEN[name]
    with RingWriter(tmp_path / "damaged.ring", in_flight_slots=8) as writer:
        for _ in range(3):
            writer.request(run_id="run")
        with writer.path.open("r+b") as file:
            file.seek(fmt.DATA_AT + (8 + 1) * fmt.SLOT_BYTES + at)
            file.write(garbage)

        with RecorderReader(writer.path) as reader:
            assert [record.seq for record in reader.poll()] == [0, 2]
            assert reader.counters()["damaged"] == 1


def test_stages_of_a_damaged_record_stay_within_it(tmp_path: Path) -> None:
    """Entries with times from nowhere are cut to the request that they are in."""
    with RingWriter(tmp_path / "damaged.ring", in_flight_slots=8) as writer:
        writer.request()
        with writer.path.open("r+b") as file:
            file.seek(fmt.DATA_AT + 8 * fmt.SLOT_BYTES + fmt.STARTS_AT + 8)
            file.write(b"\xff" * 16)

        with RecorderReader(writer.path) as reader:
            (record,) = reader.poll()
            assert isinstance(record, RequestRecord)
            for span in record.stages:
                assert 0 <= span.start_ns <= span.end_ns <= record.duration_ns
