"""The control API over the Unix socket and over TCP, asked by the client and by hand."""

import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.agent.api.client import AgentClient
from stagescope.agent.api.control import Control, listen, metrics_only, serve_socket, serve_tcp
from stagescope.agent.api.http_server import (
    MAX_CONNECTIONS,
    HttpServer,
    Reply,
    Request,
    problem,
)
from stagescope.errors import StagescopeError, UsageError
from stagescope.records import BatchRecord, RequestRecord, State, last_stage
from stagescope.samples import Sample
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import running_agent
from tests.support.evidence import kernel, sample, stack
from tests.support.rings import RingWriter, write_ring


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as folder:
        yield folder


TOKEN = "a-token"
S = 1_000_000_000


def text_of(accept: str) -> tuple[bytes, str]:
    """Stand for the metrics' text."""
    return f"accepts {accept}\n".encode(), "text/plain"


@pytest.fixture
def control(spool: Path) -> Iterator[Control]:
    """A working agent's control API."""
    with running_agent(spool) as agent:
        yield Control(agent, "agent", spool, text_of)


@pytest.fixture(params=["socket", "tcp"])
def client(control: Control, request: pytest.FixtureRequest) -> Iterator[AgentClient]:
    """A client of either kind."""
    if request.param == "socket":
        server = serve_socket(control)
        yield AgentClient(control.spool / "agent.sock")
    else:
        server = serve_tcp(control, ("127.0.0.1", 0), TOKEN)
        yield AgentClient(f"http://127.0.0.1:{server.port}", TOKEN)
    server.stop()


def test_health_and_counters(client: AgentClient) -> None:
    """Health says who answers; counters are flat numbers."""
    health = client.health()
    assert (health["status"], health["kind"], health["pid"]) == ("ok", "agent", os.getpid())
    assert health["uptime_s"] >= 0
    assert health["boot_id"]
    numbers = client.counters()
    assert all(isinstance(number, int | float) for number in numbers.values())
    assert {"records", "overwritten", "lost", "faults", "cpu_s", "rings", "late_ns",
            "request_base_ns", "request_stage_ns", "runs_stored"} <= set(numbers)  # fmt: skip


def test_a_runs_records_are_complete_when_asked_for(spool: Path, client: AgentClient) -> None:
    """What was committed before the question is in the answer, in new files too."""
    with write_ring(spool / "a.ring", 40, run_id="run") as writer:
        writer.request("another")
        assert client.run_counts("run").requests == 40
        writer.batch("run")
        writer.begin(0, "run")
    wait_until(lambda: client.run_counts("run").died)
    counts = client.run_counts("run")
    assert (counts.requests, counts.finished, counts.batches) == (41, 40, 1)
    records = list(client.run_records("run"))
    assert [record.seq for record in records] == [*range(40), 41, -1]
    assert isinstance(records[40], BatchRecord)
    died = records[41]
    assert isinstance(died, RequestRecord)
    assert (died.state, last_stage(died)) == (State.DIED, "inference")
    assert died.process.ring_id == writer.ring_id


def test_a_long_run_is_streamed(spool: Path, client: AgentClient) -> None:
    """More than one block comes over, every line whole."""
    with RingWriter(spool / "a.ring", ring_slots=2000) as writer:
        for _ in range(1500):
            writer.request("run")
        wait_until(lambda: client.run_counts("run").requests == 1500, timeout_s=20)
        assert [record.seq for record in client.run_records("run")] == list(range(1500))


def test_unknown_and_bad_ids_are_one_sentence(client: AgentClient) -> None:
    """A run that nothing was seen of counts zero, its records and odd ids are errors."""
    assert client.run_counts("unknown").requests == 0
    with pytest.raises(StagescopeError, match="nothing was recorded of load run unknown"):
        list(client.run_records("unknown"))
    with pytest.raises(StagescopeError, match="is no run id"):
        client.run_counts("..%2Fevil")
    with pytest.raises(StagescopeError, match="end it by SIGTERM"):
        client.ask_to_yield()


