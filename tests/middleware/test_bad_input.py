"""Bad input: served as ever, one sentence in the log, and nothing secret in the file."""

import asyncio
import errno
import logging
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.recording import guard, names
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.stage import stage
from stagescope.middleware.types import Receive, Scope, Send
from stagescope.recorder import format as fmt
from stagescope.testing.recording import Recording
from tests.support.serving import exchange, served

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"
SECRET = "hunter2-5f3a"


@pytest.fixture(autouse=True)
def _our_faults_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our guard would swallow fails the test."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """A small recorder file."""
    with closing(Recording(tmp_path / "spool")) as found:
        yield found


@pytest.fixture
def few_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give the process its table of stage names back as it was, and nothing said yet."""
    monkeypatch.setattr(guard, "_said", set())
    before = dict(names.CODES)
    monkeypatch.setattr(names, "_next_code", count(len(before) + 1).__next__)
    yield
    names.CODES.clear()
    names.CODES.update(before)


async def hello(scope: Any, receive: Any, send: Any) -> None:
    """Answer every request with a body of two bytes."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    password = SECRET  # noqa: F841 - a local variable, to be looked for in the file
    while (await receive()).get("more_body"):
        pass
    if scope["path"] == "/fails":
        raise ValueError(SECRET)
    headers = [(b"content-length", b"2"), (b"set-cookie", SECRET.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hi"})


def call(app: Any, headers: Any = (), **changes: Any) -> list[Any]:
    """Serve one request without a server; give what was sent."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": list(headers)} | changes
    asyncio.run(app(scope, receive, send))
    return sent


# --- headers ------------------------------------------------------------------------------------

TRACEPARENTS = {
    "none": ([], False),
    "valid": ([TRACEPARENT], True),
    "upper case": ([TRACEPARENT.upper()], False),
    "twice": ([TRACEPARENT, TRACEPARENT], False),
    "two different": ([TRACEPARENT, TRACEPARENT.replace("0a", "0b")], False),
    "over-long": ([TRACEPARENT + "-" + "x" * 20_000], False),
    "over-long, later version": (["01" + TRACEPARENT[2:] + "-" + "x" * 20_000], True),
    "empty": ([""], False),
    "odd bytes": (["\xff\x80\x01" * 20], False),
}


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_odd_traceparents_are_absent_ones(http: str, recording: Recording) -> None:
    """Through a real server: a new trace where the header is not exactly right, never an error."""
    with served(StageMiddleware.around(hello, recording.recorder), http) as port:
        for values, _ in TRACEPARENTS.values():
            lines = "".join(f"TraceParent: {value}\r\n" for value in values).encode("latin-1")
            answer = exchange(
                port, b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n%s\r\n" % lines
            )
            served_or_refused = answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))
            assert served_or_refused, answer
            assert answer.endswith(b"hi") or b"400" in answer

    recorded = recording.requests
    taken = [record.trace_id == TRACE and record.parent_span_id == SPAN for record in recorded]
    expected = [valid for _, valid in TRACEPARENTS.values()]
    # The server may have refused the last one itself, for its control bytes.
    assert taken == expected[: len(taken)]
    assert len(taken) >= len(expected) - 1


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"traceparent", b"baggage", b"x", b"", b"TRACEPARENT", b"\xff"]),
            st.one_of(
                st.binary(max_size=80),
                st.just(TRACEPARENT.encode()),
                st.binary(max_size=60).map(lambda value: b"stagescope.run=" + value),
                st.just(b"stagescope.run=a" + b"," * 9000),
            ),
        ),
        max_size=6,
    )
)
def test_any_header_bytes_are_served(
    recording: Recording, headers: list[tuple[bytes, bytes]]
) -> None:
    """Whatever stands in headers, the app is served and the record has a trace and a sane run."""
    sent = call(StageMiddleware.around(hello, recording.recorder), headers)

    record = recording.requests[-1]
    assert sent[-1]["body"] == b"hi"
    assert len(record.trace_id) == 32
    assert set(record.trace_id) != {"0"}
    assert len(record.run_id) <= 40
    assert "," not in record.run_id


