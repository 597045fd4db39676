"""The embedded agent: exactly one drains, it yields to a process, another takes over."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from stagescope.agent.api.client import AgentClient
from stagescope.agent.lock import holder, try_hold
from stagescope.embedded import EmbeddedAgent, start_embedded_agent
from stagescope.errors import StagescopeError
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses
from tests.support.otlp import OtlpReceiver
from tests.support.rings import write_ring
from tests.support.server_processes import free_port, port_is_free


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as folder:
        yield folder


@pytest.fixture
def start_process() -> Iterator[AgentProcesses]:
    """Starts agents as processes, which are ended with the test."""
    with AgentProcesses() as start:
        yield start


SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def embedded(spool: Path) -> Iterator[EmbeddedAgent]:
    """The embedded agent of this process, draining."""
    agent = start_embedded_agent(spool)
    wait_until(lambda: agent.drains)
    yield agent
    agent.stop()


def health(spool: Path) -> dict[str, object]:
    """Ask who drains; empty where nobody answers."""
    try:
        return AgentClient(spool / "agent.sock").health()
    except StagescopeError:
        return {}


def test_it_drains_and_answers(spool: Path, embedded: EmbeddedAgent) -> None:
    """One call, and the records of the process's own ring are there to be asked for."""
    assert health(spool)["kind"] == "embedded"
    with write_ring(spool / "a.ring", 30, run_id="run"):
        assert AgentClient(spool / "agent.sock").run_counts("run").requests == 30


def scraped(port: int) -> str:
    """Read `/metrics`, as Prometheus does; empty where nobody serves it."""
    try:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read(), "utf-8")
    except OSError:
        return ""


