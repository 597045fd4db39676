"""Runs the server of `stagescope run`, from its start until nothing of it is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from stagescope import settings as variables
from stagescope.cli.run_agent import AgentBeside, AgentOptions
from stagescope.cli.run_processes import (
    FORWARDED,
    TO_END,
    adopt_orphans,
    before_exec,
    drop_pending,
    end_descendants,
    hold_back,
    next_signal,
    reached_the_group,
    reap,
)
from stagescope.errors import StagescopeError, UsageError
from stagescope.middleware.run_notes import HOOK, PYTHON, RECORDER
from stagescope.recorder.spool import default_spool, ensure_spool

BOOTSTRAP = Path(__file__).parent.parent / "middleware" / "bootstrap"
"""Not resolved: in a source tree `middleware` is a link, and the package is on this side of it."""


class NoCommandError(StagescopeError):
    """There is no such command; the exit code is the shell's."""

    exit_code = 127


class CannotRunError(StagescopeError):
    """The command is there and cannot be run; the exit code is the shell's."""

    exit_code = 126


def find_command(words: Sequence[str]) -> str:
    """Return the path of the program that *words* name.

    Raises UsageError where there are none, NoCommandError and CannotRunError as a shell would.
    """
    if not words:
        raise UsageError("which server? for example: stagescope run -- uvicorn app:app")
    name = words[0]
    if found := shutil.which(name):
        return found
    if "/" not in name:
        raise NoCommandError(f"{name}: no such command on PATH")
    if Path(name).exists():
        raise CannotRunError(f"{name} is not a program that may be executed")
    raise NoCommandError(f"{name}: no such file")


def served_environment(
    environment: Mapping[str, str], *, spool: Path, notes: Path, service: str | None
) -> dict[str, str]:
    """Return the environment in which each Python process below installs hooks and records."""
    served = dict(environment)
    served[variables.RUN.name] = "1"
    served[variables.RUN_NOTES.name] = str(notes)
    served[variables.SPOOL.name] = str(spool)
    if service:
        served["OTEL_SERVICE_NAME"] = service
    # An empty entry would mean the current folder.
    behind = served.get("PYTHONPATH")
    served["PYTHONPATH"] = os.pathsep.join([str(BOOTSTRAP), *([behind] if behind else [])])
    return served


def unrecorded(notes: str, command: str) -> str | None:
    """Return why no process of *command* recorded anything, from their notes; None where one did."""
    said = {line.split(" ")[0] for line in notes.splitlines()}
    if RECORDER in said:
        return None
    # asyncio has a hook and serves nothing: any program may import it.
    hooks = sorted({w.removeprefix(HOOK) for w in said if w.startswith(HOOK)} - {"asyncio"})
    if hooks:
        return (
            f"nothing was recorded: hooked {', '.join(hooks)}, but it served no app or no request"
        )
    if PYTHON in said:
        return (
            f"nothing was recorded: {command} ran Python, but imported no server that there is "
            "a hook for: is it a Python server? WSGI apps are not timed; under daphne and other "
            "ASGI servers add StageMiddleware to the app"
        )
    return (
        f"nothing was recorded: {command} started no Python that reads PYTHONPATH (-I, -E and -S "
        "forbid it): is it a Python server?"
    )


LOOK_S = 2.0
"""How often the agent is looked after."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says; None where it says nothing."""

    words: tuple[str, ...]
    service: str | None = None
    spool: Path | None = None
    otlp: str | None = None
    metrics: str | None = None
    samplers: str | None = None
    agent: bool = True
    quiet: bool = False
    grace_s: float = 5.0


def supervise(program: str, settings: Settings) -> int:
    """Run the server and the agent; returns the server's exit code.

    Raises StagescopeError for what keeps the server from being started.
    """
    spool = (settings.spool or default_spool()).absolute()
    try:
        # In the spool, since it is the one place that must be writable.
        opened_notes = tempfile.NamedTemporaryFile(  # noqa: SIM115 - closed below
            dir=ensure_spool(spool), prefix="run-", suffix=".notes"
        )
    except (StagescopeError, OSError) as problem:
        return _unrecorded(program, settings, problem)
    adopt_orphans()
    prepare = before_exec(hold_back())
    agent = AgentBeside(_options(settings, spool), prepare, say)
    others = {child.pid for child in psutil.Process().children()}  # of a shell that was us before
    with opened_notes as notes:
        environment = served_environment(
            os.environ, spool=spool, notes=Path(notes.name), service=settings.service
        )
        if settings.agent:
            agent.start()
        try:
            server = _start(program, settings.words, environment, prepare)
            asked = _wait(server, agent if settings.agent else None)
            _end_leftovers(settings, others | agent.pids, asked=asked)
        finally:
            agent.stop()
        if why := unrecorded(notes.read().decode(), settings.words[0]):
            say(why)
    return server.returncode if server.returncode >= 0 else 128 - server.returncode


def _unrecorded(program: str, settings: Settings, problem: Exception) -> int:
    """Become the server, as if we were not there: that it serves matters more than what we see."""
    say(f"nothing is recorded: {problem}; the server is started without stagescope")
    try:
        os.execve(program, settings.words, os.environ)
    except OSError as wrong:
        raise CannotRunError(f"{program} cannot be run: {wrong.strerror}") from None


def _options(settings: Settings, spool: Path) -> AgentOptions:
    return AgentOptions(spool, settings.otlp, settings.metrics, settings.quiet, settings.samplers)


def _start(
    program: str, words: Sequence[str], environment: dict[str, str], prepare: Callable[[], None]
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            words,
            executable=program,
            env=environment,
            close_fds=False,  # a socket that it was to inherit from our parent is inherited
            preexec_fn=prepare,  # noqa: PLW1509 - there are no threads here
        )
    except OSError as problem:
        raise CannotRunError(f"{program} cannot be run: {problem.strerror}") from None


def _wait(server: subprocess.Popen[bytes], agent: AgentBeside | None) -> bool:
    """Wait for the server's end; True where it was asked to end.

    What we are signalled meanwhile is for the server.
    """
    asked = False
    while server.poll() is None:
        found = next_signal(LOOK_S)
        if found is not None and found.si_signo in FORWARDED:
            asked = asked or found.si_signo in TO_END
            if not reached_the_group(found):
                server.send_signal(found.si_signo)
        if agent:
            agent.look_after()
        reap({server.pid} | (agent.pids if agent else set()))
    drop_pending()
    return asked


def _end_leftovers(settings: Settings, kept: set[int], *, asked: bool) -> None:
    ended = end_descendants(kept, settings.grace_s)
    if ended:
        hint = "" if asked else "; a server has to stay in the foreground here"
        say(f"{settings.words[0]} has ended; ended what it left behind: {', '.join(ended)}{hint}")


def say(what: str) -> None:
    """Say it on standard error: standard output is the server's."""
    try:
        print(f"stagescope run: {what}", file=sys.stderr, flush=True)
    except OSError:
        return  # Nobody listens any more; the server's end is still ours to wait for.
