"""Real model servers for tests: requests with known ids, what was recorded, nothing left behind."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from stagescope.records import RequestRecord
from stagescope.testing import wait_until


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def port_is_free(port: int) -> bool:
    """Return whether nobody listens on *port* of loopback."""
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


def stages_ms(record: RequestRecord) -> dict[str, float]:
    """Return what the partition charges to each stage, in ms."""
    return {name: spent / 1e6 for name, spent in record.self_ns().items()}


def processes_with(variable: str, value: str) -> list[int]:
    """Return the processes that were started with *variable* set to *value*, this one left out."""
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
