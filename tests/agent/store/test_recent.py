"""What the agent tells of cold starts, and what stays of the waits of processes that are gone."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from stagescope.agent.api.control import Control, serve_socket
from stagescope.agent.drain import Drain
from stagescope.agent.store.serialize import parse_lines
from stagescope.middleware.recording.names import intern
from stagescope.middleware.runtime.cold_start import ColdTimeline
from stagescope.records import ColdStartRecord
from stagescope.testing.recording import Recording
from stagescope.testing.spool import short_spool
from tests.support.agents import running_agent
from tests.support.rings import write_ring


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as folder:
        yield folder


def ask(path: Path, what: str) -> list[bytes]:
    """Get *what* over the Unix socket *path*, by lines."""
    connection = http.client.HTTPConnection("agent")
    connection.sock = socket.socket(socket.AF_UNIX)
    with closing(connection):
        connection.sock.connect(str(path))
        connection.request("GET", what)
        return connection.getresponse().read().splitlines()


def start(recording: Recording) -> ColdTimeline:
    """Write a cold start that was begun before the recorder: an open stage goes on in the file."""
    cold = ColdTimeline(time.monotonic_ns(), time.monotonic_ns)
    loading = cold.open(intern("load"))
    for _ in range(40):  # Beyond one slot.
        cold.close(cold.open(intern("preprocess")))
    cold.move(recording.recorder)
    cold.close(loading)
    cold.finish(time.monotonic_ns(), 0, 0, 0, 0, 0, 0, b"", b"")
    return cold


def test_cold_starts_are_told_as_lines(spool: Path) -> None:
    """Asked over the socket, the agent gives the cold starts that it has read, whole."""
    with running_agent(spool) as agent, closing(Recording(spool)) as recording:
        server = serve_socket(Control(agent, "agent", spool, None))
        try:
            cold = start(recording)
            (record,) = parse_lines(ask(spool / "agent.sock", "/cold-starts"))
        finally:
            server.stop()
        counted = agent.counters()["cold_starts_seen"]

    assert isinstance(record, ColdStartRecord)
    assert record.span_id == cold.span_id.hex()
    assert (len(record.stages), record.stages_dropped, counted) == (41, 0, 1)
    assert record.stages[0].stage == "load"
    assert not any(span.open for span in record.stages)


def test_sums_of_waits_outlive_their_process(spool: Path) -> None:
    """Two processes of a service are added up; of one that is gone its sums stay, its peaks go."""
    first, second = (write_ring(spool / f"{name}.ring", 1) for name in "ab")
    for writer, lag_ns in ((first, 5), (second, 7)):
        writer.set_wait("loop_lag_ns", lag_ns)
        writer.set_wait("loop_lag_max_ns", lag_ns)
        writer.set_wait("pool_busy", 1)
    drain = Drain(spool, {})
    drain.discover()

    def figures() -> tuple[int, int, int]:
        (waits,) = drain.waits().values()
        return waits["loop_lag_ns"], waits["loop_lag_max_ns"], waits["pool_busy"]

    assert figures() == (12, 7, 2)
    second.close()
    drain.discover()
    drain.poll(list[object]().extend)
    drain.remove(drain.ended())
    assert figures() == (12, 5, 1)
    drain.close()
    first.close()
