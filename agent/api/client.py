"""Asks a running agent: over its Unix socket, or over TCP with a bearer token."""

from __future__ import annotations

import json
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stagescope.agent.store.live import WINDOW_S, RouteSummary
from stagescope.agent.store.runs import RunCounts
from stagescope.agent.store.serialize import KERNELS, SAMPLES, STACKS, parse_lines
from stagescope.errors import StagescopeError, UsageError
from stagescope.kernels import KernelRow
from stagescope.records import Record
from stagescope.samples import Sample
from stagescope.stacks import StackSpan

_BLOCK_BYTES = 1 << 18


class AgentClient:
    """One agent, by the path of its socket or by `http://host:port` and its token.

    Every method raises StagescopeError where the agent cannot be reached or refuses.
    """

    def __init__(
        self, url_or_socket_path: str | Path, token: str | None = None, *, timeout_s: float = 10.0
    ) -> None:
        self.address = str(url_or_socket_path)
        self._token = token
        self._timeout_s = timeout_s
        if "://" in self.address and not self.address.startswith(("http://", "https://")):
            raise UsageError(
                f"agent {self.address} is neither http://HOST:PORT nor a socket's path"
            )

    def health(self) -> dict[str, Any]:
        """Return who answers: `kind`, `pid`, `version`, `uptime_s`, `boot_id`."""
        return self._json("GET", "/health")

    def counters(self) -> dict[str, float]:
        """Return the agent's numbers, its writers' and its sinks', by name."""
        return self._json("GET", "/counters")

    def live(self, window_s: int = WINDOW_S) -> list[RouteSummary]:
        """Return the requests of the last *window_s* seconds, by service and route."""
        answer = self._json("GET", f"/live?seconds={window_s}")
        return [RouteSummary(**one) for one in answer["routes"]]

    def run_counts(self, run_id: str) -> RunCounts:
        """Count what is stored of a load run; all zero where nothing is yet."""
        with self._exchange("GET", f"/runs/{run_id}", missing_ok=True) as response:
            if response.status == 404:
                return RunCounts(run_id, 0, 0, 0, 0)
            return RunCounts(**json.loads(response.read()))

    def open_run(self, run_id: str) -> bool:
        """Open a load run before its first request; False where the agent is too old for it."""
        with self._exchange("POST", f"/runs/{run_id}", missing_ok=True) as response:
            return response.status == 200

    def close_run(self, run_id: str) -> None:
        """Close a run that was opened: its records may give way to those of others."""
        self._json("POST", f"/runs/{run_id}/close")

    def run_records(self, run_id: str) -> Iterator[Record]:
        """Yield the records that are stored of a load run, as they arrive."""
        with self._exchange("GET", f"/runs/{run_id}/records") as response:
            yield from parse_lines(_lines(response))

    def samples(self, since_ns: int = 0, until_ns: int | None = None) -> Iterator[Sample]:
        """Return the samples of any moment between, on the clock of the agent's host."""
        return SAMPLES.parse(self._evidence("samples", since_ns, until_ns))

    def stacks(self, since_ns: int = 0, until_ns: int | None = None) -> Iterator[StackSpan]:
        """Return the stacks seen at any moment between."""
        return STACKS.parse(self._evidence("stacks", since_ns, until_ns))

    def kernels(self, since_ns: int = 0, until_ns: int | None = None) -> Iterator[KernelRow]:
        """Return what the captures that recorded at any moment between saw."""
        return KERNELS.parse(self._evidence("kernels", since_ns, until_ns))

    def _evidence(self, kind: str, since_ns: int, until_ns: int | None) -> Iterator[bytes]:
        path = f"/{kind}?since={since_ns}" + (f"&until={until_ns}" if until_ns is not None else "")
        with self._exchange("GET", path, missing_ok=True) as response:
            if response.status == 404:
                raise StagescopeError(
                    f"the agent at {self.address} has no {kind} to give: it is older than "
                    "this stagescope"
                )
            yield from _lines(response)

    def ask_to_yield(self) -> None:
        """Ask an embedded agent to release its spool."""
        self._json("POST", "/yield")

    def _json(self, method: str, path: str) -> dict[str, Any]:
        with self._exchange(method, path) as response:
            answer = json.loads(response.read())
        if not isinstance(answer, dict):
            raise StagescopeError(f"what answers at {self.address} is no stagescope agent")
        return answer

    @contextmanager
    def _exchange(
        self, method: str, path: str, *, missing_ok: bool = False
    ) -> Generator[HTTPResponse]:
        connection = self._connection()
        try:
            connection.request(method, path, headers=self._headers())
            response = connection.getresponse()
            if response.status >= 400 and not (missing_ok and response.status == 404):
                raise StagescopeError(f"agent at {self.address}: {_sentence(response)}")
            yield response
        except (FileNotFoundError, ConnectionRefusedError):
            raise StagescopeError(
                f"no agent answers at {self.address}; start one with `stagescope agent`"
            ) from None
        except (OSError, HTTPException, ValueError) as problem:
            raise StagescopeError(
                f"the agent at {self.address} broke off or is none: {problem!r}"
            ) from problem
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _connection(self) -> HTTPConnection:
        if "://" not in self.address:
            return _UnixConnection(self.address, self._timeout_s)
        url = urlsplit(self.address)
        kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
        return kind(url.hostname or "", url.port, timeout=self._timeout_s)


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.settimeout(self.timeout)
            self.sock.connect(self._path)
        except OSError:
            self.sock.close()
            raise


def _sentence(response: HTTPResponse) -> str:
    text = response.read(4096).decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return f"it answered {response.status} {response.reason}"


def _lines(response: HTTPResponse) -> Iterator[bytes]:
    rest = b""
    while block := response.read1(_BLOCK_BYTES):
        *whole, rest = (rest + block).split(b"\n")
        yield from whole
    if rest:
        raise HTTPException("the last line is not whole")
