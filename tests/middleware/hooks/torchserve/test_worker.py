"""The worker's side of TorchServe without TorchServe: its batches, and the log that comes late."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest

from stagescope import stage
from stagescope.middleware.hooks.torchserve import queue_waits
from stagescope.middleware.hooks.torchserve.queue_waits import Waits
from stagescope.middleware.hooks.torchserve.worker import (
    Call,
    StagescopeHandlerMixin,
    calibrate,
    front_end_thread,
    stage_owners,
)
from stagescope.middleware.recording.timeline import current
from stagescope.testing import wait_until
from stagescope.testing.clock import HandClock
from stagescope.testing.recording import Recording

TRACE = "0af7651916cd43dd8448eb211c80319c"
OK = bytearray(struct.pack("!i", 200))
ARRIVED = 10_000_000


class Context:
    """As much of TorchServe's context as the hook asks for."""

    def __init__(self) -> None:
        self.headers: dict[int, dict[str, str]] = {}

    def get_response_status(self, index: int) -> tuple[int, str]:
        """Return what the handler set, nothing here."""
        return 200, ""

    def set_response_header(self, index: int, name: str, value: str) -> None:
        """Keep a header."""
        self.headers.setdefault(index, {})[name] = value


def request(number: int, header: bytes = b"traceparent", run: bytes = b"") -> dict[str, Any]:
    """Make an item as TorchServe's protocol decodes it: names and values are bytearrays."""
    traceparent = f"00-{number:032x}-{number:016x}-01".encode()
    headers = [{"name": bytearray(header), "value": bytearray(traceparent)}]
    if run:
        headers.append({"name": bytearray(b"Baggage"), "value": bytearray(run)})
    return {
        "requestId": f"job-{number}".encode(),
        "headers": headers,
        "parameters": [{"name": "body", "value": b"12345", "contentType": ""}],
    }


@pytest.fixture
def clock() -> HandClock:
    """A clock that stands at the batch's arrival."""
    return HandClock(ARRIVED)


@pytest.fixture
def recording(tmp_path: Path, clock: HandClock) -> Iterator[Recording]:
    """A recorder on a real file."""
    recording = Recording(tmp_path, clock=clock)
    yield recording
    recording.close()


def handled(
    recording: Recording, clock: HandClock, requests: list[dict[str, Any]], context: Context
) -> Call:
    """Take a batch through a handler of one stage."""
    call = Call(recording.recorder, "m", requests, ARRIVED)
    clock.tick(1000)
    call.handler_begins()
    token = current.set(call.together)
    with stage("preprocess"):
        clock.tick(2000)
    current.reset(token)
    call.handler_ended(context)
    clock.tick(500)
    return call


