"""`stagescope run` on real servers that know nothing of stagescope: every request recorded."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.agent.api.client import AgentClient
from stagescope.cli.run_agent import AgentOptions
from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import ring_files
from stagescope.records import RequestRecord
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.commands import Running, ask, run_command
from tests.support.server_processes import free_port

APP = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"here"})
"""
SERVER = """
import uvicorn
from plain import app

if __name__ == "__main__":
    uvicorn.run(app, port=0)
"""
TRACES = [f"{number:032x}" for number in range(1, 41)]
TERMINATED = 128 + signal.SIGTERM
"""One uvicorn process shuts down, and then ends by the signal that asked it to."""
UVICORN = [sys.executable, "-m", "uvicorn", "--port", "0"]
GUNICORN = [sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--workers", "2",
            "--graceful-timeout", "5"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an app, and a script that serves it; neither imports stagescope."""
    (tmp_path / "plain.py").write_text(APP)
    (tmp_path / "server.py").write_text(SERVER)
    return tmp_path


@pytest.fixture
def spool() -> Iterator[Path]:
    """A spool of the test's own."""
    with short_spool() as made:
        yield made


def recorded(spool: Path) -> list[RequestRecord]:
    """Read every request in the recorder files of *spool*."""
    found: list[RequestRecord] = []
    for path in ring_files(spool):
        with RecorderReader(path) as reader:
            found += [record for record in reader.poll() if isinstance(record, RequestRecord)]
    return found


def services(spool: Path) -> list[str]:
    """Return the service that each recorder file names."""
    found = []
    for path in ring_files(spool):
        with RecorderReader(path) as reader:
            found.append(reader.process.service)
    return found


def ask_all(running: Running) -> None:
    """Send a request for each trace."""
    port = running.port()
    for trace in TRACES:
        assert ask(port, trace) == 200


def test_four_uvicorn_workers_are_one_service_and_lose_no_request(
    folder: Path, spool: Path
) -> None:
    """Four recorder files, one service, and each of the requests once, by its trace."""
    server = ["--service", "shop", "--no-agent", "--spool", str(spool), "--"]
    with run_command(folder, *server, *UVICORN, "plain:app", "--workers", "4") as running:
        running.port()
        wait_until(lambda: len(ring_files(spool)) == 4, 20)
        ask_all(running)
        assert running.end() == 0, running.text()
    assert services(spool) == ["shop"] * 4
    assert sorted(record.trace_id for record in recorded(spool)) == TRACES


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ([*GUNICORN, "-k", "uvicorn.workers.UvicornWorker", "plain:app"], 0),
        ([*GUNICORN, "-k", "uvicorn.workers.UvicornWorker", "--preload", "plain:app"], 0),
        ([*GUNICORN, "-k", "asgi", "plain:app"], 0),
        ([sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0", "plain:app"], 0),
        ([sys.executable, "server.py"], TERMINATED),
    ],
    ids=["gunicorn", "gunicorn-preload", "gunicorn-asgi", "hypercorn", "script"],
)
def test_other_servers_record_each_request_once(
    folder: Path, spool: Path, command: list[str], code: int
) -> None:
    """Forked, preloaded, spawned, or started by the user's own script: each trace is there once."""
    with run_command(folder, "--no-agent", "--spool", str(spool), "--", *command) as running:
        ask_all(running)
        assert running.end() == code, running.text()
    assert sorted(record.trace_id for record in recorded(spool)) == TRACES
    assert set(services(spool)) == {"model-server"}


def test_a_reloaded_worker_records_too(folder: Path, spool: Path) -> None:
    """`--reload` starts a new process for a changed app, and that one records."""
    options = ["--no-agent", "--spool", str(spool), "--"]
    with run_command(folder, *options, *UVICORN, "--reload", "plain:app") as running:
        port = running.port()
        assert ask(port, TRACES[0]) == 200

        def reloaded() -> bool:
            # Again and again: uvicorn takes what it sees first for unchanged.
            (folder / "plain.py").write_text(APP)
            return len(ring_files(spool)) >= 2

        wait_until(reloaded, 20)
        assert ask(port, TRACES[1]) == 200
        assert running.end() == 0, running.text()
    assert sorted(record.trace_id for record in recorded(spool)) == TRACES[:2]


def test_the_agent_beside_reads_all_and_ends_with_the_server(folder: Path, spool: Path) -> None:
    """The agent has the load run's requests; afterwards neither process nor file is left."""
    options = ["--spool", str(spool), "--metrics-port", "off", "--"]
    with run_command(folder, *options, *UVICORN, "plain:app", "--workers", "2") as running:
        port = running.port()
        for trace in TRACES:
            assert ask(port, trace, run_id="load") == 200
        running.wait_for("stagescope agent: reading spool")
        client = AgentClient(spool / "agent.sock")
        wait_until(lambda: client.run_counts("load").requests == len(TRACES), 20)
        assert client.health()["kind"] == "agent"
        assert running.end() == 0, running.text()
    assert ring_files(spool) == []
    assert not (spool / "agent.sock").exists()
    assert "left behind" not in running.text()


def test_what_a_short_lived_server_wrote_is_read(folder: Path, spool: Path) -> None:
    """Where the server has ended before the agent came up, its records are read all the same."""
    script = """
import asyncio, json, sys
import uvicorn
from plain import app

config = uvicorn.Config(app, lifespan="off")
config.load()

async def receive():
    return {"type": "http.request", "body": b""}

async def send(message):
    pass

scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
         "scheme": "http", "path": "/", "raw_path": b"/", "query_string": b"",
         "headers": [(b"baggage", b"stagescope.run=quick")], "client": None, "server": None}
asyncio.run(config.loaded_app(scope, receive, send))
"""
    options = ["--spool", str(spool), "--metrics-port", "off", "--"]
    with run_command(folder, *options, sys.executable, "-c", script) as running:
        assert running.wait() == 0, running.text()
    assert ring_files(spool) == []
    assert list((spool / "runs").glob("quick*")), running.text()


def test_another_agent_reads_and_is_taken_over_from(folder: Path, spool: Path) -> None:
    """Where an agent holds the spool no second one is started; once it has ended, one is."""
    options = ["--spool", str(spool), "--metrics-port", "off", "--"]
    first = [*options, *UVICORN, "plain:app"]
    client = AgentClient(spool / "agent.sock")
    with run_command(folder, *first, name="first.txt") as one:
        one.wait_for("stagescope agent: reading spool")
        holder = client.health()["pid"]
        with run_command(folder, *options, *UVICORN, "plain:app") as other:
            other.wait_for(f"agent pid {holder} reads spool {spool} already")
            other.port()
            one.port()
            assert one.end() == TERMINATED, one.text()
            other.wait_for("the other agent has ended; now pid")
            other.wait_for("stagescope agent: reading spool")
            assert client.health()["pid"] != holder
            assert other.end() == TERMINATED, other.text()


def test_the_users_own_sitecustomize_still_runs(folder: Path, spool: Path) -> None:
    """Both run: theirs, found where it was before, and ours."""
    own = folder / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("import os\nos.environ['THEIRS'] = __file__\n")
    script = (
        "import os, sitecustomize, uvicorn; print(os.environ['THEIRS'], sitecustomize.__file__)"
    )
    script += "; print(hasattr(uvicorn.Config.load, '__stagescope__'))"
    with run_command(
        folder, "--no-agent", "--spool", str(spool), "--", sys.executable, "-c", script,
        environment={"PYTHONPATH": str(own)},
    ) as running:  # fmt: skip
        assert running.wait() == 0, running.text()
    theirs = own / "sitecustomize.py"
    assert running.text().splitlines()[:2] == [f"{theirs} {theirs}", "True"]


def test_disabled_it_is_the_command_itself(folder: Path, spool: Path) -> None:
    """With STAGESCOPE_DISABLE=1 the command takes our place: same pid, nothing of ours set."""
    script = "import os; print(os.getpid(), os.environ.get('STAGESCOPE_RUN'))"
    with run_command(
        folder, "--spool", str(spool), "--", sys.executable, "-c", script,
        environment={"STAGESCOPE_DISABLE": "1"},
    ) as running:  # fmt: skip
        assert running.wait() == 0
    assert running.text() == f"{running.process.pid} None\n"
    assert os.listdir(spool) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["no-such-command"], 127, "no-such-command: no such command on PATH"),
        (["./no-such-file"], 127, "./no-such-file: no such file"),
        (["./plain.py"], 126, "./plain.py is not a program that may be executed"),
        ([], 2, "which server?"),
        (["sh", "-c", "exit 3"], 3, "started no Python that reads PYTHONPATH"),
        ([sys.executable, "-c", "import json"], 0,
         "WSGI apps are not timed; under daphne and other ASGI servers add StageMiddleware"),
        ([sys.executable, "-c", "import uvicorn"], 0, "hooked uvicorn, but it served no app"),
    ],
)  # fmt: skip
def test_what_is_no_server_is_said(
    folder: Path, spool: Path, words: list[str], code: int, said: str
) -> None:
    """One sentence, and the exit code of the command, or a shell's where there was none."""
    with run_command(folder, "--no-agent", "--spool", str(spool), "--", *words) as running:
        assert running.wait() == code
    assert running.text().startswith("stagescope run: ")
    assert said in running.text()
    assert running.text().count("\n") == 1


