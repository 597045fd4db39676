"""A real TorchServe with one worker, batches of four, and ports and folders of its own.

Its model is `sleepy`; *python* is that of an environment in which torchserve is installed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil

from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import ring_files
from stagescope.records import BatchRecord, Record, RequestRecord
from stagescope.testing import wait_until

BATCH_SIZE = 4
BATCH_DELAY_MS = 150
START_S = 60.0


@dataclass(slots=True)
class Answer:
    """What a client got."""

    status: int
    body: str
    headers: dict[str, str]


class TorchServe:
    """A running server, as its clients and the spool's reader see it."""

    def __init__(self, port: int, management_port: int, spool: Path, logs: Path) -> None:
        self.port = port
        self.management_port = management_port
        self.spool = spool
        self.logs = logs
        self._readers: dict[Path, RecorderReader] = {}
        self._records: list[Record] = []

    def ask(self, word: str, headers: dict[str, str] | None = None) -> Answer:
        """Send one request and give the answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            body = json.dumps({"word": word})
            given = {"Content-Type": "application/json"} | (headers or {})
            connection.request("POST", "/predictions/sleepy", body, given)
            response = connection.getresponse()
            text = response.read().decode()
            names = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, text, names)
        finally:
            connection.close()

    def worker_pids(self) -> list[int]:
        """Return the pids of the workers that are ready; /ping would say so too early."""
        connection = HTTPConnection("127.0.0.1", self.management_port, timeout=5)
        try:
            connection.request("GET", "/models/sleepy")
            described = json.loads(connection.getresponse().read())
        except (OSError, HTTPException, ValueError):
            return []
        finally:
            connection.close()
        workers = described[0]["workers"] if isinstance(described, list) else []
        return [worker["pid"] for worker in workers if worker["status"] == "READY"]

    def scale(self, workers: int) -> list[int]:
        """Have *workers* workers; give their pids once all are ready."""
        connection = HTTPConnection("127.0.0.1", self.management_port, timeout=START_S)
        try:
            query = f"min_worker={workers}&max_worker={workers}&synchronous=true"
            connection.request("PUT", f"/models/sleepy?{query}")
            connection.getresponse().read()
        finally:
            connection.close()
        return wait_until(
            lambda: pids if len(pids := self.worker_pids()) == workers else [], timeout_s=START_S
        )

    def wait_ready(self) -> int:
        """Wait until the model can answer; give the worker's pid."""
        return int(wait_until(self.worker_pids, timeout_s=START_S)[0])

    def log_text(self) -> str:
        """Return the front end's log."""
        return (self.logs / "ts_log.log").read_text()

    def records(self) -> list[Record]:
        """Return all that was recorded so far, and what was in flight in dead workers."""
        for path in ring_files(self.spool):
            if path not in self._readers:
                self._readers[path] = RecorderReader(path)
        in_flight: list[Record] = []
        for reader in self._readers.values():
            alive = reader.writer_alive()
            self._records += reader.poll()
            in_flight += [] if alive else reader.in_flight(time.monotonic_ns())
        return self._records + in_flight

    def requests(self) -> dict[str, RequestRecord]:
        """Return the recorded requests by trace id."""
        found = [record for record in self.records() if isinstance(record, RequestRecord)]
        by_trace = {record.trace_id: record for record in found}
        if len(by_trace) < len(found):
            raise AssertionError("one trace has two records")
        return by_trace

    def batches(self) -> list[BatchRecord]:
        """Return the recorded batches."""
        return [record for record in self.records() if isinstance(record, BatchRecord)]

    def close(self) -> None:
        """Let go of the recorder files."""
        for reader in self._readers.values():
            reader.close()


