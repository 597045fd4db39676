"""What a back end answers: only an answer that says so, in time and of a sane size, is success."""

from __future__ import annotations

import logging
import resource
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from stagescope.exporters.otlp.sender import OtlpSpans, otlp_from_environment
from stagescope.exporters.tail_sampling import Share, TailSampler
from stagescope.testing import wait_until
from stagescope.testing.records import request_record
from tests.support.otlp import Behaviour, OtlpReceiver

SPANS_EACH = 9
"""Of one `request_record()`."""

Write = Callable[[bytes], object]
Answer = Callable[[Write, threading.Event], None]


@contextmanager
def back_end(answer: Answer) -> Iterator[str]:
    """Serve OTLP/HTTP on a free port, each request met by *answer*; returns the endpoint."""
    over = threading.Event()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):
                while head := self._head():
                    length = next(v for k, v in head if k == b"content-length")
                    self.rfile.read(int(length))
                    answer(self.wfile.write, over)

        def _head(self) -> list[tuple[bytes, bytes]]:
            if not self.rfile.readline():
                return []
            fields = iter(lambda: self.rfile.readline().strip(), b"")
            parts = [field.partition(b":") for field in fields]
            return [(name.lower(), value.strip()) for name, _, value in parts]

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            over.set()
            server.shutdown()
            thread.join()


def drip_body(write: Write, over: threading.Event) -> None:
    """Answer one byte of the body at a time, for ever."""
    write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while not over.wait(0.1):
        write(b"\0")


def drip_head(write: Write, over: threading.Event) -> None:
    """Answer one byte of a header at a time, for ever."""
    write(b"HTTP/1.1 200 OK\r\nX: ")
    while not over.wait(0.1):
        write(b"a")


def two_gigabytes(write: Write, over: threading.Event) -> None:
    """Answer far too much; streamed, held by nobody."""
    write(b"HTTP/1.1 200 OK\r\nContent-Length: 2147483648\r\n\r\n")
    for _ in range(2048):
        write(bytes(1 << 20))


def redirect(write: Write, over: threading.Event) -> None:
    """Answer that it is elsewhere."""
    write(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n")


def garbage(write: Write, over: threading.Event) -> None:
    """Answer 200 with a page of HTML, as a proxy's login does."""
    write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 13\r\n\r\n<html></html>")


def sink_at(endpoint: str, monkeypatch: pytest.MonkeyPatch, **more: str) -> OtlpSpans:
    """Make a sink that sends to *endpoint* soon."""
    for name, value in {"ENDPOINT": endpoint, "TIMEOUT": "1", **more}.items():
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{name}", value)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    sink = otlp_from_environment(TailSampler(Share(0.0, 0.0, 0.0)))
    assert sink
    return sink


@pytest.mark.parametrize("answer", [drip_body, drip_head, two_gigabytes, redirect, garbage])
def test_an_answer_that_is_no_success_is_a_failure(
    answer: Answer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends within the timeout, holds no memory, and is counted and logged."""
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with back_end(answer) as endpoint:
        sink = sink_at(endpoint, monkeypatch)
        sink.accept([request_record(run_id="r1")])
        wait_until(lambda: sink.counters()["failed_exports"], 30)
        counts = sink.counters()
        sink.close(1)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib

    assert (counts["sent_spans"], counts["dropped_failed_spans"]) == (0, SPANS_EACH)
    assert sink.settled == 1
    assert grown_kib < 100_000
    (said,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert "spans cannot be sent to http://127.0.0.1" in said.getMessage()


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_what_is_rejected_is_counted_and_said_once(
    protocol: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A partial success: the rest is sent, what is rejected is neither sent nor forgotten."""
    with OtlpReceiver() as receiver:
        receiver.rejected_spans = 4
        endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
        sink = sink_at(endpoint, monkeypatch, PROTOCOL=protocol, TIMEOUT="10")
        for number in (1, 2):
            sink.accept([request_record(run_id="r1")])
            wait_until(lambda number=number: sink.settled == number, 30)  # type: ignore[misc]
        sink.close(1)

    counts = sink.counters()
    assert (counts["sent_spans"], counts["rejected_spans"]) == (2 * (SPANS_EACH - 4), 2 * 4)
    assert caplog.text.count("rejects 4 of the spans") == 1


def test_what_an_outage_left_is_sent_at_a_bounded_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A back end that is back gets at most three times as many spans a second as come steadily."""
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1000")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "4000")
    with OtlpReceiver() as receiver:
        sink = sink_at(receiver.http_endpoint, monkeypatch, TIMEOUT="10")
        steady = SteadyRecords(sink)
        try:
            wait_until(lambda: len(receiver.spans) > 500, 60)
            receiver.behave(Behaviour.REFUSE)
            wait_until(lambda: sink.queued_spans > 3_000, 60)
            before = len(receiver.deliveries)
            receiver.behave(Behaviour.OK)
            wait_until(lambda: sink.queued_spans < 200, 60)
            caught_up = receiver.deliveries[before:]
        finally:
            steady.stop()
            sink.close(5)

    spans = sum(delivery.spans for delivery in caught_up[1:])
    took_s = caught_up[-1].at_s - caught_up[0].at_s
    assert spans > 1_000
    assert spans / took_s < 3.3 * SteadyRecords.RATE
    assert max(delivery.spans for delivery in caught_up[1:]) <= 1.7 * SteadyRecords.RATE


class SteadyRecords:
    """Gives a sink one record after the other, never faster than `RATE`, on a thread."""

    RATE = SPANS_EACH / 0.02
    """Spans a second."""

    def __init__(self, sink: OtlpSpans) -> None:
        self._sink = sink
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._give)
        self._thread.start()

    def _give(self) -> None:
        while not self._over.wait(0.02):
            self._sink.accept([request_record(run_id="r1")])

    def stop(self) -> None:
        """End it."""
        self._over.set()
        self._thread.join()


def test_a_password_in_the_endpoint_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """User name and password of the endpoint's URL are in no line."""
    with back_end(redirect) as endpoint:
        sink = sink_at(endpoint.replace("//", "//user:secret@"), monkeypatch)
        sink.accept([request_record(run_id="r1")])
        wait_until(lambda: caplog.records, 30)
        sink.close(1)

    assert "cannot be sent to http://127.0.0.1" in caplog.text
    assert "secret" not in caplog.text