def test_a_wsgi_app_is_served_and_that_it_is_not_timed_is_said(folder: Path, spool: Path) -> None:
    """The last line is about WSGI, not about requests that did not come."""
    (folder / "wsgi.py").write_text(
        "def app(environ, start):\n"
        "    start('200 OK', [('Content-Length', '2')])\n"
        "    return [b'ok']\n"
    )
    with run_command(
        folder, "--no-agent", "--spool", str(spool), "--", *GUNICORN, "wsgi:app"
    ) as running:
        assert ask(running.port(), TRACES[0]) == 200
        assert running.end() == 0, running.text()
    assert "WSGI apps are not timed" in running.text().splitlines()[-1]


def test_the_agent_beside_takes_a_metrics_port_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may want the default port, or the one that the OTEL variable names."""
    silent = AgentOptions(tmp_path, None, None, quiet=True).words()
    asked = AgentOptions(tmp_path, None, "127.0.0.1:0", quiet=True).words()

    assert silent[silent.index("--metrics-port") + 1] == "off"
    assert asked[asked.index("--metrics-port") + 1] == "127.0.0.1:0"
    monkeypatch.setenv("STAGESCOPE_METRICS_PORT", "9777")
    named = AgentOptions(tmp_path, None, None, quiet=True).words()
    assert named[named.index("--metrics-port") + 1] == "9777"


def test_a_server_that_wants_the_metrics_port_has_it(folder: Path, spool: Path) -> None:
    """It serves metrics of its own where OpenTelemetry's variable says, as without stagescope."""
    port = free_port()
    (folder / "metered.py").write_text(
        "import http.server, os\n"
        "port = int(os.environ['OTEL_EXPORTER_PROMETHEUS_PORT'])\n"
        "server = http.server.HTTPServer(('127.0.0.1', port), http.server.SimpleHTTPRequestHandler)\n"
        "print(f'listens on 127.0.0.1:{port}', flush=True)\n"
        "server.serve_forever()\n"
    )
    with run_command(
        folder, "--spool", str(spool), "--", sys.executable, "metered.py",
        environment={"OTEL_EXPORTER_PROMETHEUS_PORT": str(port)},
    ) as running:  # fmt: skip
        running.wait_for("reading spool")
        assert running.port() == port
        assert "metrics at" not in running.text()
