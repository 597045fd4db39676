"""Real uvicorn servers with one added line, their embedded agents, and SIGKILL."""

import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from stagescope.agent.api.client import AgentClient
from stagescope.errors import StagescopeError
from stagescope.records import RequestRecord, State, last_stage
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses

SOURCE = Path(__file__).parents[2] / "src"
SERVER = """
import asyncio, socket
import uvicorn
from fastapi import FastAPI
from stagescope import StageMiddleware, stage

app = FastAPI()

@app.get("/quick")
async def quick():
    with stage("inference"):
        return {}

@app.get("/hangs")
async def hangs():
    with stage("postprocess"):
        await asyncio.sleep(600)

server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(StageMiddleware(app, service="real"), log_level="error")).run([server])
"""


class Server:
    """One server process."""

    def __init__(self, spool: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=os.environ | {"PYTHONPATH": str(SOURCE), "STAGESCOPE_SPOOL": str(spool)},
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    def get(self, path: str) -> None:
        """Ask, as a load run's client does."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", headers={"baggage": "stagescope.run=real"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            response.read()

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


@contextmanager
def hanging(server: Server) -> Iterator[None]:
    """A request that is in flight meanwhile, and breaks off with its server."""

    def ask() -> None:
        with pytest.raises((OSError, urllib.error.URLError)):
            server.get("/hangs")

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    thread.join()


def test_workers_killed_one_by_one_lose_no_finished_request() -> None:
    """Three servers on one spool, each killed in turn: one agent or another has every request.

    Whoever drains may be the one that is killed; each request in flight is reported by the
    next with the stage that it died in.
    """
    with short_spool() as spool, ExitStack() as cleanup:
        client = AgentClient(spool / "agent.sock", timeout_s=5)
        servers = [Server(spool) for _ in range(3)]
        for server in servers:
            cleanup.callback(server.kill)
        finished = 0
        for server in servers:
            for _ in range(10):
                server.get("/quick")
                finished += 1
            with hanging(server):
                wait_until(lambda: _in_flight(client))
                server.kill()
        with AgentProcesses() as start:
            start(spool)
            counts = wait_until(lambda: (c := client.run_counts("real")).died == 3 and c)
            assert counts
            assert (counts.finished, counts.requests) == (finished, finished + 3)
            records = [r for r in client.run_records("real") if isinstance(r, RequestRecord)]
            wait_until(lambda: not list(spool.glob("*.ring")))
    assert len({(record.process.ring_id, record.seq) for record in records}) == 33
    died = [record for record in records if record.state is State.DIED]
    assert [last_stage(record) for record in died] == ["postprocess"] * 3
    assert {record.process.service for record in records} == {"real"}
    assert all(sum(record.self_ns().values()) == record.duration_ns for record in records)


def _in_flight(client: AgentClient) -> bool:
    """Return whether an agent sees a request in flight; False while another takes over."""
    try:
        return client.counters()["in_flight"] > 0
    except StagescopeError:
        return False