def test_metrics_are_where_the_variable_says(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line and a port: Prometheus reads the server's requests, until the agent ends."""
    port = free_port()
    monkeypatch.setenv("STAGESCOPE_METRICS_PORT", str(port))
    agent = start_embedded_agent(spool)
    with write_ring(spool / "a.ring", 3):
        wait_until(lambda: "http_server_request_duration_seconds_count" in scraped(port), 20)
    agent.stop()
    assert port_is_free(port)


def test_no_port_is_taken_unasked_and_the_log_says_how(
    spool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The app may want any port; whoever looks for metrics finds the variable's name in the log."""
    with caplog.at_level(logging.INFO, "stagescope"):
        agent = start_embedded_agent(spool)
        wait_until(lambda: agent.drains)
    agent.stop()
    assert "STAGESCOPE_METRICS_PORT=9464 serves /metrics to Prometheus" in caplog.text
    assert "metrics at" not in caplog.text


def test_a_metrics_port_that_cannot_be_had_costs_a_sentence(
    spool: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else's port, or no port at all: records are read all the same."""
    for named, why in ((None, "cannot be listened on"), ("nine", "give PORT or HOST:PORT")):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            monkeypatch.setenv("STAGESCOPE_METRICS_PORT", named or str(listener.getsockname()[1]))
            agent = start_embedded_agent(spool)
            wait_until(lambda: bool(health(spool)), 20)
            agent.stop()
        assert why in caplog.text


def test_it_is_started_once(spool: Path, embedded: EmbeddedAgent) -> None:
    """A second call in the same process gives the one that runs."""
    assert start_embedded_agent(spool) is embedded


def test_off_is_off(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`STAGESCOPE_AGENT=off` starts no thread."""
    monkeypatch.setenv("STAGESCOPE_AGENT", "off")
    threads = threading.active_count()
    agent = start_embedded_agent(spool)
    assert threading.active_count() == threads
    assert not agent.alive
    agent.stop()


def test_what_keeps_it_from_working_is_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A spool that cannot be is a line in the log, never an exception in the server."""
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING, "stagescope"):
        agent = start_embedded_agent(tmp_path / "file")
        wait_until(lambda: not agent.alive)
    assert len(caplog.records) == 1
    assert "embedded agent is off" in caplog.text
    agent.stop()


def test_stop_reads_what_is_there(spool: Path, embedded: EmbeddedAgent) -> None:
    """What was committed just before the end is kept."""
    with write_ring(spool / "a.ring", 20, run_id="run"):
        embedded.stop()
    assert (spool / "runs" / "run.ndjson").read_text().count('"kind":"request"') == 20
    assert holder(spool) == {}


def test_of_two_one_stands_by_and_takes_over(spool: Path, embedded: EmbeddedAgent) -> None:
    """On one spool exactly one drains; when it stops the other goes on where it was."""
    other = EmbeddedAgent(spool, standby_s=0.02)
    other.start()
    with write_ring(spool / "a.ring", 5, run_id="run") as writer:
        assert AgentClient(spool / "agent.sock").run_counts("run").requests == 5
        assert embedded.drains
        assert not other.drains
        embedded.stop()
        wait_until(lambda: other.drains and health(spool))
        writer.request("run")
        assert AgentClient(spool / "agent.sock").run_counts("run").requests == 6
    other.stop()


def test_it_yields_to_a_process_and_takes_over_after_it(
    spool: Path, start_process: AgentProcesses
) -> None:
    """`stagescope agent` gets the spool from a server's thread, which has it back afterwards."""
    embedded = EmbeddedAgent(spool, standby_s=0.05)
    embedded.start()
    client = AgentClient(spool / "agent.sock")
    with write_ring(spool / "a.ring", 5, run_id="run") as writer:
        wait_until(lambda: embedded.drains)
        process = start_process(spool)
        assert health(spool)["kind"] == "agent"
        assert not embedded.drains
        writer.request("run")
        assert client.run_counts("run").requests == 6
        process.kill()
        process.communicate()
        wait_until(lambda: embedded.drains and health(spool).get("kind") == "embedded")
        writer.request("run")
        assert [record.seq for record in client.run_records("run")] == list(range(7))
    embedded.stop()


SERVER = """
import sys, time
from pathlib import Path
from stagescope.embedded import EmbeddedAgent
agent = EmbeddedAgent(Path(sys.argv[1]), standby_s=0.05)
agent.start()
print("up", flush=True)
sys.stdin.read()
agent.stop()
"""


@contextlib.contextmanager
def workers(spool: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Start servers with an embedded agent each."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SERVER, str(spool)],
            env=os.environ | {"PYTHONPATH": str(SOURCE)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(count)
    ]  # fmt: skip
    try:
        for process in started:
            assert process.stdout
            assert process.stdout.readline() == "up\n"
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_of_several_workers_exactly_one_drains(spool: Path) -> None:
    """Kill the worker that drains, and another one does; every record of the run is there once."""
    client = AgentClient(spool / "agent.sock")
    with write_ring(spool / "a.ring", 0, ring_slots=512) as writer, workers(spool, 3) as started:
        gone: set[object] = set()
        for _ in range(3):
            pid = wait_until(lambda: {health(spool).get("pid")} - gone - {None}).pop()
            writer.request("run")
            assert client.run_counts("run").requests == writer.next_seq
            gone.add(pid)
            next(p for p in started if p.pid == pid).send_signal(signal.SIGKILL)
    assert gone == {process.pid for process in started}


def test_a_forked_child_inherits_nothing(spool: Path, embedded: EmbeddedAgent) -> None:
    """A child holds neither lock nor socket of its parent's, and may start its own agent."""
    read_end, write_end = os.pipe()
    with write_ring(spool / "a.ring", 1) as writer:
        pid = os.fork()
        if pid == 0:  # the child lives on when the parent lets go
            writer.close()
            own = start_embedded_agent(spool)
            told = json.dumps({"own": own is not embedded, "alive": own.alive})
            os.write(write_end, told.encode())
            signal.pause()
            os._exit(0)
        try:
            assert json.loads(os.read(read_end, 200)) == {"own": True, "alive": True}
            assert health(spool)["pid"] == os.getpid()
            embedded.stop()
            wait_until(lambda: health(spool).get("pid") == pid)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(read_end)
            os.close(write_end)
    hold = wait_until(lambda: try_hold(spool, "agent"))
    assert hold
    hold.release()


def test_twenty_starts_and_stops_leave_nothing(spool: Path) -> None:
    """No thread, no descriptor, and the spool free after each."""
    threads = descriptors = 0
    with write_ring(spool / "a.ring", 5, run_id="run") as writer:
        for number in range(21):
            agent = start_embedded_agent(spool)
            wait_until(lambda agent=agent: agent.drains)  # type: ignore[misc]
            writer.request("run")
            agent.stop()
            assert not agent.alive
            if number == 0:  # imports and the like are done
                threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert (spool / "runs" / "run.ndjson").read_text().count('"kind":"request"') == 26


@pytest.fixture
def as_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody says how the agent is to be embedded; the suite as a whole does."""
    monkeypatch.delenv("STAGESCOPE_AGENT")


@pytest.mark.usefixtures("as_by_default")
def test_by_default_it_is_a_process_of_its_own(spool: Path) -> None:
    """The server's interpreter reads, decodes and parses nothing; its stop ends the process."""
    agent = start_embedded_agent(spool)
    wait_until(lambda: agent.drains, 30)
    found = holder(spool)
    with write_ring(spool / "a.ring", 20, run_id="run"):
        assert AgentClient(spool / "agent.sock").run_counts("run").requests == 20
        policy = os.sched_getscheduler(int(found["pid"]))
        agent.stop()

    assert found["kind"] == "embedded"
    assert found["pid"] != os.getpid()
    assert policy == os.SCHED_BATCH
    assert holder(spool) == {}


@pytest.mark.usefixtures("as_by_default")
def test_a_server_that_ends_at_once_starts_no_process(spool: Path) -> None:
    """As in a test of the app: what it recorded is read by a thread, at its end."""
    before = psutil.Process().children()  # such as multiprocessing's, of an earlier test
    with write_ring(spool / "a.ring", 20, run_id="run"):
        agent = start_embedded_agent(spool)
        agent.stop()
    assert set(psutil.Process().children()) <= set(before)
    assert (spool / "runs" / "run.ndjson").read_text().count('"kind":"request"') == 20


@pytest.fixture
def receiver(as_by_default: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
    """A back end, to which the environment points."""
    with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.http_endpoint)
        yield receiver


def test_where_it_exports_a_helper_process_does(spool: Path, receiver: OtlpReceiver) -> None:
    """Spans are built and sent outside the served process; its stop flushes."""
    agent = start_embedded_agent(spool)
    wait_until(lambda: agent.drains, 30)
    found = holder(spool)
    with write_ring(spool / "a.ring", 20, run_id="run"):
        agent.stop()

    assert found["kind"] == "embedded"
    assert found["pid"] != os.getpid()
    assert len([span for span in receiver.spans if span.kind == "server"]) == 20
    assert holder(spool) == {}


def test_a_program_that_is_no_python_is_not_started_as_one(
    spool: Path, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a program that embeds Python a thread sends the spans."""
    monkeypatch.setattr(sys, "executable", "/usr/bin/uwsgi")
    agent = start_embedded_agent(spool)
    wait_until(lambda: agent.drains, 30)
    with write_ring(spool / "a.ring", 5, run_id="run"):
        assert holder(spool)["pid"] == os.getpid()
        agent.stop()

    assert len([span for span in receiver.spans if span.kind == "server"]) == 5


def test_the_helper_of_a_server_that_is_killed_ends(spool: Path, receiver: OtlpReceiver) -> None:
    """Nothing of a killed server stays: its helper sees the end, flushes and goes."""
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from stagescope.embedded import start_embedded_agent\n"
        "start_embedded_agent(Path(sys.argv[1]))\ntime.sleep(600)\n"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(spool)], env=os.environ | {"PYTHONPATH": str(SOURCE)}
    )
    try:
        wait_until(lambda: health(spool), 30)
        helper = int(holder(spool)["pid"])
        assert helper != server.pid
    finally:
        server.kill()
        server.wait()
    wait_until(lambda: not holder(spool), 30)


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_TRACES_EXPORTER": "console"},
        {"STAGESCOPE_AGENT": "thread"},
        {"OTEL_TRACES_EXPORTER": "console", "OTEL_METRICS_EXPORTER": "otlp"},
    ],
)
def test_what_is_printed_or_a_thread_by_choice_needs_no_helper(
    spool: Path, variables: dict[str, str], receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's own thread drains, and what it prints is on the server's output."""
    if "OTEL_TRACES_EXPORTER" not in variables:
        monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with write_ring(spool / "a.ring", 20, run_id="run"), workers(spool, 1) as (server,):
        wait_until(lambda: health(spool).get("pid") == server.pid, 30)
        printed, _ = server.communicate(timeout=60)

    asked = "OTEL_TRACES_EXPORTER" in variables
    assert printed.count('"kind": "SpanKind.SERVER"') == (20 if asked else 0)


@pytest.fixture
def stuck_python(
    tmp_path: Path, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], int]:
    """A helper that never gets ready and reads nothing; returns its process id once it runs."""
    script, said = tmp_path / "python-that-hangs", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\necho $$ > {said}.new\nmv {said}.new {said}\nexec sleep 600\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    return lambda: int(wait_until(lambda: said.exists() and said.read_text(), 30))


def test_a_helper_that_is_not_ready_is_ended_with_its_server(
    spool: Path, stuck_python: Callable[[], int]
) -> None:
    """The end of the served app does not wait for it, and nothing of it stays."""
    agent = start_embedded_agent(spool)
    pid = stuck_python()
    assert not agent.drains
    agent.stop()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), 30)
    wait_until(lambda: not agent.alive, 30)


def test_a_helper_that_does_not_get_ready_is_given_up(
    spool: Path,
    stuck_python: Callable[[], int],
    receiver: OtlpReceiver,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After its deadline it is ended, one line says so, and a thread sends the spans."""
    agent = EmbeddedAgent(spool, standby_s=0.02, ready_s=0.5)
    agent.start()
    wait_until(lambda: agent.drains, 30)
    assert holder(spool)["pid"] == os.getpid()
    with write_ring(spool / "a.ring", 5, run_id="run"):
        agent.stop()
    assert len([span for span in receiver.spans if span.kind == "server"]) == 5
    assert "the agent's process was not ready within 0.5 s; it is a thread" in caplog.text


def test_nothing_that_a_helper_prints_can_block_it() -> None:
    """With both its outputs full and read by nobody it prints on, and ends."""
    code = (
        "import os, sys\nfrom stagescope.embedded import output_that_never_blocks\n"
        "with output_that_never_blocks() as output:\n"
        "    for _ in range(1000):\n"
        "        print('o' * 1000)\n"
        "        print('e' * 1000, file=sys.stderr)\n"
        "    os.write(output, b'ready')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()
        output, errors = process.communicate()
    assert output == b"ready"
    assert errors.startswith(b"e" * 1000 + b"\n")
