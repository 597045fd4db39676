"""The agent as a process of its own: takes the spool, serves, works until it is stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from stagescope.agent.api.address import (
    default_metrics_address,
    make_token,
    parse_address,
    read_token,
    url,
)
from stagescope.agent.api.client import AgentClient
from stagescope.agent.api.control import Control, serve_metrics, serve_socket, serve_tcp
from stagescope.agent.lock import AGENT, EMBEDDED, SpoolLock, held_error, holder, try_hold
from stagescope.agent.loop import Agent, Samplers
from stagescope.agent.pipeline import ENDPOINT_VARIABLE, Pipeline, sinks_from_environment
from stagescope.agent.samplers import chosen
from stagescope.errors import EXIT_DONE, StagescopeError, UsageError
from stagescope.recorder.spool import SOCKET_NAME, default_spool, ensure_spool
from stagescope.settings import wrong_values

YIELD_S = 8.0
"""How long an embedded agent may take to flush and release the spool."""
FLUSH_S = 10.0
"""How long sinks may take to flush at the end."""

_log = logging.getLogger("stagescope")


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says; None where it says nothing."""

    spool: Path | None = None
    listen: str | None = None
    token_file: Path | None = None
    metrics: str | None = None
    otlp_url: str | None = None
    samplers: str | None = None
    once: bool = False
    quiet: bool = False


def run_agent(settings: Settings) -> int:
    """Run an agent in the foreground; returns the exit code.

    Raises HeldError where another agent holds the spool, UsageError and StagescopeError with
    one sentence for everything else that keeps it from starting.
    """
    _check(settings)
    if settings.otlp_url:
        os.environ[ENDPOINT_VARIABLE] = settings.otlp_url
    samplers = chosen("off" if settings.once else settings.samplers)
    spool = settings.spool or default_spool()
    with _printed_log(quiet=settings.quiet):
        while _drained_until_lost(settings, ensure_spool(spool), samplers):
            _log.warning("starts again in spool %s", spool)
    return EXIT_DONE


def _drained_until_lost(settings: Settings, spool: Path, samplers: Samplers | None) -> bool:
    """Work until a signal comes; True where the spool was deleted meanwhile."""
    with ExitStack() as cleanup:
        hold = take_spool(spool)
        cleanup.callback(hold.release)
        pipeline = sinks_from_environment()
        agent = Agent(spool, pipeline.sinks, samplers=samplers, holds=hold.valid)
        pipeline.watch(agent)
        cleanup.callback(agent.close, FLUSH_S)
        _serve(settings, Control(agent, AGENT, spool, pipeline.render), pipeline, cleanup)
        with _stopped_by_signals(agent) as signals:
            if settings.once:
                agent.stop()
            agent.run()
        _log.info("stopped: %d records read", agent.counters()["records"])
        return agent.lost_spool and not signals


def _check(settings: Settings) -> None:
    """Find what is wrong with command line and environment before anything is touched."""
    if wrong := wrong_values():
        raise UsageError("; ".join(wrong))
    if settings.listen:
        parse_address(settings.listen, option="--listen")
    elif settings.token_file:
        raise UsageError("--token-file is the token of --listen HOST:PORT, which is not given")
    if settings.metrics not in (None, "off"):
        parse_address(settings.metrics, option="--metrics-port", default_host="127.0.0.1")


def take_spool(spool: Path, timeout_s: float = YIELD_S) -> SpoolLock:
    """Take the spool; an embedded holder is asked to yield. Raises HeldError."""
    deadline = time.monotonic() + timeout_s
    asked_s = 0.0
    while not (hold := try_hold(spool, AGENT)):
        now = time.monotonic()
        found = holder(spool)
        if found.get("kind") == AGENT or now > deadline:
            raise held_error(spool)
        if found.get("kind") == EMBEDDED and now - asked_s > 1.0:
            asked_s = now
            with contextlib.suppress(StagescopeError):  # it may have ended, or be starting
                AgentClient(spool / SOCKET_NAME).ask_to_yield()
        time.sleep(0.02)
    return hold


def _serve(settings: Settings, control: Control, pipeline: Pipeline, cleanup: ExitStack) -> None:
    server = serve_socket(control)
    cleanup.callback(server.stop)
    _log.info("reading spool %s, control socket %s, feeding %s",
              control.spool, control.spool / SOCKET_NAME, ", ".join(pipeline.sinks))  # fmt: skip
    if settings.listen:
        _serve_tcp(settings, control, cleanup)
    if settings.metrics != "off":
        _serve_metrics(settings, pipeline, cleanup)


def _serve_tcp(settings: Settings, control: Control, cleanup: ExitStack) -> None:
    host, port = parse_address(settings.listen or "", option="--listen")
    if settings.token_file:
        token, said = read_token(settings.token_file), f"in {settings.token_file}"
    else:
        token, path = make_token(control.spool)
        said = f"{token} (kept in {path})"
    server = serve_tcp(control, (host, port), token)
    cleanup.callback(server.stop)
    _log.info("control API at %s, token %s", url(host, server.port), said)


def _serve_metrics(settings: Settings, pipeline: Pipeline, cleanup: ExitStack) -> None:
    """Serve /metrics; where the default port is taken, log it and go on."""
    if settings.metrics is None:
        address = default_metrics_address(os.environ)
    else:
        address = parse_address(settings.metrics, option="--metrics-port", default_host="127.0.0.1")
    try:
        cleanup.callback(serve_metrics(address, pipeline.render).stop)
    except StagescopeError as taken:
        if settings.metrics is not None:
            raise
        _log.warning("no metrics port: %s; choose one with --metrics-port", taken)


@contextmanager
def _stopped_by_signals(agent: Agent) -> Generator[list[int]]:
    """Stop *agent* at a signal; yields the list of signals received."""
    numbers = (signal.SIGTERM, signal.SIGINT)

    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        came.append(number)
        agent.stop_soon()

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield came
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _printed_log(*, quiet: bool) -> Generator[None]:
    """Print the log's lines: a process in the foreground has nowhere else to say them."""
    printed = logging.StreamHandler(sys.stdout)
    printed.setFormatter(logging.Formatter("stagescope agent: %(message)s"))
    _log.addHandler(printed)
    _log.setLevel(logging.WARNING if quiet else logging.INFO)
    _log.propagate = False
    try:
        yield
    finally:
        _log.removeHandler(printed)
