"""A served process under steady load beside an agent that is killed again and again."""

from __future__ import annotations

import http.client
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from stagescope.agent.api.client import AgentClient
from stagescope.recorder.spool import SOCKET_NAME
from tests.support.otlp import OtlpReceiver, ReceivedSpan

SOURCE = Path(__file__).parents[2] / "src"
CLIENTS = 6
LOST = ("overwritten", "lost", "otlp_dropped_full_spans", "otlp_dropped_failed_spans",
        "otlp_rejected_spans")  # fmt: skip
SERVER = """
import socket
import uvicorn
from stagescope import StageMiddleware, stage

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    with stage("preprocess"):
        await receive()
    with stage("inference"):
        body = b"ok"
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": body})

server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(StageMiddleware(app, service="killed"), log_level="error",
                              lifespan="off")).run([server])
"""


@dataclass(frozen=True, slots=True)
class Delivered:
    """What the clients saw finished, held against what reached the back end."""

    finished: set[str]
    """Trace ids of the requests that were answered."""
    counted_as_lost: int
    """Records that the last agent knows to be lost."""
    spans: list[ReceivedSpan]
    sizes: list[int]
    """Spans of each delivery."""
    before_kill: list[int]
    """How many deliveries there were at each kill."""

    @property
    def missing(self) -> set[str]:
        """Requests that were answered and are not at the back end."""
        return self.finished - {span.trace_id for span in self.spans if span.kind == "server"}

    @property
    def doubled(self) -> set[str]:
        """Span ids that arrived more than once."""
        counts = Counter(span.span_id for span in self.spans)
        return {span_id for span_id, count in counts.items() if count > 1}

    @property
    def under_way(self) -> set[str]:
        """Span ids of the deliveries that a kill may have met: the last, and one just coming in."""
        ends = list(accumulate(self.sizes, initial=0))
        return {
            span.span_id
            for at in self.before_kill
            for span in self.spans[ends[max(0, at - 1)] : ends[min(at + 1, len(self.sizes))]]
        }


class SteadyLoad:
    """Sends requests at a steady rate from a few threads, each in a trace of its own."""

    def __init__(self, port: int, rate: float) -> None:
        self.finished: set[str] = set()
        self._port = port
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._send, args=(random.Random(number), rate / CLIENTS))
            for number in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _send(self, rng: random.Random, rate: float) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        due = time.monotonic()
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            due += 1 / rate
            trace_id = f"{rng.getrandbits(128) | 1:032x}"
            connection.request(
                "GET", "/", headers={"traceparent": f"00-{trace_id}-{trace_id[:16]}-01"}
            )
            if connection.getresponse().read() == b"ok":
                self.finished.add(trace_id)
        connection.close()

    def stop(self) -> None:
        """End the threads."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()


@contextmanager
def served_beside(spool: Path) -> Generator[int]:
    """A server that records into *spool* and has no agent of its own; gives its port."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=os.environ
        | {"PYTHONPATH": str(SOURCE), "STAGESCOPE_SPOOL": str(spool), "STAGESCOPE_AGENT": "off"},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout
        yield int(server.stdout.readline())
    finally:
        server.kill()
        server.communicate()


def start_exporting_agent(spool: Path, receiver: OtlpReceiver) -> subprocess.Popen[Any]:
    """Start an agent process that sends every span to *receiver*."""
    return subprocess.Popen(
        [sys.executable, "-m", "stagescope", "agent", "--spool", str(spool), "--quiet",
         "--metrics-port", "off"],
        env=os.environ | {
            "PYTHONPATH": str(SOURCE),
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{receiver.http_endpoint}/v1/traces",
            "OTEL_TRACES_SAMPLER": "always_on",
        },
    )  # fmt: skip


def kill_agents(
    spool: Path, receiver: OtlpReceiver, rate: float, lives: Iterable[Callable[[], object]]
) -> Delivered:
    """Load a server while its agent is killed after each of *lives*; the last one ends cleanly."""
    before_kill: list[int] = []
    with served_beside(spool) as port:
        load = SteadyLoad(port, rate)
        try:
            for live in lives:
                agent = start_exporting_agent(spool, receiver)
                try:
                    live()
                finally:
                    agent.kill()
                    agent.wait()
                before_kill.append(len(receiver.deliveries))
        finally:
            load.stop()
        agent = start_exporting_agent(spool, receiver)
        wait_for(load.finished, receiver)
        counters = AgentClient(spool / SOCKET_NAME).counters()
        agent.terminate()
        agent.wait(60)
    return Delivered(
        load.finished,
        round(sum(counters[name] for name in LOST)),
        receiver.spans,
        [delivery.spans for delivery in receiver.deliveries],
        before_kill,
    )


def wait_for(trace_ids: set[str], receiver: OtlpReceiver, patience_s: float = 20.0) -> None:
    """Wait until all of *trace_ids* have arrived, or nothing has come for *patience_s*."""
    seen, last_s = -1, time.monotonic()
    while time.monotonic() - last_s < patience_s:
        spans = receiver.spans
        if len(spans) != seen:
            seen, last_s = len(spans), time.monotonic()
        if trace_ids <= {span.trace_id for span in spans if span.kind == "server"}:
            return
        time.sleep(0.2)
