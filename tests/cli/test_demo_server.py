"""The demo's server process: the real example, small, over a real socket."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stagescope.cli.demo_server import TORCH_APP, ExampleServer, example_server
from stagescope.errors import StagescopeError
from stagescope.examples.image_server.images import sample_jpeg
from stagescope.testing import wait_until

SOURCE = str(Path(__file__).parents[2] / "src")
SMALL = {"IMAGE_SERVER_IMAGE_SIDE": "32", "PYTHONPATH": SOURCE}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExampleServer]:
    """A ready example server with a small model."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setenv(name, value)
        with example_server(tmp_path_factory.mktemp("demo") / "server.log") as running:
            running.wait_ready()
            yield running


def post(server: ExampleServer, body: bytes) -> tuple[int, Any]:
    """Post *body* and give the status and the JSON of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request("POST", "/predict", body, {"Content-Type": "image/jpeg"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_a_jpeg_is_answered_with_the_likeliest_classes(server: ExampleServer) -> None:
    """A real JPEG over a real socket gives five classes, best first."""
    status, answer = post(server, sample_jpeg())

    assert status == 200
    likely = [each["probability"] for each in answer["top"]]
    assert len(likely) == 5
    assert likely == sorted(likely, reverse=True)
    assert all(0 <= each["class"] < 1000 for each in answer["top"])


def test_the_torch_server_answers_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`demo --server torch` runs a model by torch, behind the same endpoint."""
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    with example_server(tmp_path / "server.log", TORCH_APP) as running:
        running.wait_ready()
        status, answer = post(running, sample_jpeg())

    assert status == 200
    assert len(answer["top"]) == 5


@pytest.mark.parametrize("body", [b"", b"GIF89a", sample_jpeg()[:700]])
def test_garbage_is_the_clients_fault(server: ExampleServer, body: bytes) -> None:
    """What is no JPEG gets 400 and a sentence, and the server goes on."""
    status, answer = post(server, body)

    assert status == 400
    assert "not a JPEG" in answer["detail"]
    assert post(server, sample_jpeg())[0] == 200


def test_an_endless_body_is_refused(server: ExampleServer) -> None:
    """A body beyond the limit gets 413."""
    status, _ = post(server, bytes(16_000_001))

    assert status == 413


def test_health_names_the_device_and_the_queue(server: ExampleServer) -> None:
    """A ready server says where its model runs and how many requests wait."""
    server.wait_drained()
    health = server.health()

    assert health is not None
    assert health["status"] == "ok"
    assert health["waiting"] == 0
    assert health["device"]


def test_the_server_is_gone_after_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving the block ends the process, even one that is only starting, and its spool."""
    monkeypatch.setenv("PYTHONPATH", SOURCE)
    with example_server(tmp_path / "server.log") as server:
        assert server.process.poll() is None

    assert server.process.poll() is not None
    assert not server.spool.exists()


def test_a_server_that_does_not_start_gives_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that dies is an error that holds the end of its log, not a long wait."""
    monkeypatch.setenv("PYTHONPATH", SOURCE)
    monkeypatch.setenv("IMAGE_SERVER_IMAGE_SIDE", "a few")
    with (
        pytest.raises(StagescopeError) as caught,
        example_server(tmp_path / "server.log") as server,
    ):
        server.wait_ready()

    assert "exit code" in str(caught.value)
    assert "invalid literal for int" in str(caught.value)


HOLDS_A_SERVER = """
import sys
from pathlib import Path
from stagescope.cli.demo_server import example_server
with example_server(Path(sys.argv[1])) as server:
    server.wait_ready()
    print(server.process.pid, server.spool, flush=True)
    sys.stdin.read()
"""


def test_no_server_is_left_when_the_demo_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the demo leaves neither server nor spool behind."""
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", HOLDS_A_SERVER, str(tmp_path / "server.log")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as demo:
        assert demo.stdout is not None
        said = demo.stdout.readline().split()
        child, spool = int(said[0]), Path(said[1].decode())
        assert running(child)
        os.kill(demo.pid, signal.SIGKILL)

    wait_until(lambda: not running(child), timeout_s=15)
    assert not spool.exists()


def running(pid: int) -> bool:
    """Return whether *pid* is a process that still runs (not a zombie that nobody has reaped)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