def free_ports(count: int) -> list[int]:
    """Find ports that are free now: TorchServe cannot take port 0 and say which it got."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def archive(python: Path, handler: Path, folder: Path, *, mixin: bool) -> None:
    """Put *handler* into *folder* as TorchServe wants it, with or without our one line."""
    source = handler.read_text()
    if mixin:
        source = source.replace("(BaseHandler)", "(StagescopeHandlerMixin, BaseHandler)").replace(
            "\n\nPREPROCESS_S",
            "\nfrom stagescope.middleware.hooks.torchserve.worker import StagescopeHandlerMixin"
            "\n\nPREPROCESS_S",
        )
    used = folder / "handler.py"
    used.write_text(source)
    archiver = [str(python.parent / "torch-model-archiver"), "--model-name", "sleepy"]
    options = ["--version", "1.0", "--handler", str(used), "--export-path", str(folder)]
    subprocess.run([*archiver, *options], check=True, capture_output=True, timeout=60)


@contextmanager
def serving(
    python: Path, environment: dict[str, str], handler: Path, *, mixin: bool
) -> Generator[TorchServe]:
    """Run a server whose handler has our one line, or else `stagescope run` before its command."""
    if shutil.which("java") is None:
        raise AssertionError("TorchServe needs Java 17: apt-get install -y openjdk-17-jre-headless")
    # Short: the workers' sockets are in it, and a socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ts-"))
    archive(python, handler, folder, mixin=mixin)
    ports = free_ports(6)
    config = folder / "config.properties"
    config.write_text(_config(ports))
    environment = environment | {
        "STAGESCOPE_SERVER_TIMING": "all",  # the tests' runs are opened by no driver
        "PATH": f"{python.parent}:{os.environ['PATH']}",  # the front end starts `python`
        "TMPDIR": str(folder),
        "TEMP": str(folder),
        "LOG_LOCATION": str(folder / "logs"),
        "METRICS_LOCATION": str(folder / "logs"),
    }
    prefix = [] if mixin else [sys.executable, "-m", "stagescope", "run", "--no-agent", "--"]
    command = [str(python.parent / "torchserve"), "--foreground", "--start", "--ncs",
               "--ts-config", str(config), "--model-store", str(folder), "--disable-token-auth"]  # fmt: skip
    server = TorchServe(ports[0], ports[1], Path(environment["STAGESCOPE_SPOOL"]), folder / "logs")
    output = folder / "output"
    with output.open("wb") as out:
        process = subprocess.Popen(
            [*prefix, *command], env=environment, cwd=folder, stdout=out, stderr=out
        )
    try:
        server.wait_ready()
        yield server
    except BaseException:
        print(output.read_text()[-20000:])
        raise
    finally:
        _stop(process, folder, ports)
        server.close()
        shutil.rmtree(folder)


def _config(ports: list[int]) -> str:
    model = {
        "marName": "sleepy.mar", "minWorkers": 1, "maxWorkers": 1, "batchSize": BATCH_SIZE,
        "maxBatchDelay": BATCH_DELAY_MS, "responseTimeout": 60,
    }  # fmt: skip
    inference, management, metrics, grpc, grpc_management, workers = ports
    return "\n".join(
        (
            f"inference_address=http://127.0.0.1:{inference}",
            f"management_address=http://127.0.0.1:{management}",
            f"metrics_address=http://127.0.0.1:{metrics}",
            f"grpc_inference_port={grpc}",
            f"grpc_management_port={grpc_management}",
            f"initial_worker_port={workers}",
            "load_models=sleepy.mar",
            f"models={json.dumps({'sleepy': {'1.0': model}})}",
        )
    )


def _stop(process: subprocess.Popen[bytes], folder: Path, ports: list[int]) -> None:
    """End the Java process, which the launcher's own end would leave, and see that all is gone."""
    pid_file = folder / ".model_server.pid"
    if pid_file.exists():
        java = psutil.Process(int(pid_file.read_text()))
        family = [java, *java.children(recursive=True)]
        java.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(family, timeout=30)
        for member in left:
            member.kill()
        if left:
            raise AssertionError(f"still running after its front end was ended: {left}")
    elif process.poll() is None:
        process.terminate()
    process.wait(30)
    for port in ports[:5]:
        with socket.create_server(("127.0.0.1", port)):
            pass  # Nobody holds it any more.
