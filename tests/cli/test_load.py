"""`stagescope load` as a person runs it: a process, a folder, signals, exit codes."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stagescope import load_run
from stagescope.errors import UsageError
from stagescope.runfolder.run import read_run
from stagescope.runfolder.schema import TABLES
from tests.support.http_server import Exchange, ScriptedServer

SOURCES = Path(__file__).parents[2] / "src"


def stagescope(*args: str, spool: Path) -> subprocess.Popen[str]:
    """Start `stagescope load` with *args*."""
    return subprocess.Popen(
        [sys.executable, "-m", "stagescope", "load", *args],
        env={"PYTHONPATH": str(SOURCES), "STAGESCOPE_SPOOL": str(spool)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read a table of a run folder."""
    found: list[dict[str, Any]] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return found


async def timed(exchange: Exchange) -> None:
    """Answer with a Server-Timing header, as the middleware does for a load run."""
    await exchange.reply(
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n"
        b"server-timing: queue;dur=1.5, inference;dur=2, total;dur=4\r\n\r\nok"
    )


def test_a_run_folder_is_whole(tmp_path: Path) -> None:
    """All tables and run.json are there; the server's side came from Server-Timing."""
    out = tmp_path / "run"
    with ScriptedServer(timed) as server:
        folder = load_run(
            server.url + "?secret=1",
            rate_per_s=50,
            duration_s=0.5,
            warmup_s=0.1,
            headers=("X-Key: secret",),
            out=out,
            spool=tmp_path,
        )
    run = read_run(folder)
    assert {file.name for file in folder.iterdir()} == {
        "run.json",
        *(table.file_name for table in TABLES),
    }
    assert run.server_source == "server-timing"
    assert run.plan.headers == ("X-Key",)
    assert "secret" not in (folder / "run.json").read_text()
    client, server_side = table(folder, "client"), table(folder, "server")
    assert len(client) == run.driver["planned"] == len(server_side)
    assert {row["trace_id"] for row in client} == {row["trace_id"] for row in server_side}
    assert {row["other_ns"] for row in server_side} == {500_000}
    assert run.started_ns <= client[0]["intended_ns"]


def test_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    """Ctrl-C: the folder holds every request sent, and run.json says that the run was ended."""
    out = tmp_path / "run"

    async def interrupt_at_20(exchange: Exchange) -> None:
        if exchange.number == 20:
            process.send_signal(signal.SIGINT)
        await timed(exchange)

    with ScriptedServer(interrupt_at_20) as server:
        process = stagescope(server.url, "--rate", "50", "--out", str(out), spool=tmp_path)
        _, errors = process.communicate(timeout=30)
    run = read_run(out)
    assert run.interrupted, errors
    assert len(table(out, "client")) == run.driver["sent"] >= 21
    assert len(table(out, "client")) < run.driver["planned"]
    assert "Traceback" not in errors


def test_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    """Two Ctrl-C against a server that hangs: what there is, is written at once."""
    out = tmp_path / "run"

    async def hang(exchange: Exchange) -> None:
        if exchange.number == 10:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
        await asyncio.sleep(60)

    with ScriptedServer(hang) as server:
        process = stagescope(server.url, "--rate", "50", "--out", str(out), spool=tmp_path)
        process.communicate(timeout=30)
    assert read_run(out).interrupted
    assert {row["error"] for row in table(out, "client")} == {"interrupted"}


def test_nothing_listening_is_one_sentence_and_no_folder(tmp_path: Path) -> None:
    """Exit code 1, and no empty run folder is left behind."""
    with ScriptedServer() as server:
        url = server.url
    out = tmp_path / "run"
    process = stagescope(url, "--out", str(out), spool=tmp_path)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert errors == (
        f"stagescope load: nothing answers at {url}: connection refused; is the server up?\n"
    )
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--rate", "nan"], "rate nan is not usable"),
        (["--rate", "1e9"], "rate 1e+09 is not usable"),
        (["--duration", "0"], "duration 0 is not usable"),
        (["--timeout", "0"], "timeout 0 is not usable"),
        (["--body", "no-such-file"], "body file no-such-file cannot be read"),
        (["--arrivals", "bursty"], "arrivals 'bursty' is not known"),
        (["--token-file", "no-such-file"], "token file no-such-file cannot be read"),
    ],
)
def test_wrong_usage_is_one_sentence(tmp_path: Path, args: list[str], sentence: str) -> None:
    """Exit code 2, before anything is sent."""
    process = stagescope("http://127.0.0.1:1/", *args, spool=tmp_path)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors.startswith(f"stagescope load: {sentence}")
    assert errors.count("\n") == 1


def test_a_run_folder_is_never_overwritten(tmp_path: Path) -> None:
    """A folder that holds something is refused before the run; what it holds stays."""
    (tmp_path / "mine").write_text("x")
    with ScriptedServer() as server:
        with pytest.raises(UsageError, match="choose another place with --out"):
            load_run(server.url, out=tmp_path)
        assert not server.requests
    assert (tmp_path / "mine").read_text() == "x"


def test_run_json_is_plain_json(tmp_path: Path) -> None:
    """Other tools read it without stagescope: numbers are numbers, the seed and plan are there."""
    with ScriptedServer() as server:
        folder = load_run(
            server.url, rate_per_s=20, duration_s=0.2, warmup_s=0, seed=5,
            arrivals="constant", out=tmp_path / "run", spool=tmp_path,
        )  # fmt: skip
    data = json.loads((folder / "run.json").read_text())
    assert data["plan"]["seed"] == 5
    assert data["server_source"] == "none"
    assert data["driver"]["sent"] == 4.0
    assert data["versions"]["aiohttp"]
