"""Which agent a load run asks, how it opens its run, and what it says where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stagescope.agent.api.control import Control, serve_socket
from stagescope.identity import RUN_ID
from stagescope.load_run import LoadPlan, RunFolder, locate, run_load
from stagescope.load_run.collect import collect_server_side
from stagescope.load_run.locate import AgentLocation, opened_run
from stagescope.load_run.run import fresh_run_id
from stagescope.loadgen.client_log import Call, ClientLog
from stagescope.loadgen.target import target
from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.types import Receive, Scope, Send
from stagescope.recorder.spool import RUNS_FOLDER, SOCKET_NAME
from stagescope.records import Record
from stagescope.testing.records import request_record
from stagescope.testing.spool import short_spool
from tests.support.agents import running_agent
from tests.support.serving import exchange, served


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 200."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def spool() -> Iterator[Path]:
    """A spool with room for a socket's name."""
    with short_spool() as folder:
        yield folder


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The spool that this shell would use: nobody records into it."""
    monkeypatch.setenv("STAGESCOPE_SPOOL", str(tmp_path / "shell"))
    monkeypatch.setattr(locate, "default_spools", lambda: ())
    return tmp_path / "shell"


def run(url: str, out: Path) -> RunFolder:
    """Load *url* with a plan that names no spool."""
    return run_load(LoadPlan(rate_per_s=100, duration_s=0.5, warmup_s=0, out=out), url)


def test_the_spool_of_the_server_is_found_by_its_port(
    spool: Path, elsewhere: Path, tmp_path: Path
) -> None:
    """A server that records into another spool than the shell's is joined all the same."""
    with (
        served(StageMiddleware(app, spool=spool), lifespan="off") as port,
        running_agent(spool) as agent,
    ):
        server = serve_socket(Control(agent, "agent", spool))
        try:
            folder = run(f"http://127.0.0.1:{port}/", tmp_path / "run")
        finally:
            server.stop()
    assert folder.run.server_source == "agent", folder.notes
    assert not (spool / RUNS_FOLDER / f"{folder.run.run_id}.open").exists()


def test_without_an_agent_the_header_steps_in_and_the_reason_is_said(
    spool: Path, elsewhere: Path, tmp_path: Path
) -> None:
    """The run is opened in the server's spool; the note says why and what to start."""
    with served(StageMiddleware(app, spool=spool), lifespan="off") as port:
        exchange(
            port, b"GET / HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n"
        )  # opens the recorder, as a server with a lifespan did before
        folder = run(f"http://127.0.0.1:{port}/", tmp_path / "run")
    assert folder.run.server_source == "server-timing", folder.notes
    (note,) = folder.notes
    assert "Server-Timing" in note
    assert f"`stagescope agent --spool {spool}`" in note
    assert list((spool / RUNS_FOLDER).iterdir()) == []


def test_an_agent_in_the_other_default_spool_is_found(
    spool: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no process tells the spool, each default one is looked into, not the first alone."""
    monkeypatch.setattr(locate, "default_spools", lambda: (elsewhere, spool))
    with running_agent(spool) as agent:
        server = serve_socket(Control(agent, "agent", spool))
        try:
            found = locate.locate(AgentLocation(), None)
        finally:
            server.stop()
    assert (found.spool, found.reason) == (spool, "")

    nowhere = locate.locate(AgentLocation(), None)
    assert f"no agent is in {elsewhere}" in nowhere.reason


def test_a_server_that_records_nothing_is_named(elsewhere: Path, tmp_path: Path) -> None:
    """By its pid and port, with what to do."""
    code = (
        "from http.server import *\n"
        "server = HTTPServer(('127.0.0.1', 0), SimpleHTTPRequestHandler)\n"
        "print(server.server_port, flush=True)\n"
        "server.serve_forever()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    ) as server:
        try:
            assert server.stdout
            port = int(server.stdout.readline())
            folder = run(f"http://127.0.0.1:{port}/", tmp_path / "run")
        finally:
            server.kill()
    (note,) = folder.notes
    assert f"the server (pid {server.pid}, port {port}) records into no spool" in note
    assert "wrap its app in StageMiddleware" in note


def test_a_failing_run_closes_what_it_opened(spool: Path) -> None:
    """Also where nothing answers."""
    place, aim = AgentLocation(spool=spool), target("http://127.0.0.1:1/")
    with pytest.raises(ZeroDivisionError), opened_run(place, aim, "r-1"):
        assert (spool / RUNS_FOLDER / "r-1.open").exists()
        raise ZeroDivisionError
    assert not (spool / RUNS_FOLDER / "r-1.open").exists()


def test_run_ids_cannot_be_guessed() -> None:
    """They have 64 random bits behind the time, and are run ids."""
    first, second = fresh_run_id(), fresh_run_id()
    assert RUN_ID.fullmatch(first)
    assert len(first.rpartition("-")[2]) == 16
    assert first.rpartition("-")[2] != second.rpartition("-")[2]


def log_of(*records: Record) -> ClientLog:
    """Return the client's side of *records*: one answered request each."""
    log = ClientLog(0)
    for seq, record in enumerate(records):
        call = Call(seq, 1, record.trace_id, f"{seq + 1:016x}")
        call.status, call.last_byte_ns = 200, 9
        log.append(call)
    return log


def test_a_stranger_and_a_damaged_record_leave_the_run_whole(spool: Path, tmp_path: Path) -> None:
    """Records of requests that the run did not send are left out; numbers out of range too."""
    good = request_record(run_id="r-1", seq=0)
    damaged = replace(good, seq=1, trace_id="d" * 32, response_bytes=2**70)
    stranger = replace(good, seq=2, trace_id="e" * 32)

    with running_agent(spool) as agent:
        agent.runs.accept([good, damaged, stranger])
        server = serve_socket(Control(agent, "agent", spool))
        try:
            assert (spool / SOCKET_NAME).exists()
            collected = collect_server_side(
                tmp_path, "r-1", log_of(good, damaged), AgentLocation(spool=spool), {}
            )
        finally:
            server.stop()
    kept = pq.read_table(tmp_path / "server.parquet").to_pylist()
    assert [row["trace_id"] for row in kept] == [good.trace_id]
    assert any("1 records that name this run" in note for note in collected.problems)
    assert collected.incomplete == ["server side incomplete: 1 damaged records are left out"]
