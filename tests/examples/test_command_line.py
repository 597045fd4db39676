"""The example servers as a person starts them: `--help`, `--host`, `--port`."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stagescope.testing import wait_until
from tests.support.server_processes import free_port


def command(example: str, *options: str) -> list[str]:
    """Return the command that starts *example*."""
    return [sys.executable, "-m", f"stagescope.examples.{example}", *options]


@pytest.mark.parametrize(
    "example", ["image_server", "onnxruntime_server", "torch_server", "transformers_server"]
)
def test_help_names_where_it_listens(example: str) -> None:
    """`--help` says what the server does, and starts nothing."""
    ended = subprocess.run(
        command(example, "--help"), capture_output=True, text=True, check=True, timeout=90
    )
    assert "--host" in ended.stdout
    assert "--port" in ended.stdout
    assert ended.stderr == ""


def test_it_listens_where_it_was_told_to(tmp_path: Path) -> None:
    """A request to that host and port is answered."""
    port = free_port()
    with subprocess.Popen(
        command("image_server", "--host", "127.0.0.1", "--port", str(port)),
        env=os.environ | {"STAGESCOPE_SPOOL": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            assert wait_until(lambda: answers(port), timeout_s=60) == 200
        finally:
            server.terminate()


def answers(port: int) -> int:
    """Return the status of the health page; 0 where nothing listens yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()