# --- paths and methods ----------------------------------------------------------------------------


def test_a_path_of_a_megabyte(recording: Recording) -> None:
    """It is cut in the record; through a server its own limit answers, and the next is served."""
    path = "/" + "é" * (1 << 20)
    app = StageMiddleware.around(hello, recording.recorder)
    assert call(app, path=path, method="M" * 10_000)[-1]["body"] == b"hi"
    assert call(app, path="/x", raw_path=b"/" + b"y" * (1 << 20))[-1]["body"] == b"hi"
    first, second = recording.requests
    assert path.startswith(first.path.rstrip("\ufffd"))
    assert len(second.path) == 128
    assert first.method == "M" * 8

    for http in ("h11", "httptools"):
        with served(app, http) as port:
            line = b"GET /" + b"z" * (1 << 20) + b" HTTP/1.1\r\n"
            try:
                answer = exchange(port, line + b"host: h\r\nconnection: close\r\n\r\n")
            except ConnectionError:  # Closed with our bytes unread: the server's own way.
                answer = b""
            assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200"))
            assert exchange(port, b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")


# --- stage names ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_names")
@pytest.mark.parametrize("name", [None, 3, b"bytes", [], "", "x" * 64, "é" * 32, "\x00" * 64])
def test_what_is_no_stage_name_is_other(
    name: Any, recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts as `other`, is logged once however often it comes, and is counted each time."""
    with recording.request():
        for _ in range(5):
            with stage(name):
                pass

    (record,) = recording.requests
    assert [span.stage for span in record.stages] == ["other"] * 5
    assert len(caplog.records) == 1
    assert recording.reader.counters()["names_refused"] == 5


@pytest.mark.usefixtures("few_names")
def test_ten_thousand_names_are_bounded(
    recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    """The table takes what it holds; the rest is `other`, logged once and counted, and served."""
    room = names.MOST - len(names.CODES)
    for first in range(0, 10_000, 100):
        with recording.request():
            for index in range(first, first + 100):
                with stage(f"n{index}"):
                    pass

        recording.read()

    found = [span.stage for record in recording.requests for span in record.stages]
    assert found == [f"n{index}" for index in range(room)] + ["other"] * (10_000 - room)
    assert len(caplog.records) == 1
    assert recording.reader.counters()["names_refused"] == 10_000 - room


@pytest.mark.usefixtures("few_names")
def test_a_name_of_odd_text_harms_no_later_file(recording: Recording, tmp_path: Path) -> None:
    """Lone surrogates are replaced, also when a second file copies the table."""
    with recording.request(), stage("\udcff!"):
        pass
    with closing(Recording(tmp_path / "second")) as second:
        with second.request(), stage("\udcff!"):
            pass
        assert second.requests[0].stages[0].stage == "?!"
    assert recording.requests[0].stages[0].stage == "?!"


# --- the spool ------------------------------------------------------------------------------------


@contextmanager
def tiny_disk(folder: Path) -> Iterator[Path]:
    """A full disk: a file system of 1 MiB where we may mount one, else a limit on file sizes."""
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    mounted = subprocess.run(mounting, capture_output=True, check=False).returncode == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
        yield folder
        assert not list(folder.iterdir()), "something half-made was left"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def assert_served_with_one_sentence(spool: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Serve several requests, with a lifespan, on a spool that cannot be used."""
    app = StageMiddleware(hello, "bad-spool", spool)
    with caplog.at_level(logging.INFO, "stagescope"), served(app) as port:
        for _ in range(3):
            answer = exchange(port, b"GET / HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n")
            assert answer.endswith(b"hi")
    said = [record for record in caplog.records if record.name == "stagescope"]
    assert len(said) == 1
    assert said[0].exc_info is None
    assert "\n" not in said[0].getMessage()
    assert str(spool) in said[0].getMessage()
    return said[0].getMessage()


def test_a_full_disk_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No room for the file: one sentence that names it, nothing left behind, the app served."""
    with tiny_disk(tmp_path / "tiny") as spool:
        said = assert_served_with_one_sentence(spool, caplog)
    size = fmt.file_bytes(fmt.IN_FLIGHT_SLOTS, fmt.RING_SLOTS)
    causes = [
        "MB are free there, which are left to others",
        f"of {size} bytes in {spool}: {os.strerror(errno.EFBIG)}",
    ]
    assert any(cause in said for cause in causes)


@pytest.mark.parametrize("way", ["a file", "below a file", "/proc", "no access"])
def test_an_unusable_spool_is_said_once(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file in the way, a file system that takes no files: one sentence, the app served."""
    (tmp_path / "file").touch()
    spools = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "spool",
        "/proc": Path("/proc/stagescope"),
        "no access": Path("/proc/self/fdinfo"),
    }
    assert_served_with_one_sentence(spools[way], caplog)


def test_a_missing_spool_is_made(tmp_path: Path) -> None:
    """A spool that is not there yet is nobody's fault."""
    spool = tmp_path / "a" / "b"
    script = (
        "import asyncio, sys; sys.path.insert(0, sys.argv[1]); import test_bad_input as t\n"
        "t.call(t.StageMiddleware(t.hello, 'service', sys.argv[2]))\n"
    )
    source = Path(__file__).parents[2] / "src"
    subprocess.run(
        [sys.executable, "-c", script, str(Path(__file__).parent), str(spool)],
        env=os.environ | {"PYTHONPATH": str(source)},
        check=True,
        timeout=60,
    )
    assert len(list(spool.glob("*.ring"))) == 1


# --- privacy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_nothing_secret_reaches_the_file(http: str, recording: Recording) -> None:
    """Query, header values, bodies, messages of exceptions and locals are nowhere in its bytes."""
    head = (
        f"authorization: Bearer {SECRET}\r\ncookie: {SECRET}\r\nx-{SECRET}: {SECRET}\r\n"
        f"baggage: user={SECRET}, stagescope.run=run-1\r\ntracestate: a={SECRET}\r\n"
        f"content-length: {len(SECRET)}\r\nconnection: close\r\n\r\n{SECRET}"
    )
    with served(StageMiddleware.around(hello, recording.recorder), http) as port:
        for target in (f"/ok?key={SECRET}", f"/fails?{SECRET}", f"/ok?a=b?{SECRET}#{SECRET}"):
            exchange(port, f"POST {target} HTTP/1.1\r\nhost: {SECRET}\r\n{head}".encode())
    raw = {"path": "/ok", "raw_path": f"/ok?{SECRET}".encode(), "query_string": SECRET.encode()}
    call(StageMiddleware.around(hello, recording.recorder), **raw)

    records = recording.requests
    assert [record.path for record in records] == ["/ok", "/fails", "/ok", "/ok"]
    assert [record.run_id for record in records] == ["run-1"] * 3 + [""]
    assert records[1].error == "ValueError"
    data = recording.path.read_bytes()
    assert b"run-1" in data
    assert SECRET.encode() not in data


def test_a_forged_stamp_takes_no_slot(tmp_path: Path) -> None:
    """A stamp from before the host was up is not believed, and no request's slot is lost by it."""
    base_ns = time.monotonic_ns()
    recorder = Recorder(
        memoryview(bytearray(fmt.file_bytes(4, 8))),
        in_flight_slots=4,
        ring_slots=8,
        clock=lambda: time.monotonic_ns() - base_ns + 1_000_000_000,  # Up for a second.
    )

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        return

    async def main() -> None:
        for _ in range(10):
            stamp = b"t=%.3f" % (time.time() - 5)
            await StageMiddleware.around(app, recorder)(
                {"type": "http", "method": "GET", "path": "/",
                 "headers": [(b"x-request-start", stamp)]}, receive, send,
            )  # fmt: skip

    asyncio.run(main())

    assert len(getattr(recorder.take_slot, "__self__")) == 4  # noqa: B009 - bound method of a deque


def test_a_clock_that_steps_back_takes_no_slot(recording: Recording) -> None:
    """Such a request is recorded with no duration rather than not at all."""
    with recording.request() as timeline:
        timeline.start_ns += 60_000_000_000

    assert [record.duration_ns for record in recording.requests] == [0]
