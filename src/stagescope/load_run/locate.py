"""Where the server's side of a run is: the agent of the spool that the loaded server records into."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from stagescope.agent.api.client import AgentClient
from stagescope.errors import StagescopeError
from stagescope.loadgen.target import Target
from stagescope.recorder.listener import ListenerSpool, spool_of_listener
from stagescope.recorder.spool import (
    OPEN_RUN_SUFFIX,
    RUNS_FOLDER,
    SOCKET_NAME,
    default_spool,
    default_spools,
    opened_spool,
)

HANDOVER_S = 2.0
"""A server that hands over to new workers (gunicorn's reload) opens a recorder file a little later."""
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class AgentLocation:
    """Where an agent may be: a spool folder of this host, or the URL of a remote agent."""

    spool: Path | None = None
    agent_url: str = ""
    token: str = ""
    reason: str = ""
    """Why there is no agent to ask, and what to do about it; empty where there may be one."""

    @property
    def socket(self) -> Path:
        """The socket of the agent of this host."""
        return (self.spool or default_spool()) / SOCKET_NAME

    def client(self) -> AgentClient | None:
        """Return what asks the agent: a named one alone, else that of this host, if there is one."""
        if self.agent_url:
            return AgentClient(self.agent_url, self.token or None)
        return AgentClient(str(self.socket)) if self.socket.exists() else None


def locate(named: AgentLocation, aim: Target | None, *, wait_s: float = 0.0) -> AgentLocation:
    """Return where the agent of the server is that *aim* loads; *named* is what the user named.

    A named agent or spool with an agent is taken as it is. Else the process that listens on the
    target's port says by its open recorder file which spool it is; then a default spool counts.
    Where there is none, the reason says why: it waits *wait_s* for a recorder file first, and then
    for an agent.
    """
    place = named
    if place.agent_url or (place.spool and place.socket.exists()):
        return place
    if aim is None:
        return _in_a_default_spool(place) or replace(
            place, reason=_no_agent_in(place.spool or default_spool())
        )
    if not _is_here(aim.host):
        if place.socket.exists():
            return place
        return replace(
            place,
            reason=f"{aim.host} is another host: name its agent by --agent URL --token-file FILE",
        )
    found = spool_of_listener(aim.port, wait_s=wait_s)
    if found.spool and not found.deleted:
        place = replace(place, spool=found.spool)
        deadline = time.monotonic() + wait_s
        while not place.socket.exists():  # A server that was just started starts its agent.
            if time.monotonic() >= deadline:
                return replace(place, reason=_no_agent(found))
            time.sleep(POLL_S)
        return place
    return _in_a_default_spool(place) or replace(
        place, reason=_nothing_recorded(found, aim.port, place.spool or default_spool())
    )


def _in_a_default_spool(place: AgentLocation) -> AgentLocation | None:
    for spool in (place.spool or default_spool(), *default_spools()):
        if (spool / SOCKET_NAME).exists():
            return replace(place, spool=spool)
    return None


def _no_agent(found: ListenerSpool) -> str:
    return (
        f"no agent is in {found.spool}, into which the server records: "
        f"start `stagescope agent --spool {found.spool}` beside it"
    )


def _nothing_recorded(found: ListenerSpool, port: int, spool: Path) -> str:
    pids = ", ".join(map(str, found.pids[:3]))
    if found.deleted:
        return (
            f"the spool {found.spool} was deleted while the server (pid {pids}) records into it: "
            "restart the server"
        )
    if found.pids and not found.closed:
        return (
            f"the server (pid {pids}, port {port}) records into no spool: wrap its app in "
            "StageMiddleware, or start it by `stagescope run`"
        )
    return _no_agent_in(spool)


def _no_agent_in(spool: Path) -> str:
    return (
        f"no agent is in {spool}: start `stagescope agent` beside the server, as its user, "
        "or name its spool by --spool"
    )


def _is_here(host: str) -> bool:
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
        own = {one.address for each in psutil.net_if_addrs().values() for one in each}
    except OSError:
        return False
    return any(
        str(address).startswith("127.") or address == "::1" or address in own
        for address in addresses
    )


@contextmanager
def opened_run(place: AgentLocation, aim: Target, run_id: str) -> Iterator[None]:
    """Open *run_id* for its time: its records are kept, and `Server-Timing` may answer it.

    At the agent where there is one, else by a mark in the spool, where this user may write.
    """
    client = place.client()
    mark = None
    try:
        opened = client is not None and client.open_run(run_id)
    except StagescopeError:  # Said when its records are asked for.
        opened = False
    if not opened:
        found = spool_of_listener(aim.port) if _is_here(aim.host) else ListenerSpool()
        mark = _mark(found.spool or place.spool or default_spool(), run_id)
    try:
        yield
    finally:
        with suppress(OSError, StagescopeError):
            if mark is not None:
                mark.unlink()
            elif client is not None and opened:
                client.close_run(run_id)


def _mark(spool: Path, run_id: str) -> Path | None:
    with suppress(OSError, StagescopeError), opened_spool(spool) as folder:
        with suppress(FileExistsError):
            os.mkdir(RUNS_FOLDER, 0o700, dir_fd=folder)
        runs = os.open(RUNS_FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            os.close(os.open(f"{run_id}{OPEN_RUN_SUFFIX}", flags, 0o600, dir_fd=runs))
        finally:
            os.close(runs)
        return spool / RUNS_FOLDER / f"{run_id}{OPEN_RUN_SUFFIX}"
    return None
