"""A recorder on a real file, and what was written to it: for tests of code with stages in it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stagescope.middleware.recording.file import create_recorder_file
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.recorder import format as fmt
from stagescope.recorder.reader import RecorderReader
from stagescope.records import BatchRecord, Record, RequestRecord


class Recording:
    """A recorder in the folder *spool*; read what it wrote with `requests` and `batches`."""

    def __init__(
        self,
        spool: Path,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        in_flight_slots: int = 16,
        ring_slots: int = 256,
    ) -> None:
        self._file = create_recorder_file(
            spool, "test", in_flight_slots=in_flight_slots, ring_slots=ring_slots
        )
        self.path = self._file.path
        self.recorder = Recorder(
            memoryview(self._file.memory),
            in_flight_slots=in_flight_slots,
            ring_slots=ring_slots,
            clock=clock,
            path=self.path,
        )
        self.reader = RecorderReader(self.path)
        self.records: list[Record] = []

    def read(self) -> list[Record]:
        """Return all records so far."""
        self.records += self.reader.poll()
        return self.records

    @property
    def requests(self) -> list[RequestRecord]:
        """All requests so far."""
        return [record for record in self.read() if isinstance(record, RequestRecord)]

    @property
    def batches(self) -> list[BatchRecord]:
        """All batches so far."""
        return [record for record in self.read() if isinstance(record, BatchRecord)]

    @contextmanager
    def request(self) -> Iterator[Timeline]:
        """Be inside a request, without a server."""
        recorder = self.recorder
        ids = os.urandom(24)
        timeline = Timeline(recorder, fmt.KIND_REQUEST, recorder.clock(), ids[:16], ids[16:])
        token = current.set(timeline)
        try:
            yield timeline
        finally:
            current.reset(token)
            timeline.finish(recorder.clock(), 0, 0, 0, 0, 0, 200, b"", b"")

    def close(self) -> None:
        """Close the file, which stays."""
        self.recorder.close()
        self.reader.close()
        os.close(self._file.fd)
