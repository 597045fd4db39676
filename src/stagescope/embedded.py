"""The agent on a thread of the served process: the default where no agent process is there.

Of several workers on one spool exactly one drains; the others stand by and take over when it
ends. To an agent process the one that drains yields.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from pathlib import Path

from stagescope.agent.api.control import Control, serve_socket
from stagescope.agent.api.http_server import HttpServer
from stagescope.agent.lock import EMBEDDED, SpoolLock, try_hold
from stagescope.agent.loop import RAISE_VARIABLE, Agent
from stagescope.agent.pipeline import sinks_from_environment
from stagescope.agent.samplers import chosen
from stagescope.errors import StagescopeError
from stagescope.recorder.spool import ensure_spool

AGENT_VARIABLE = "STAGESCOPE_AGENT"
"""`off`: no embedded agent."""
STANDBY_S = 2.0
"""How often one that stands by tries for the spool."""
STOP_S = 3.0
"""How long `stop` takes at most for sinks to flush."""

_log = logging.getLogger("stagescope")
_running: dict[Path, EmbeddedAgent] = {}


class EmbeddedAgent:
    """Drains *spool* on a daemon thread, when nobody else does, until `stop`."""

    def __init__(self, spool: Path, *, standby_s: float = STANDBY_S) -> None:
        self._spool = spool
        self._standby_s = standby_s
        self._stopped = threading.Event()
        self._yielding = False
        self._agent: Agent | None = None
        self._hold: SpoolLock | None = None
        self._server: HttpServer | None = None
        self._thread = threading.Thread(target=self._live, name="stagescope-agent", daemon=True)

    @property
    def drains(self) -> bool:
        """True while this one holds the spool."""
        return self._agent is not None

    @property
    def alive(self) -> bool:
        """True until it is stopped, or has failed."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = STOP_S + 3.0) -> None:
        """Read what is there, flush, save, let go; returns when that is done."""
        self._stopped.set()
        if agent := self._agent:
            agent.stop()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        _running.pop(self._spool, None)

    def _live(self) -> None:
        try:
            while not self._stopped.is_set():
                ensure_spool(self._spool)
                hold = try_hold(self._spool, EMBEDDED)
                if hold:
                    self._drain(hold)
                self._stopped.wait(self._standby_s)
        except (StagescopeError, OSError, ImportError) as problem:
            _log.warning("stagescope's embedded agent is off: %s", problem)
        except Exception:
            if os.environ.get(RAISE_VARIABLE):
                raise
            _log.exception("stagescope's embedded agent is off, by a fault of its own")

    def _drain(self, hold: SpoolLock) -> None:
        self._hold = hold
        try:
            composed = sinks_from_environment()
            agent = Agent(
                self._spool,
                composed.sinks,
                shared=True,
                holds=hold.valid,
                samplers=chosen(embedded=True),
                cpu_s=time.thread_time,
            )
            composed.watch(agent)
            control = Control(agent, EMBEDDED, self._spool, composed.render, agent.stop)
            self._server = serve_socket(control)
            try:
                self._agent = agent
                if not self._stopped.is_set():
                    agent.run()
            finally:
                self._agent = None
                self._server.stop()
                agent.close(STOP_S)
        finally:
            self._server = None
            hold.release()
            self._hold = None

    def forget_in_child(self) -> None:
        """After a fork, in the child: close what came with it and is the parent's."""
        if self._hold:
            self._hold.close_inherited()
        if self._server:
            self._server.close_inherited()


def start_embedded_agent(spool: Path) -> EmbeddedAgent:
    """Start the embedded agent of this process, or give the one that runs already.

    Never raises for a spool's or a back end's sake: what fails is one line of the log.
    A forked child has none until it calls this itself.
    """
    running = _running.get(spool)
    if running and running.alive:
        return running
    agent = EmbeddedAgent(spool)
    if os.environ.get(AGENT_VARIABLE, "").lower() != "off":
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