def test_samples_stacks_and_kernels_of_a_stretch_of_time(
    control: Control, client: AgentClient
) -> None:
    """What tells of a moment between is given; without limits, all of it."""
    now = time.monotonic_ns()  # what is older than half an hour is forgotten

    def times(first: int, last: int) -> dict[str, int]:
        return {"start_ns": now + first * S, "end_ns": now + last * S}

    evidence = control.agent.evidence
    early, late = sample(device="GPU-1", **times(1, 2)), sample(device="GPU-1", **times(7, 8))
    first, second = stack(**times(1, 1)), stack(**times(9, 9))
    captured = kernel(**times(1, 3))
    evidence.samples.add([early, late])
    evidence.stacks.add([first, second])
    evidence.kernels.add([captured])

    def of_device(samples: Iterator[Sample]) -> list[Sample]:
        return [one for one in samples if one.device == "GPU-1"]  # the agent has its own

    assert of_device(client.samples()) == [early, late]
    assert of_device(client.samples(now + 2 * S, now + 6 * S)) == [early]
    assert of_device(client.samples(now + 2 * S + 1)) == [late]
    assert list(client.stacks(since_ns=now + 2 * S)) == [second]
    assert list(client.kernels(now + 3 * S, now + 3 * S)) == [captured]
    assert list(client.kernels(now + 4 * S, now + 5 * S)) == []


def test_many_stacks_are_streamed(control: Control, client: AgentClient) -> None:
    """More than one block comes over, every line whole."""
    now = time.monotonic_ns()
    stacks = [stack(thread_id=n, start_ns=now, end_ns=now) for n in range(2_000)]
    control.agent.evidence.stacks.add(stacks)
    assert list(client.stacks()) == stacks


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("since=soon", "since='soon' is no moment: give whole nanoseconds"),
        ("until=", "until='' is no moment"),
        ("since=-1", "since='-1' is no moment"),
        ("since=1.5", "since='1.5' is no moment"),
        ("until=%D9%A1", "until='\u0661' is no moment"),
        ("since=" + "9" * 5000, "is no moment"),
        ("since=5&until=3", "since=5 is later than until=3: give the earlier first"),
    ],
)
@pytest.mark.parametrize("path", ["/samples", "/stacks", "/kernels"])
def test_a_moment_that_is_none_is_one_sentence(
    control: Control, path: str, query: str, sentence: str
) -> None:
    """400, and a sentence that shows what was given."""
    server = serve_tcp(control, ("127.0.0.1", 0), TOKEN)
    status, body, _ = ask(server, f"{path}?{query}", Authorization=f"Bearer {TOKEN}")
    assert status == 400
    assert sentence in json.loads(body)["error"]
    server.stop()


def test_an_older_agent_without_samples_is_said(control: Control) -> None:
    """Who asks an agent that knows no such path is told why there is nothing."""

    def older(request: Request) -> Reply:
        return problem(404, "nothing the agent knows")

    server = listen(("127.0.0.1", 0), older)
    client = AgentClient(f"http://127.0.0.1:{server.port}")
    with pytest.raises(StagescopeError, match="has no samples to give: it is older"):
        list(client.samples())
    server.stop()


