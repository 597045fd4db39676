"""The control API: what a person or the load driver may ask a running agent; docs/agent.md."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from pathlib import Path

from stagescope.agent.api.address import url
from stagescope.agent.api.http_server import (
    HttpServer,
    Reply,
    Request,
    check_socket_path,
    json_reply,
    problem,
)
from stagescope.agent.loop import Agent
from stagescope.agent.pipeline import Render
from stagescope.agent.store.live import WINDOW_S, to_json
from stagescope.agent.store.serialize import KERNELS, SAMPLES, STACKS, in_blocks
from stagescope.errors import StagescopeError, UsageError
from stagescope.identity import boot_id, own_version
from stagescope.recorder.spool import SOCKET_NAME

_log = logging.getLogger("stagescope")

NDJSON = "application/x-ndjson"
END_OF_TIME_NS = (1 << 63) - 1
MOMENT_DIGITS = 19


@dataclass(frozen=True, slots=True)
class Control:
    """Answers for one agent; the routes of the control API."""

    agent: Agent
    kind: str
    spool: Path
    render: Render | None = None
    """None: there are no metrics here."""
    yield_now: Callable[[], None] | None = None
    """None: this agent does not yield."""
    started_ns: int = field(default_factory=time.monotonic_ns)

    def answer(self, request: Request) -> Reply:
        """Answer one request."""
        parts = request.path.strip("/").split("/")
        try:
            match request.method, parts:
                case "GET", ["health"]:
                    return self._health()
                case "GET", ["counters"]:
                    self.agent.catch_up()
                    return json_reply({**self.agent.counters(), **self.agent.gauges()})
                case "GET", ["metrics"]:
                    return metrics_reply(self.render, request)
                case "GET", ["runs", run_id]:
                    return self._run(run_id)
                case "POST", ["runs", run_id]:
                    self.agent.runs.open(run_id)
                    return json_reply({"run_id": run_id, "open": True})
                case "POST", ["runs", run_id, "close"]:
                    self.agent.runs.close_run(run_id)
                    return json_reply({"run_id": run_id, "open": False})
                case "GET", ["runs", run_id, "records"]:
                    return self._records(run_id)
                case "GET", ["live"]:
                    return self._live(request)
                case "GET", ["cold-starts"]:
                    return self._cold_starts()
                case "GET", ["samples" | "stacks" | "kernels" as kind]:
                    return self._evidence(kind, *_stretch(request))
                case "POST", ["yield"]:
                    return self._yield()
                case _:
                    return _nothing_there(request)
        except UsageError as wrong:
            return problem(HTTPStatus.BAD_REQUEST, str(wrong))

    def _health(self) -> Reply:
        return json_reply(
            {
                "status": "ok",
                "kind": self.kind,
                "pid": os.getpid(),
                "version": own_version(),
                "uptime_s": (time.monotonic_ns() - self.started_ns) / 1e9,
                "boot_id": boot_id(),
                "spool": str(self.spool),
            }
        )

    def _run(self, run_id: str) -> Reply:
        self.agent.catch_up()
        counts = self.agent.runs.counts(run_id)
        return json_reply(asdict(counts)) if counts else self._no_run(run_id)

    def _records(self, run_id: str) -> Reply:
        self.agent.catch_up()
        blocks = self.agent.runs.read(run_id)
        return Reply(blocks, NDJSON) if blocks is not None else self._no_run(run_id)

    def _live(self, request: Request) -> Reply:
        text = request.query.get("seconds", str(WINDOW_S))
        if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= WINDOW_S):
            raise UsageError(f"seconds={text[:40]!r}: give a whole number from 1 to {WINDOW_S}")
        self.agent.catch_up()
        return json_reply(to_json(self.agent.live.read(int(text)), int(text)))

    def _cold_starts(self) -> Reply:
        self.agent.catch_up()
        return Reply(self.agent.cold_starts.read(), NDJSON)

    def _evidence(self, kind: str, since_ns: int, until_ns: int) -> Reply:
        evidence = self.agent.evidence
        match kind:
            case "samples":
                lines = SAMPLES.write(evidence.samples.between(since_ns, until_ns))
            case "stacks":
                evidence.settle()  # what a window that still lasts has seen, too
                lines = STACKS.write(evidence.stacks.between(since_ns, until_ns))
            case _:
                lines = KERNELS.write(evidence.kernels.between(since_ns, until_ns))
        return Reply(in_blocks(lines), NDJSON)

    def _no_run(self, run_id: str) -> Reply:
        return problem(HTTPStatus.NOT_FOUND, f"nothing was recorded of load run {run_id} here")

    def _yield(self) -> Reply:
        if self.yield_now is None:
            return problem(
                HTTPStatus.CONFLICT, f"this is {self.kind} pid {os.getpid()}: end it by SIGTERM"
            )
        self.yield_now()
        return json_reply({"yields": True})


def _stretch(request: Request) -> tuple[int, int]:
    """Return `since` and `until`, by default all time; raises UsageError for what is none."""
    since_ns, until_ns = _moment(request, "since", 0), _moment(request, "until", END_OF_TIME_NS)
    if since_ns > until_ns:
        raise UsageError(f"since={since_ns} is later than until={until_ns}: give the earlier first")
    return since_ns, until_ns


def _moment(request: Request, name: str, default_ns: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default_ns
    if not (text.isascii() and text.isdecimal() and len(text) <= MOMENT_DIGITS):
        raise UsageError(
            f"{name}={text[:40]!r} is no moment: give whole nanoseconds on the monotonic clock of "
            "the agent's host"
        )
    return int(text)


def _nothing_there(request: Request) -> Reply:
    return problem(
        HTTPStatus.NOT_FOUND,
        f"{request.method} {request.path[:80]} is nothing the agent knows; it answers /health, "
        "/counters, /metrics, /live, /samples, /stacks, /kernels, /cold-starts, /runs/ID and "
        "/runs/ID/records",
    )


def metrics_reply(render: Render | None, request: Request) -> Reply:
    """Return the metrics in the format that the client accepts."""
    if render is None:
        return problem(HTTPStatus.NOT_FOUND, "this agent keeps no metrics")
    body, content_type = render(request.headers.get("Accept", ""))
    return Reply(body, content_type)


def metrics_only(render: Render) -> Callable[[Request], Reply]:
    """Answer `/metrics` and nothing else: for the port that Prometheus reads."""

    def answer(request: Request) -> Reply:
        if (request.method, request.path.rstrip("/")) in (("GET", "/metrics"), ("GET", "")):
            return metrics_reply(render, request)
        return problem(HTTPStatus.NOT_FOUND, "here is /metrics and nothing else")

    return answer


def serve_metrics(address: tuple[str, int], render: Render) -> HttpServer:
    """Serve `/metrics` there and log where; raises StagescopeError where it cannot be had."""
    server = listen(address, metrics_only(render))
    _log.info("metrics at %s", url(address[0], server.port, "/metrics"))
    return server


def serve_socket(control: Control) -> HttpServer:
    """Serve the control API on the spool's Unix socket (0600); the caller holds the spool.

    Raises StagescopeError where the socket cannot be made.
    """
    path = control.spool / SOCKET_NAME
    check_socket_path(path)
    try:
        return HttpServer(path, control.answer)
    except OSError as wrong:
        raise StagescopeError(f"socket {path} cannot be made: {wrong.strerror or wrong}") from None


def serve_tcp(control: Control, address: tuple[str, int], token: str) -> HttpServer:
    """Serve the control API over TCP to who knows *token*.

    Raises UsageError without a token, StagescopeError where the address cannot be had.
    """
    if not token:
        raise UsageError("the control API is not served over TCP without a token")
    return listen(address, control.answer, token=token)


def listen(
    address: tuple[str, int], answer: Callable[[Request], Reply], *, token: str | None = None
) -> HttpServer:
    """Serve over TCP; raises StagescopeError where the address cannot be had."""
    try:
        return HttpServer(address, answer, token=token)
    except OSError as wrong:
        host, port = address
        raise StagescopeError(
            f"{host}:{port} cannot be listened on: {wrong.strerror or wrong}"
        ) from None
