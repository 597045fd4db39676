"""Asks the probe of a served process; docs/agent.md describes probes."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from stagescope.errors import StagescopeError
from stagescope.recorder.format import SUFFIX as RING_SUFFIX
from stagescope.recorder.spool import PROBE_SUFFIX

MAX_LINE_BYTES = 64 << 20


def probe_of(ring: Path) -> Path:
    """Return the path of the probe of the process that writes the recorder file *ring*."""
    return ring.with_name(ring.name.removesuffix(RING_SUFFIX) + PROBE_SUFFIX)


def ask(probe: Path, op: str, *, timeout_s: float = 5.0, **question: Any) -> Mapping[str, Any]:
    """Ask *op* and return the last answer. Raises StagescopeError, one sentence, where it fails."""
    *_, last = converse(probe, op, timeout_s=timeout_s, **question)
    return last


def converse(
    probe: Path, op: str, *, timeout_s: float = 5.0, **question: Any
) -> Generator[Mapping[str, Any], None, None]:
    """Ask *op* and yield each answer as it comes; leaving the iteration ends what was asked for.

    *timeout_s* is for each line. Raises StagescopeError where nobody answers, the process ends,
    or it refuses.
    """
    with closing(Conversation(probe, op, timeout_s=timeout_s, **question)) as conversation:
        yield from conversation.answers()


class Conversation:
    """One question, its answers, and what is sent meanwhile."""

    def __init__(self, probe: Path, op: str, *, timeout_s: float = 5.0, **question: Any) -> None:
        self._probe = probe
        self._op = op
        self._timeout_s = timeout_s
        self._question = question
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(timeout_s)

    def answers(self) -> Iterator[Mapping[str, Any]]:
        """Ask, and give each answer as it comes; raises as `converse` does."""
        connection, probe = self._connection, self._probe
        try:
            _connect(connection, probe)
            connection.sendall(json.dumps({"op": self._op, **self._question}).encode() + b"\n")
            yield from _answers(connection, probe)
        except TimeoutError:
            raise StagescopeError(
                f"{probe.name} did not answer {self._op!r} within {self._timeout_s:g} s"
            ) from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise StagescopeError(
                f"no process answers at {probe}: it has ended, or runs with STAGESCOPE_PROBE=off"
            ) from None
        except OSError as problem:
            raise StagescopeError(f"{probe.name} broke off: {problem.strerror}") from problem

    def nudge(self) -> None:
        """Send a line in between, which ends a capture early. Nothing where nobody listens."""
        with suppress(OSError):
            self._connection.send(b"{}\n")

    def close(self) -> None:
        """End what was asked for; a thread that waits for an answer is woken."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def _connect(connection: socket.socket, path: Path) -> None:
    # By way of its folder's descriptor: sun_path takes 107 bytes.
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def _answers(connection: socket.socket, probe: Path) -> Iterator[Mapping[str, Any]]:
    rest = b""
    while True:
        block = connection.recv(1 << 16)
        if not block or len(rest) > MAX_LINE_BYTES:
            raise StagescopeError(f"the process of {probe.name} ended in the midst of its answer")
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if error := answer.get("error"):
                raise StagescopeError(str(error))
            yield answer
            if answer.get("done"):
                return


MOST_BYTES = 1 << 16
"""An answer stays in the socket until it is fetched, so it has to fit there."""


class Question:
    """Asks *op* of the process behind *probe*; a process that does not answer is skipped."""

    def __init__(self, probe: Path, op: str) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.setblocking(False)
        self.asked = self._ask(probe, op)
        """False where nobody listens."""
        if not self.asked:
            self._connection.close()

    def _ask(self, probe: Path, op: str) -> bool:
        try:
            _connect(self._connection, probe)
            self._connection.sendall(json.dumps({"op": op}).encode() + b"\n")
        except OSError:  # It has exited, has no probe, or its backlog is full.
            return False
        return True

    def answer(self) -> Mapping[str, Any] | None:
        """Return the answer; empty where none will come, None where it may come yet."""
        if not self.asked:
            return {}
        try:
            line = self._connection.recv(MOST_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        except OSError:
            return {}
        if line and not line.endswith(b"\n") and len(line) < MOST_BYTES:
            return None
        return _told(line)

    def close(self) -> None:
        """Close it, whether it was answered or not."""
        self._connection.close()


def _told(line: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:  # It ended, or is none of ours.
        return {}
    return answer if isinstance(answer, dict) and "error" not in answer else {}