def ask(server: HttpServer, path: str, **headers: str) -> tuple[int, str, str]:
    """Ask by hand; returns status, body and content type."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, body, response.headers["Content-Type"]


def test_tcp_wants_the_token(control: Control) -> None:
    """No token, a wrong one, or another scheme: 401 and one sentence, whatever the path."""
    server = serve_tcp(control, ("127.0.0.1", 0), TOKEN)
    for header in ("", "Bearer wrong", "Bearer ", f"Basic {TOKEN}", TOKEN, "Bearer \xe4"):
        status, body, _ = ask(server, "/health", Authorization=header)
        assert status == 401
        assert "bearer token" in body
    assert ask(server, "/nowhere")[0] == 401
    assert ask(server, "/health", Authorization=f"Bearer {TOKEN}")[0] == 200
    assert ask(server, "/health", Authorization=f"bearer  {TOKEN}")[0] == 200
    with pytest.raises(StagescopeError, match="bearer token"):
        AgentClient(f"http://127.0.0.1:{server.port}").health()
    server.stop()


@pytest.mark.parametrize("host", ["attacker.example", "attacker.example:9464", "10.0.0.7", "[::2]"])
def test_a_loopback_port_is_asked_by_a_loopback_name(control: Control, host: str) -> None:
    """A page whose name was made to point at 127.0.0.1 (DNS rebinding) gets 403 and no figures."""
    server = listen(("127.0.0.1", 0), metrics_only(text_of))
    status, body, _ = ask(server, "/metrics", Host=host)
    assert status == 403
    assert "loopback" in body
    for own in ("localhost", f"LOCALHOST:{server.port}", "127.0.0.1", "[::1]:80", "127.3.2.1"):
        assert ask(server, "/metrics", Host=own)[0] == 200
    server.stop()


def test_slow_clients_do_not_silence_the_port(control: Control) -> None:
    """More connections than there is room for, none of which asks anything: a scrape is served."""
    server = listen(("127.0.0.1", 0), metrics_only(text_of))
    slow = [
        socket.create_connection(("127.0.0.1", server.port)) for _ in range(2 * MAX_CONNECTIONS)
    ]
    for one in slow:
        one.send(b"GET /metr")
    assert ask(server, "/metrics")[0] == 200
    for one in slow:
        one.close()
    server.stop()


def test_tcp_is_refused_without_a_token(control: Control) -> None:
    """The control API is never open over TCP."""
    with pytest.raises(UsageError, match="without a token"):
        serve_tcp(control, ("127.0.0.1", 0), "")


def test_paths_that_are_none_are_404(control: Control) -> None:
    """An unknown path says what there is."""
    server = serve_tcp(control, ("127.0.0.1", 0), TOKEN)
    for path in ("/", "/nowhere", "/runs", "/runs/a/b/c"):
        status, body, _ = ask(server, path, Authorization=f"Bearer {TOKEN}")
        assert status == 404
        assert "/health" in body
    server.stop()


def test_metrics_come_in_the_accepted_format(control: Control) -> None:
    """The Accept header reaches whoever writes the text, on the metrics port too."""
    server = listen(("127.0.0.1", 0), metrics_only(text_of))
    for name in ("Accept", "accept", "ACCEPT"):
        assert ask(server, "/metrics", **{name: "x"}) == (200, "accepts x\n", "text/plain")
    assert ask(server, "/health")[0] == 404
    server.stop()


def test_an_address_that_is_taken_is_said(control: Control) -> None:
    """The sentence names the address."""
    server = listen(("127.0.0.1", 0), metrics_only(text_of))
    with pytest.raises(StagescopeError, match=rf"127\.0\.0\.1:{server.port} cannot be listened"):
        listen(("127.0.0.1", server.port), metrics_only(text_of))
    server.stop()


def test_the_socket_is_for_its_owner_alone(control: Control) -> None:
    """0600 from its first moment, whatever the umask; and gone when the server stops."""
    before = os.umask(0)
    try:
        server = serve_socket(control)
    finally:
        os.umask(before)
    path = control.spool / "agent.sock"
    assert path.stat().st_mode & 0o777 == 0o600
    server.stop()
    assert not path.exists()


def test_a_socket_that_a_dead_agent_left_is_replaced(control: Control) -> None:
    """Who holds the spool may replace the socket's file."""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(control.spool / "agent.sock"))
    stale.close()
    server = serve_socket(control)
    assert AgentClient(control.spool / "agent.sock").health()["status"] == "ok"
    server.stop()


def test_a_socket_path_that_is_too_long_is_said(tmp_path: Path) -> None:
    """The sentence names the length, the limit and the way out."""
    spool = tmp_path / ("x" * 100)
    spool.mkdir()
    with (
        running_agent(spool) as agent,
        pytest.raises(StagescopeError, match="choose a shorter spool folder"),
    ):
        serve_socket(Control(agent, "agent", spool))


def test_nobody_there_is_one_sentence(spool: Path) -> None:
    """No socket, a refused port, an address of another kind."""
    with pytest.raises(StagescopeError, match="no agent answers at"):
        AgentClient(spool / "agent.sock").health()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(StagescopeError, match="no agent answers at"):
        AgentClient(f"http://127.0.0.1:{port}").health()
    with pytest.raises(UsageError, match="neither http"):
        AgentClient("ftp://host")


def test_an_answer_that_breaks_off_is_an_error(control: Control) -> None:
    """A client never takes half of a run for the whole."""

    def halves() -> Iterator[bytes]:
        yield b'{"kind": "sample"}\n{"kind": "sam'
        raise ConnectionResetError

    server = listen(("127.0.0.1", 0), lambda request: Reply(halves()))
    with pytest.raises(StagescopeError, match="broke off"):
        list(AgentClient(f"http://127.0.0.1:{server.port}").run_records("run"))
    server.stop()


def test_twenty_servers_leave_no_thread_and_no_descriptor(control: Control) -> None:
    """Stopping cuts off idle clients and ends every thread."""
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        server = serve_socket(control)
        idle = socket.socket(socket.AF_UNIX)
        idle.connect(str(control.spool / "agent.sock"))
        AgentClient(control.spool / "agent.sock").health()
        server.stop()
        idle.close()
    # Fewer is fine: the garbage collector may close what other tests have left to it.
    assert threading.active_count() <= threads
    assert len(os.listdir("/proc/self/fd")) <= descriptors