def test_waiting_comes_from_the_log_after_the_end(
    recording: Recording, clock: HandClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records wait for their log lines; queue.batch ends and batch.wait begins when it formed."""
    path = tmp_path / "ts_log.log"
    path.write_text("W-9000-m Sending response for jobId job-1\n")
    monkeypatch.setenv("STAGESCOPE_SERVER_TIMING", "all")
    monkeypatch.setenv("STAGESCOPE_TORCHSERVE_LOG", str(path))
    monkeypatch.setattr(queue_waits, "PATIENCE_NS", 10**12)
    waits = Waits("W-9000")
    waits.begin()
    context = Context()
    requests = [
        request(1, run=b"stagescope.run=r"),
        request(2, b"Traceparent", b"stagescope.run=r"),
    ]
    call = handled(recording, clock, requests, context)
    free_ns = ARRIVED - 300
    waits.hold(call.end(OK, free_ns, context))
    assert recording.read() == []

    with path.open("a") as out:
        for number, wait in ((2, 100), (1, 800)):
            out.write(f"W-9000-m x - Sending response for jobId job-{number}\n")
            out.write(f"W-9000-m x - Waiting time ns: {wait}, Backend time ns: 1\n")
    wait_until(lambda: len(recording.read()) == 3)
    waits.close()
    first, second = recording.requests
    (batch,) = recording.batches
    common = {
        "preprocess.read": 1000, "preprocess": 2000, "postprocess.serialize": 500, "other": 0,
    }  # fmt: skip
    assert first.self_ns() == common | {"queue.batch": 500, "batch.wait": 300}
    assert second.self_ns() == common | {"batch.wait": 100}
    assert (first.start_ns, first.duration_ns) == (ARRIVED - 800, 4300)
    assert [record.trace_id for record in (first, second)] == [f"{1:032x}", f"{2:032x}"]
    assert [record.run_id for record in (first, second, batch)] == ["r", "r", "r"]
    assert (first.status, first.request_bytes, first.route) == (200, 5, "/predictions/m")
    assert first.batch_ids == second.batch_ids == (batch.batch_id,)
    assert (batch.start_ns, batch.size, batch.model) == (free_ns, 2, "m")
    assert [member.trace_id for member in batch.members] == [f"{1:032x}", f"{2:032x}"]
    assert context.headers[0]["Server-Timing"] == context.headers[1]["Server-Timing"]
    assert "preprocess;dur=0.003" in context.headers[0]["Server-Timing"]


def test_without_a_log_the_records_go_at_once(
    recording: Recording, clock: HandClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Where the log is not found it is logged once, and nothing claims to know the waiting."""
    monkeypatch.setenv("STAGESCOPE_TORCHSERVE_LOG", str(tmp_path / "none"))
    waits = Waits("W-9000")
    assert "TorchServe's log is not found" in caplog.text
    context = Context()
    waits.hold(handled(recording, clock, [request(1)], context).end(OK, 0, context))
    (record,) = recording.requests
    assert record.start_ns == ARRIVED
    assert not {"queue.batch", "batch.wait"} & record.self_ns().keys()
    assert context.headers == {}  # no load run, no Server-Timing
    waits.close()


def test_a_log_that_does_not_tell_is_not_waited_for_long(
    recording: Recording, clock: HandClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """At a log level that hides the lines the record goes after its patience, and that is said."""
    (tmp_path / "ts_log.log").touch()
    monkeypatch.setenv("STAGESCOPE_TORCHSERVE_LOG", str(tmp_path / "ts_log.log"))
    monkeypatch.setattr(queue_waits, "PATIENCE_NS", 0)
    waits = Waits("W-9000")
    context = Context()
    waits.hold(handled(recording, clock, [request(1)], context).end(OK, 0, context))
    wait_until(lambda: recording.requests)
    waits.close()
    assert "does not tell how long" in caplog.text


def test_a_held_record_survives_its_process(recording: Recording, clock: HandClock) -> None:
    """What was answered and is still held when the worker is killed comes as finished."""
    context = Context()
    call = handled(recording, clock, [request(1)], context)
    call.end(OK, 0, context)
    left = recording.reader.in_flight(clock())
    assert sorted((record.state.value, record.duration_ns) for record in left) == [
        ("finished", 3500), ("finished", 3500),
    ]  # fmt: skip


def test_own_cost_is_measured(recording: Recording) -> None:
    """A worker's recorder file tells what a request and a stage cost there."""
    calibrate(recording.recorder)
    cost = recording.reader.process.cost
    assert cost.base_ns > 0
    assert recording.read() == []


def test_stage_owners() -> None:
    """Stages are the methods of the handler, also inside an envelope or beside a function."""

    class Handler:
        def preprocess(self) -> None: ...
        def inference(self) -> None: ...
        def postprocess(self) -> None: ...
        def handle(self) -> None: ...

    class Envelope:
        def __init__(self, handle: Any) -> None:
            self._handle_fn = handle

        def handle(self) -> None: ...

    handler = Handler()
    namespace: dict[str, Any] = {"Handler": Handler, "_service": handler}
    entry = FunctionType((lambda data, context: None).__code__, namespace)
    assert stage_owners(handler.handle) == [handler]
    assert stage_owners(Envelope(handler.handle).handle) == [handler]
    assert stage_owners(entry) == [handler]
    assert stage_owners(SimpleNamespace()) == []


def test_front_end_thread() -> None:
    """A worker knows its Java thread's name by the port that it was started with."""
    unix = [
        "x",
        "--sock-type",
        "unix",
        "--sock-name",
        "/tmp/.ts.sock.9000",
        "--metrics-config",
        "m",
    ]
    assert front_end_thread(unix) == "W-9000"
    assert front_end_thread(["x", "--sock-type", "tcp", "--port", "9001"]) == "W-9001"
    assert front_end_thread([]) == "W"


def test_a_handler_is_a_class_without_torchserve_too() -> None:
    """The mixin steps aside where there is no TorchServe, as in a handler's own unit tests."""

    class Handler(StagescopeHandlerMixin):
        pass

    assert isinstance(Handler(), StagescopeHandlerMixin)
