"""A spool folder for a test, and what the servers in it have recorded."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import ring_files
from stagescope.records import BatchRecord, Record, RequestRecord
from stagescope.testing import wait_until


@contextmanager
def short_spool() -> Generator[Path]:
    """A spool folder whose path is short enough for a socket; deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="spool-") as folder:
        yield Path(folder)


class Spool:
    """Reads all recorder files of a folder that no agent reads, again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._readers: dict[Path, RecorderReader] = {}
        self._read: list[Record] = []

    def records(self) -> list[Record]:
        """Return all records so far, those that died in flight with their process too."""
        died: list[Record] = []
        for path in ring_files(self.folder) if self.folder.exists() else ():
            if path not in self._readers:
                self._readers[path] = RecorderReader(path)
            reader = self._readers[path]
            self._read += reader.poll()
            if not reader.writer_alive():
                died += reader.in_flight(time.monotonic_ns())
        return self._read + died

    def requests(self, *trace_ids: str) -> dict[str, list[RequestRecord]]:
        """Wait until each trace has a record; return them by trace id, earliest first."""
        wait_until(lambda: {*trace_ids} <= {one.trace_id for one in self._requests()}, 20)
        found = sorted(self._requests(), key=lambda one: one.start_ns)
        return {key: [one for one in found if one.trace_id == key] for key in trace_ids}

    def batches(self, *trace_ids: str) -> list[BatchRecord]:
        """Wait until each trace is a member of a batch; return those batches."""

        def found() -> list[BatchRecord]:
            batches = [one for one in self.records() if isinstance(one, BatchRecord)]
            wanted = [one for one in batches if _traces(one) & {*trace_ids}]
            return wanted if {*trace_ids} <= set().union(*map(_traces, wanted)) else []

        return wait_until(found, 20)

    def _requests(self) -> list[RequestRecord]:
        return [one for one in self.records() if isinstance(one, RequestRecord)]

    def close(self) -> None:
        """Close the files, which stay."""
        for reader in self._readers.values():
            reader.close()


def _traces(batch: BatchRecord) -> set[str]:
    return {member.trace_id for member in batch.members}
