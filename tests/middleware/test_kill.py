"""`kill -9` of a real server under load: what was finished is there, what was not shows its stage."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import ring_files
from stagescope.records import ColdStartRecord, RequestRecord, State, last_stage
from stagescope.stages import OTHER
from stagescope.testing import wait_until

KILLS = 50
AT_ONCE = 2
CONNECTIONS = 6
MANY = 80
"""As in killed_server.py."""


@dataclass
class Seen:
    """What one load's clients saw, by trace id."""

    whole: set[str] = field(default_factory=set)
    begun: set[str] = field(default_factory=set)
    """Of these the client has the first bytes, so the server worked on them."""


@contextmanager
def server_maker() -> Iterator[subprocess.Popen[str]]:
    """Start the process that forks servers; it ends with its stdin."""
    script = Path(__file__).with_name("killed_server.py")
    source = Path(__file__).parents[2] / "src"
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(source)},
    ) as maker:
        try:
            yield maker
        finally:
            pipe(maker.stdin).close()
            maker.wait(10)


def pipe(stream: IO[str] | None) -> IO[str]:
    """Return a pipe that was asked for."""
    assert stream is not None
    return stream


def start_server(maker: subprocess.Popen[str], spool: Path, http: str) -> tuple[int, int]:
    """Have a server forked; give its pid and port."""
    pipe(maker.stdin).write(f"{spool} {http}\n")
    pipe(maker.stdin).flush()
    pid, port = pipe(maker.stdout).readline().split()
    return int(pid), int(port)


async def client(port: int, rng: random.Random, seen: Seen) -> None:
    """Send requests down one connection, each with an id of its own, until the server is gone."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while True:
            trace = f"{rng.getrandbits(128) | 1:032x}"
            path = f"/{rng.choice(['few', 'many'])}/{trace}"
            writer.write(
                f"POST {path} HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n"
                f"traceparent: 00-{trace}-{trace[:16]}-01\r\n\r\nbody".encode()
            )
            await reader.readuntil(b"\r\n\r\n")
            seen.begun.add(trace)
            if await reader.readexactly(6) == b"onetwo":
                seen.whole.add(trace)
    except (ConnectionError, asyncio.IncompleteReadError):
        pass
    finally:
        writer.close()


async def load_and_kill(pid: int, port: int, rng: random.Random) -> Seen:
    """Load a server and kill it at a random moment after its first answers."""
    seen = Seen()
    clients = [asyncio.create_task(client(port, rng, seen)) for _ in range(CONNECTIONS)]
    answers = rng.randrange(1, 40)
    deadline = time.monotonic() + 30
    while len(seen.whole) < answers:
        assert time.monotonic() < deadline, "the server does not answer"
        await asyncio.sleep(0.001)
    await asyncio.sleep(rng.random() * 0.01)
    os.kill(pid, signal.SIGKILL)
    await asyncio.gather(*clients)
    return seen


def check(spool: Path, seen: Seen) -> Counter[str]:
    """Hold the file of the dead server against what its clients saw; count the last stages."""
    (path,) = ring_files(spool)
    with RecorderReader(path) as reader:
        wait_until(lambda: not reader.writer_alive())
        polled = reader.poll(100_000)
        in_flight = reader.in_flight(time.monotonic_ns())
        assert sum(isinstance(r, ColdStartRecord) for r in polled + in_flight) == 1
        assert set(reader.counters().values()) == {0}, reader.counters()
    records = [record for record in polled + in_flight if isinstance(record, RequestRecord)]
    others = [r for r in polled + in_flight if not isinstance(r, RequestRecord)]
    assert all(isinstance(record, ColdStartRecord) for record in others)
    by_trace = {record.trace_id: record for record in records}
    assert len(by_trace) == len(records), "a request is there twice"
    assert [record.seq for record in polled] == sorted(record.seq for record in polled)
    assert all(record.state is State.FINISHED for record in polled)
    for record in records:
        check_record(record)
    assert seen.begun <= set(by_trace), "a request that was answered in part is not there"
    for trace in seen.whole:
        record = by_trace[trace]
        # The client may have the last byte while the server has not yet noted so, or has noted
        # that `respond` is over and not yet that the request is.
        died_in = last_stage(record)
        ended = died_in == OTHER and any(span.stage.startswith("respond") for span in record.stages)
        assert record.state is State.FINISHED or died_in.startswith("respond") or ended, record
    return Counter(last_stage(r) for r in records if r.state is State.DIED)


def check_record(record: RequestRecord) -> None:
    """A record is of one request, whole, and its stages share out its duration."""
    assert record.path.endswith(record.trace_id)
    assert record.parent_span_id == record.trace_id[:16]
    assert record.method == "POST"
    assert sum(record.self_ns().values()) == record.duration_ns
    assert record.stages_dropped == 0
    names = Counter(span.stage for span in record.stages)
    if record.state is State.FINISHED:
        assert (record.status, record.error, record.chunks) == (200, "", 2)
        assert last_stage(record) == OTHER
        assert names["preprocess.parse"] == (MANY if record.path.startswith("/many") else 0)
        assert {"preprocess", "inference", "postprocess"} <= set(names)
        assert names["respond.stream"] == 1
    else:
        assert record.duration_ns > 0
        assert sum(span.open for span in record.stages) <= 3


def test_kill_9_loses_no_finished_request_and_names_each_open_stage(tmp_path: Path) -> None:
    """Fifty servers killed at random moments: all answered requests, and every one in flight."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def kill_some(maker: subprocess.Popen[str], first: int) -> Counter[str]:
        spools = [tmp_path / f"{first + index}" for index in range(AT_ONCE)]
        servers = [start_server(maker, spool, rng.choice(["h11", "httptools"])) for spool in spools]
        loads = await asyncio.gather(*(load_and_kill(*server, rng) for server in servers))
        stages: Counter[str] = Counter()
        for spool, seen in zip(spools, loads, strict=True):
            stages += check(spool, seen)
            for path in ring_files(spool):
                path.unlink()
        return stages

    died: Counter[str] = Counter()
    with server_maker() as maker:
        for first in range(0, KILLS, AT_ONCE):
            died += asyncio.run(kill_some(maker, first))

    assert died["inference"] > 0
    assert died["postprocess"] > 0
