"""Every PromQL query of docs/exporters.md returns data from a real server, by a real Prometheus.

Needs the program `prometheus` (Debian: `apt-get install -y prometheus`), so it is not part of
`make test`; `make test-system` runs it.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
QUERIES = re.findall(
    r"^```promql\n(.*?)^```$",
    (ROOT / "docs/exporters.md").read_text("utf-8"),
    re.MULTILINE | re.DOTALL,
)
SERVER = """
import hashlib, socket, time
import uvicorn
from fastapi import FastAPI, HTTPException
from stagescope import StageMiddleware, stage

app = FastAPI()

@app.get("/predict/{name}")
def predict(name: str):
    with stage("preprocess.decode"):
        hashlib.sha256(bytes(200_000)).digest()
    with stage("inference"):
        time.sleep(0.005)
    if name == "bad":
        raise HTTPException(500)
    return {}

server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(StageMiddleware(app, service="resnet-api"), log_level="error")).run([server])
"""


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[tuple[list[int], str]]:
    """Two served processes of one service, and an agent: the servers' ports, its metrics' address."""
    with short_spool() as spool, ExitStack() as stack:
        environment = os.environ | {"STAGESCOPE_SPOOL": str(spool), "STAGESCOPE_AGENT": "off"}
        servers = [
            _started(stack, [sys.executable, "-c", SERVER], environment, subprocess.PIPE)
            for _ in range(2)
        ]
        log = tmp_path / "agent.log"
        with log.open("wb") as out:
            _started(
                stack,
                [sys.executable, "-m", "stagescope", "agent", "--metrics-port", "0"],
                environment,
                out,
            )
        ports = [int(server.stdout.readline()) for server in servers if server.stdout]
        target = wait_until(lambda: _metrics_address(log), timeout_s=30)
        yield ports, target


def _metrics_address(log: Path) -> str:
    found = re.search(r"metrics at http://([\d.:]+)/", log.read_text())
    return found[1] if found else ""


def _started(
    stack: ExitStack, command: list[str], environment: dict[str, str], out: Any
) -> subprocess.Popen[str]:
    process = subprocess.Popen(command, env=environment, stdout=out, text=True)

    def end() -> None:
        process.terminate()
        process.wait(timeout=30)
        if process.stdout:
            process.stdout.close()

    stack.callback(end)
    return process


def test_every_query_of_the_documents_returns_data(
    workers: tuple[list[int], str], start_prometheus: Callable[[str], str]
) -> None:
    """At least ten queries; each has a series with a number, while two workers serve requests."""
    ports, target = workers
    url = start_prometheus(target)
    assert len(QUERIES) >= 10
    waiting = list(QUERIES)

    def all_answered() -> bool:
        for port in ports:
            for path in ("/predict/cat", "/predict/dog", "/predict/bad"):
                with suppress(urllib.error.HTTPError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30).read()
        waiting[:] = [query for query in waiting if not _numbers(url, query)]
        return not waiting

    with suppress(AssertionError, TimeoutError):
        wait_until(all_answered, timeout_s=90)
    assert not waiting, f"no data for: {waiting}"


def _numbers(url: str, query: str) -> list[float]:
    """Return the values of an instant query, without those that are no number yet."""
    with urllib.request.urlopen(f"{url}/api/v1/query?{urlencode({'query': query})}") as reply:
        result = json.load(reply)["data"]["result"]
    values = [float(one["value"][1]) for one in result]
    return [value for value in values if not math.isnan(value)]
