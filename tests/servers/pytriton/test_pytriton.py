"""A real Triton server through pytriton: each request of a batch has its own, right stages."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from stagescope.identity import format_run, format_traceparent
from stagescope.recorder.reader import RecorderReader
from stagescope.records import BatchRecord, Record, RequestRecord
from stagescope.testing import wait_until

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

MS = 1_000_000
PARENT = "00f067aa0ba902b7"
SERVE = Path(__file__).parent / "serve.py"
ROOT = Path(__file__).parents[3]


@dataclass
class Served:
    """The server, and what it has recorded."""

    port: int
    spool: Path
    readers: dict[Path, RecorderReader] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def read(self) -> list[Record]:
        """Return all records so far."""
        for path in self.spool.glob("*.ring"):
            if path not in self.readers:
                self.readers[path] = RecorderReader(path)
        for reader in self.readers.values():
            self.records += reader.poll()
        return self.records

    def requests(self, prefix: str) -> dict[str, RequestRecord]:
        """Return the requests so far whose trace ids begin with *prefix*, by trace id."""
        return {
            record.trace_id: record
            for record in self.read()
            if isinstance(record, RequestRecord) and record.trace_id.startswith(prefix)
        }

    def ask(self, model: str, number: float, trace_id: str) -> float:
        """Ask *model* about one number, in a trace of its own."""
        tensor = {"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [number]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v2/models/{model}/infer",
            json.dumps({"inputs": [tensor]}).encode(),
            {
                "Content-Type": "application/json",
                "Traceparent": format_traceparent(trace_id, PARENT),
                "baggage": format_run("run-1"),
            },
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            return float(json.load(response)["outputs"][0]["data"][0])


def free_ports(many: int) -> list[str]:
    """Return ports that are free now."""
    with _Held(many) as sockets:
        return [str(listener.getsockname()[1]) for listener in sockets]


class _Held:
    """Sockets that hold a free port each."""

    def __init__(self, many: int) -> None:
        self.sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(many)]

    def __enter__(self) -> list[socket.socket]:
        return self.sockets

    def __exit__(self, *_: object) -> None:
        for listener in self.sockets:
            listener.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Let the server end by itself, which takes some seconds; what is left of it then is killed."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(40)
    finally:
        process.kill()
        process.wait(10)
        for left in family:
            with suppress(psutil.NoSuchProcess):
                left.kill()


@pytest.fixture(scope="module")
def served(server_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A ready server; gone, with all its processes, at the end."""
    spool = tmp_path_factory.mktemp("spool")
    log, ready = (spool / "server.log").open("wb"), spool / "ready"
    # Else Triton's Python backend loads another libpython than the one that runs us.
    libraries = subprocess.run(
        [server_python, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "LD_LIBRARY_PATH": libraries,
        "STAGESCOPE_SPOOL": str(spool),
        "STAGESCOPE_RAISE": "1",
    }
    ports = free_ports(3)
    process = subprocess.Popen(
        [server_python, SERVE, ready, *ports], env=environment, stdin=subprocess.PIPE,
        stdout=log, stderr=log,
    )  # fmt: skip
    assert process.stdin is not None
    try:
        wait_until(lambda: ready.exists() or process.poll() is not None, 60)
        assert ready.exists(), (spool / "server.log").read_text()
        served = Served(int(ports[0]), spool)
        for model in ("double", "asleep", "parameters"):  # Starts what Python starts only once.
            served.ask(model, 1.0, f"eeee{0:028x}")
        yield served
    finally:
        stop(process)
        log.close()


def test_concurrent_requests_have_each_their_own_stages(served: Served) -> None:
    """Twelve at once, batched by Triton: none lost, none on another's trace, times as slept."""
    sent = {f"aaaa{number:028x}": float(number) for number in range(12)}
    with ThreadPoolExecutor(12) as clients:
        answers = list(
            clients.map(lambda item: served.ask("double", item[1], item[0]), sent.items())
        )
    assert answers == [number * 2 for number in sent.values()]
    records = wait_until(lambda: len(found := served.requests("aaaa")) == 12 and found, 10)
    assert isinstance(records, dict)

    assert records.keys() == sent.keys()
    for record in records.values():
        spent = record.self_ns()
        assert (record.parent_span_id, record.run_id) == (PARENT, "run-1")
        assert (record.status, record.error) == (200, "")
        assert record.path == "/v2/models/double/infer"
        assert 20 * MS <= spent["preprocess"] < 80 * MS
        assert 50 * MS <= spent["inference"] < 150 * MS
        assert 10 * MS <= spent["postprocess"] < 60 * MS
        assert spent["other"] < 20 * MS
        assert len(record.batch_ids) == 1
        assert sum(spent.values()) == record.duration_ns


def test_a_batch_is_linked_both_ways(served: Served) -> None:
    """Triton's batches are records with their members, and members name their batch."""
    sent = [f"bbbb{number:028x}" for number in range(6)]
    with ThreadPoolExecutor(6) as clients:
        list(clients.map(lambda trace_id: served.ask("double", 1.0, trace_id), sent))
    wait_until(lambda: len(served.requests("bbbb")) == 6, 10)

    requests = served.requests("bbbb")
    batches = [
        record
        for record in served.read()
        if isinstance(record, BatchRecord) and record.members[0].trace_id in requests
    ]
    assert max(record.size for record in batches) > 1
    assert {record.model for record in batches} == {"double"}
    members = {member.trace_id: record for record in batches for member in record.members}
    assert members.keys() == requests.keys()
    for trace_id, record in requests.items():
        assert record.batch_ids == (members[trace_id].batch_id,)


def test_an_error_of_the_function_is_in_the_record(served: Served) -> None:
    """The client gets Triton's error; request and batch say what failed and where."""
    with pytest.raises(urllib.error.HTTPError):
        served.ask("double", -1.0, f"cccc{0:028x}")
    wait_until(lambda: served.requests("cccc"), 10)

    (record,) = served.requests("cccc").values()
    assert (record.status, record.error) == (500, "ValueError")
    assert [span.stage for span in record.stages if span.failed] == ["inference"]
    (failed,) = [batch for batch in served.read() if isinstance(batch, BatchRecord) and batch.error]
    assert (failed.batch_id,) == record.batch_ids


def test_coroutines_side_by_side_are_not_mixed_up(served: Served) -> None:
    """An async function serves several batches at once; each request is charged its own sleep."""
    sent = [f"dddd{number:028x}" for number in range(8)]
    with ThreadPoolExecutor(8) as clients:
        list(clients.map(lambda trace_id: served.ask("asleep", 1.0, trace_id), sent))
    wait_until(lambda: len(served.requests("dddd")) == 8, 10)

    for record in served.requests("dddd").values():
        assert 50 * MS <= record.self_ns()["inference"] < 150 * MS


def test_the_hook_has_triton_forward_the_headers(served: Served) -> None:
    """The model sees its request's two trace headers among its parameters, and no others."""
    assert served.ask("parameters", 0.0, f"ffff{0:028x}") == 2.0
