"""Real model servers for tests: requests with known ids, what was recorded, nothing left behind."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import ring_files
from stagescope.records import BatchRecord, Record, RequestRecord
from stagescope.testing import wait_until


def free_port() -> int:
    """Give a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def port_is_free(port: int) -> bool:
    """Tell whether nobody listens on *port* of loopback."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def ask(
    port: int, path: str, body: object, trace_id: str = "", *, timeout_s: float = 60.0
) -> tuple[int, bytes]:
    """POST *body* as JSON in the trace *trace_id* (32 hex digits); give status and answer."""
    headers = {"content-type": "application/json"}
    if trace_id:
        headers["traceparent"] = f"00-{trace_id}-{trace_id[:16]}-01"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def ask_at_once(port: int, path: str, bodies: Mapping[str, object]) -> dict[str, tuple[int, bytes]]:
    """POST all *bodies*, given by trace id, at the same time; give the answers by trace id."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        asked = {
            trace_id: pool.submit(ask, port, path, body, trace_id)
            for trace_id, body in bodies.items()
        }
        return {trace_id: one.result() for trace_id, one in asked.items()}


class Spool:
    """Reads all recorder files of a folder that no agent reads, again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._readers: dict[Path, RecorderReader] = {}
        self._read: list[Record] = []

    def records(self) -> list[Record]:
        """Give all records so far, those that died in flight with their process too."""
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
        """Wait until each trace has a record; give them by trace id, earliest first."""
        wait_until(lambda: {*trace_ids} <= {one.trace_id for one in self._requests()}, 20)
        found = sorted(self._requests(), key=lambda one: one.start_ns)
        return {key: [one for one in found if one.trace_id == key] for key in trace_ids}

    def batches(self, *trace_ids: str) -> list[BatchRecord]:
        """Wait until each trace is a member of a batch; give those batches."""

        def found() -> list[BatchRecord]:
            batches = [one for one in self.records() if isinstance(one, BatchRecord)]
            wanted = [one for one in batches if _traces(one) & {*trace_ids}]
            return wanted if {*trace_ids} <= set().union(*map(_traces, wanted)) else []

        return wait_until(found, 20)

    def _requests(self) -> list[RequestRecord]:
        return [one for one in self.records() if isinstance(one, RequestRecord)]

    def close(self) -> None:
        """Let go of the files, which stay."""
        for reader in self._readers.values():
            reader.close()


def _traces(batch: BatchRecord) -> set[str]:
    return {member.trace_id for member in batch.members}


def stages_ms(record: RequestRecord) -> dict[str, float]:
    """Give what the partition charges to each stage, in ms."""
    return {name: spent / 1e6 for name, spent in record.self_ns().items()}


def processes_with(variable: str, value: str) -> list[int]:
    """Give the processes that were started with *variable* set to *value*, this one left out."""
    wanted = f"{variable}={value}".encode()
    return [pid for pid in _pids() if pid != os.getpid() and wanted in _environment(pid)]


def end_processes_with(variable: str, value: str, *, timeout_s: float = 20.0) -> None:
    """Kill what a server left behind, known by its environment; wait until it is gone."""
    for pid in processes_with(variable, value):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not processes_with(variable, value), timeout_s)


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
