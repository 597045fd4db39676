"""Where spans and metrics go: OpenTelemetry's exporters, made to give up when told to."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, Protocol, TypeVar

from stagescope.errors import UsageError
from stagescope.exporters.otlp_environment import (
    DEFAULT_ENDPOINT,
    check,
    named_endpoint,
    protocol,
)

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Outlet(Protocol[T_contra]):
    """Where things go; `abort` makes a send in progress on another thread end at once."""

    @property
    def name(self) -> str:
        """What a person is told of when it fails."""
        ...

    def send(self, what: T_contra, /) -> bool:
        """Send; False where the back end did not take them, however often it was asked."""
        ...

    def abort(self) -> None:
        """End it for good. Called once."""


class Exporter(Protocol[T_contra]):
    """What OpenTelemetry's span exporters and metric exporters have in common."""

    def export(self, what: T_contra, /) -> Enum:
        """Send, trying again within its own timeout; gives `SUCCESS` or `FAILURE`."""
        ...

    def shutdown(self) -> None:
        """Take nothing more."""


def otlp_outlet(
    signal: str,
    grpc: Callable[[], Exporter[T]],
    http: Callable[[Any], Exporter[T]],
    environ: Mapping[str, str] = os.environ,
) -> Outlet[T]:
    """Make the outlet that the environment asks for; *http* takes a `requests.Session`.

    Raises UsageError for a value that cannot be used.
    """
    check(signal, environ)
    chosen = protocol(signal, environ)
    endpoint = named_endpoint(signal, environ) or DEFAULT_ENDPOINT
    try:
        if chosen == "grpc":
            return ClosingOutlet(f"{endpoint} (gRPC)", grpc())
        sockets = OpenSockets()
        return AbortableOutlet(f"{endpoint} (HTTP)", http(sockets.session()), sockets)
    except (ValueError, KeyError, OSError, RuntimeError) as problem:
        raise UsageError(
            f"the OTLP exporter ({chosen}) refuses an OTEL_EXPORTER_OTLP_* variable: {problem}"
        ) from problem


@dataclass(frozen=True, slots=True)
class ClosingOutlet(Generic[T]):
    """An exporter whose shutdown ends its calls: closing a gRPC channel cancels them."""

    name: str
    exporter: Exporter[T]

    def send(self, what: T, /) -> bool:
        """Send through the exporter, which retries within its own timeout."""
        return self.exporter.export(what).name == "SUCCESS"

    def abort(self) -> None:
        """Shut the exporter down."""
        self.exporter.shutdown()


@dataclass(frozen=True, slots=True)
class AbortableOutlet(Generic[T]):
    """An HTTP exporter, whose shutdown leaves a request waiting: its sockets are shut as well."""

    name: str
    exporter: Exporter[T]
    sockets: OpenSockets

    def send(self, what: T, /) -> bool:
        """Send through the exporter, which retries within its own timeout."""
        return self.exporter.export(what).name == "SUCCESS"

    def abort(self) -> None:
        """Shut the exporter down, and what it waits for."""
        self.sockets.shut()
        self.exporter.shutdown()


class OpenSockets:
    """Knows the sockets of one `requests` session, so that another thread can shut them."""

    def __init__(self) -> None:
        self._open: list[socket.socket] = []
        self.is_shut = False

    def session(self) -> Any:
        """Give a `requests.Session` whose connections are known here."""
        import requests
        from requests.adapters import HTTPAdapter

        session = requests.Session()
        for prefix in ("http://", "https://"):
            adapter = HTTPAdapter(pool_connections=1, pool_maxsize=1)
            adapter.poolmanager.pool_classes_by_scheme = self._pool_classes()
            session.mount(prefix, adapter)
        return session

    def _pool_classes(self) -> dict[str, Any]:
        from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

        def known(pool: Any) -> Any:
            connection = type("Known", (_KnownConnection, pool.ConnectionCls), {"owner": self})
            return type("KnownPool", (pool,), {"ConnectionCls": connection})

        return {"http": known(HTTPConnectionPool), "https": known(HTTPSConnectionPool)}

    def add(self, opened: socket.socket) -> None:
        """Remember a socket; raises ConnectionAbortedError once they are shut."""
        self._open = [known for known in self._open if known.fileno() >= 0]
        self._open.append(opened)
        if self.is_shut:
            opened.close()
            raise ConnectionAbortedError("the exporter is being closed")

    def shut(self) -> None:
        """Shut all of them: who waits on one is told at once."""
        self.is_shut = True
        for known in self._open:
            with suppress(OSError):
                known.shutdown(socket.SHUT_RDWR)


class _KnownConnection:
    """Mixed into urllib3's connections: tells its socket to the owner."""

    owner: OpenSockets

    def _new_conn(self) -> socket.socket:
        if self.owner.is_shut:
            raise ConnectionAbortedError("the exporter is being closed")
        inherited: Any = super()
        opened: socket.socket = inherited._new_conn()
        self.owner.add(opened)
        return opened
