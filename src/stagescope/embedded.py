"""The agent that a served process starts: the default where no agent process is there.

A thread of the server starts a helper process, and does the work itself only where there can be
none: what an agent allocates makes Python's garbage collector look through the whole app, and
what it computes takes the interpreter's lock. Of several workers on one spool exactly one drains;
the others stand by and take over when it ends. To an agent process the one that drains yields.

The agent's own modules are imported on that thread: on the served app's they would hold its event
loop for a fifth of a second.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stagescope import settings
from stagescope.errors import StagescopeError
from stagescope.recorder.spool import ensure_spool

if TYPE_CHECKING:
    from stagescope.agent.api.http_server import HttpServer
    from stagescope.agent.lock import SpoolLock
    from stagescope.agent.loop import Agent
    from stagescope.agent.pipeline import Render

STANDBY_S = 2.0
"""How often one that stands by tries for the spool."""
STOP_S: Final = 3.0
"""How long `stop` takes at most, and so how long it holds up the end of the served app."""
FLUSH_S: Final = 2.0
"""How long sinks may take of it to send what waits."""
END_S: Final = 0.25
"""How long is waited of it for the end of a helper that was killed."""
READY_S: Final = 30.0
"""How long a helper may take to import, to get the spool and to say that it drains."""

HELPER_AFTER_S: Final = 0.5
"""How long a server lives before it starts a helper: one that ends sooner is a test of the app."""

READY: Final = b"ready\n"
HOLD_S: Final = 3.0
"""How long a helper tries for the spool that its server found free."""

_log = logging.getLogger("stagescope")
_running: dict[Path, EmbeddedAgent] = {}


class Helper:
    """The embedded agent in a process of its own, as its server sees it.

    It lives no longer than its server, which holds the other end of its standard input.
    """

    def __init__(self, spool: Path) -> None:
        """Start it; raises OSError where there is no Python to start."""
        # An embedding program (uWSGI, a frozen app) names itself here: it must not be run again.
        if not Path(sys.executable or "").name.startswith("python"):
            raise OSError("this process is no plain Python")
        self.ready = False
        """True from when it drains."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stagescope.embedded", str(spool)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until it drains; False where it ended before, or has not within *timeout_s*."""
        assert self._process.stdout
        output = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(output, select.POLLIN)
        deadline_s = time.monotonic() + timeout_s
        said = b""  # whatever a sitecustomize prints comes first
        while not self.ready and poll.poll(max(0.0, deadline_s - time.monotonic()) * 1e3):
            if not (more := os.read(output, 4096)):
                break
            said += more
            self.ready = said.endswith(READY)
        return self.ready

    def wait(self) -> int:
        """Wait for its end; returns its exit status."""
        return self._process.wait()

    def end(self) -> None:
        """Tell it to flush and end; returns at once."""
        assert self._process.stdin
        self._process.stdin.close()

    def close(self) -> None:
        """Close the pipes of one that has ended."""
        for file in (self._process.stdin, self._process.stdout):
            if file:
                file.close()

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()

    def close_inherited(self) -> None:
        """In a forked child: close the copies, so that the helper sees its server's end."""
        self.close()
        self._process.returncode = 0  # it is no child of this process


