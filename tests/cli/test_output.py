"""Output that nobody reads, that has no room, that cannot encode: a command ends as it would have."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stagescope.runfolder.run import read_run
from tests.support.http_server import Exchange, ScriptedServer

STAGESCOPE = f"{shlex.quote(sys.executable)} -m stagescope"


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run *command* in bash, where `stagescope` is the one under test."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; stagescope() {{ {STAGESCOPE} "$@"; }}; {command}'],
        env=os.environ | {"STAGESCOPE_SPOOL": str(folder), "COLUMNS": "80"} | environment,
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
    )


async def answered(exchange: Exchange) -> None:
    """Answer 200."""
    await exchange.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that answers."""
    with ScriptedServer(answered) as server:
        yield server.url


@pytest.mark.parametrize(
    ("redirects", "environment"),
    [
        ("| head -1", {}),
        ("2>&1 | head -1", {}),
        (">&-", {}),
        ("<&- >&- 2>&-", {}),
        ("> /dev/full", {}),
        ("", {"PYTHONIOENCODING": "ascii"}),
        ("", {"PYTHONIOENCODING": "latin-1", "COLUMNS": "20"}),
    ],
)
def test_a_load_run_is_kept_whatever_becomes_of_its_output(
    redirects: str, environment: dict[str, str], url: str, tmp_path: Path
) -> None:
    """The folder holds every request, the exit code is the run's, and there is no traceback."""
    load = f"stagescope load {url} --rate 300 --duration 0.5 --warmup 0 --out run"
    ended = shell(f"{load} {redirects}", tmp_path, **environment)
    assert "Traceback" not in ended.stderr
    assert "Exception" not in ended.stderr
    if "full" in redirects:
        assert ended.returncode == 1
        assert "output cannot be written: No space left on device" in ended.stderr
    else:  # On a busy machine the driver is late, and says so.
        assert ended.returncode == (2 if read_run(tmp_path / "run").invalid_reasons else 0)
    assert pq.read_table(tmp_path / "run" / "client.parquet").num_rows > 100
    assert (tmp_path / "run" / "server.parquet").exists()


@pytest.mark.parametrize(
    ("command", "code", "out", "err"),
    [
        ("stagescope --help | head -1", 0, "usage: stagescope", ""),
        ("stagescope load --help | head -1", 0, "usage: stagescope load", ""),
        ("stagescope doctor | head -1", 0, "What can be measured here", ""),
        ("stagescope --help > /dev/full", 1, "", "output cannot be written: No space left"),
        ("stagescope --help >&-", 0, "", ""),
        ("stagescope report none 2>&-", 2, "", ""),
        ("stagescope report none >&-", 2, "", "none is no run folder"),
        ("stagescope report none 2>&1 | head -c 5", 2, "stage", ""),
    ],
)
def test_other_commands_end_with_their_own_exit_code(
    command: str, code: int, out: str, err: str, tmp_path: Path
) -> None:
    """A reader that left is not told of, and an error never goes to standard output."""
    ended = shell(command, tmp_path)
    assert (ended.returncode, ended.stdout[: len(out)]) == (code, out), ended.stderr
    assert ended.stdout or not out
    assert err in ended.stderr
    assert bool(ended.stderr) == bool(err)