class EmbeddedAgent:
    """Drains *spool* on a daemon thread, when nobody else does, until `stop`."""

    def __init__(
        self,
        spool: Path,
        *,
        standby_s: float = STANDBY_S,
        ready_s: float = READY_S,
        in_helper: bool = False,
    ) -> None:
        """*in_helper*: this process is the helper, and serves nothing else."""
        self._in_helper = in_helper
        self._ready_s = ready_s
        self._helper: Helper | None = None
        self._helper_fails = settings.EMBEDDED_AGENT.choice() == "thread"
        self._spool = spool
        self._standby_s = standby_s
        self._stopped = threading.Event()
        self._agent: Agent | None = None
        self._hold: SpoolLock | None = None
        self._servers: list[HttpServer] = []
        self._thread = threading.Thread(target=self._live, name="stagescope-agent", daemon=True)

    @property
    def drains(self) -> bool:
        """True while this one holds the spool."""
        helper = self._helper
        return self._agent is not None or (helper is not None and helper.ready)

    @property
    def stopped(self) -> bool:
        """True from when it is told to stop."""
        return self._stopped.is_set()

    @property
    def alive(self) -> bool:
        """True until it is stopped, or has failed."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Read what is there, flush, save, release the spool; returns after STOP_S at most."""
        self._stopped.set()
        if agent := self._agent:
            agent.stop()
        if helper := self._helper:
            helper.end()
        if self._thread.is_alive():
            self._thread.join(STOP_S - END_S)
            if self._thread.is_alive() and (helper := self._helper):
                helper.kill()
                self._thread.join(END_S)
        _running.pop(self._spool, None)

    def _live(self) -> None:
        try:
            from stagescope.agent.lock import EMBEDDED, try_hold
            from stagescope.agent.pipeline import prints

            self._helper_fails = self._helper_fails or prints()
            while True:
                if not self._helper_fails:
                    self._stopped.wait(HELPER_AFTER_S)
                ensure_spool(self._spool)
                hold = try_hold(self._spool, EMBEDDED)
                if hold and not self._helper_fails and not self.stopped:
                    hold.release()
                    self._drain_beside()
                elif hold:
                    self.drain(hold)
                if self._stopped.wait(self._standby_s):
                    return
        except (StagescopeError, OSError, ImportError) as problem:
            _log.warning("stagescope's embedded agent is off: %s", problem)
        except Exception:
            if settings.RAISE.on():
                raise
            _log.exception("stagescope's embedded agent is off, by a fault of its own")

    def _drain_beside(self) -> None:
        """Let a helper drain, until it ends; where none can be had, this thread does from now on."""
        try:
            helper = Helper(self._spool)
        except (OSError, subprocess.SubprocessError) as problem:
            self._helper_fails = True
            _log.info("the agent is a thread of the server: %s", problem)
            return
        self._helper = helper
        if self.stopped:
            helper.end()
        late = not helper.wait_ready(self._ready_s)
        if late:
            helper.kill()
        status = helper.wait()
        self._helper = None
        helper.close()
        if status and not self.stopped:
            self._helper_fails = True
            why = f"was not ready within {self._ready_s:g} s" if late else f"ended with {status}"
            _log.warning("the agent's process %s; it is a thread of the server now", why)

    def drain(self, hold: SpoolLock, on_ready: Callable[[], object] = lambda: None) -> None:
        """Drain until `stop`, or until the spool is wanted by an agent process."""
        from stagescope.agent.api.control import Control, serve_socket
        from stagescope.agent.lock import EMBEDDED
        from stagescope.agent.loop import Agent
        from stagescope.agent.pipeline import sinks_from_environment
        from stagescope.agent.samplers import chosen

        self._hold = hold
        try:
            pipeline = sinks_from_environment()
            agent = Agent(
                self._spool,
                pipeline.sinks,
                shared=not self._in_helper,
                holds=hold.valid,
                samplers=chosen(embedded=True),
                cpu_s=time.process_time if self._in_helper else time.thread_time,
            )
            pipeline.watch(agent)
            control = Control(agent, EMBEDDED, self._spool, pipeline.render, agent.stop)
            self._servers = [serve_socket(control)]
            try:
                self._servers += self._metrics(pipeline.render)
                self._agent = agent
                on_ready()
                if self.stopped:  # told so before there was an agent to tell: it reads, and ends
                    agent.stop()
                agent.run()
            finally:
                self._agent = None
                for server in self._servers:
                    server.stop()
                agent.close(FLUSH_S)
        finally:
            self._servers = []
            hold.release()
            self._hold = None

    def _metrics(self, render: Render) -> list[HttpServer]:
        """Serve `/metrics` where a variable asks for it: the app may want any port."""
        from stagescope.agent.api.address import named_metrics_address
        from stagescope.agent.api.control import serve_metrics

        name = settings.METRICS_PORT.name
        try:
            if address := named_metrics_address(os.environ):
                return [serve_metrics(address, render)]
        except StagescopeError as problem:
            _log.warning("no metrics port: %s (%s)", problem, name)
        else:
            _log.info("reading spool %s; %s=9464 serves /metrics to Prometheus", self._spool, name)
        return []

    def forget_in_child(self) -> None:
        """After a fork, in the child: close what came with it and is the parent's."""
        if self._hold:
            self._hold.close_inherited()
        for server in self._servers:
            server.close_inherited()
        if self._helper:
            self._helper.close_inherited()


def start_embedded_agent(spool: Path) -> EmbeddedAgent:
    """Start the embedded agent of this process, or give the one that runs already.

    Never raises for a spool's or a back end's sake: what fails is one line of the log.
    A forked child has none until it calls this itself.
    """
    running = _running.get(spool)
    if running and running.alive:
        return running
    agent = EmbeddedAgent(spool)
    if settings.EMBEDDED_AGENT.choice() != "off":
        _running[spool] = agent
        agent.start()
    return agent


def _stop_all() -> None:
    for agent in list(_running.values()):
        agent.stop()


def _forget_all() -> None:
    for agent in _running.values():
        agent.forget_in_child()
    _running.clear()


atexit.register(_stop_all)
os.register_at_fork(after_in_child=_forget_all)


@contextlib.contextmanager
def output_that_never_blocks() -> Generator[int]:
    """Drop what is printed, and pass standard error on as long as it is read.

    Nobody reads a helper's standard output after its first line, and perhaps nobody its server's
    standard error. Yields a descriptor of the standard output as it was.
    """
    output, errors = os.dup(1), os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    read_end, write_end = os.pipe()
    os.dup2(write_end, 2)
    os.close(write_end)
    writable = select.poll()
    writable.register(errors, select.POLLOUT)

    def pass_on() -> None:
        while text := os.read(read_end, select.PIPE_BUF):
            # A pipe that is writable takes so much without blocking. Not O_NONBLOCK: the server
            # writes to the same open file.
            if writable.poll(0):
                with contextlib.suppress(OSError):
                    os.write(errors, text)

    thread = threading.Thread(target=pass_on, name="stagescope-stderr", daemon=True)
    thread.start()
    try:
        yield output
    finally:
        os.dup2(errors, 2)  # which closes the pipe's only write end
        thread.join(END_S)


def main() -> int:
    """Be a helper: drain the spool until standard input ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # its server gets them too, and ends it
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError):  # it gives way to the server; on Linux alone
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with output_that_never_blocks() as output:
        _help(Path(sys.argv[1]), output)
    return 0


def _help(spool: Path, output: int) -> None:
    from stagescope.agent.lock import EMBEDDED, try_hold

    agent = EmbeddedAgent(spool, in_helper=True)

    def stop_with_server() -> None:
        while os.read(0, 4096):
            pass
        agent.stop()

    def tell_ready() -> None:
        os.write(output, READY)
        os.close(output)

    threading.Thread(target=stop_with_server, daemon=True).start()
    deadline_s = time.monotonic() + HOLD_S
    while not (hold := try_hold(spool, EMBEDDED)):
        if agent.stopped or time.monotonic() > deadline_s:
            return
        time.sleep(0.02)
    agent.drain(hold, on_ready=tell_ready)


if __name__ == "__main__":
    sys.exit(main())
