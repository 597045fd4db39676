"""The probe: a socket in a served process by which a tool on the same host asks it things.

Beside the recorder file lies `<same name>.probe`, a Unix socket for its owner alone (0600). One
thread waits on it without using any time; each connection carries one JSON line, the question
(`{"op": NAME, ...}`), and one or more JSON lines, the answers, the last of them with `"done": true`
(and `"error": SENTENCE` where it went wrong). A connection that breaks ends what it asked for.
What an op needs is imported when it is asked for, so the probe costs a server a thread and a file.
"""

from __future__ import annotations

import json
import os
import select
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from struct import Struct
from threading import Thread
from typing import Any

from stagescope import settings
from stagescope.middleware.recording.guard import fault, guarded, say_once
from stagescope.middleware.recording.recorder import Recorder
from stagescope.recorder.format import SUFFIX as RING_SUFFIX
from stagescope.recorder.spool import PROBE_SUFFIX as SUFFIX

MAX_QUESTION_BYTES = 1 << 16
BACKLOG = 8
_CREDENTIALS = Struct("3i")
"""`struct ucred`: pid, uid, gid."""
THREAD_NAME = "stagescope-probe"

OPS: Mapping[str, str] = {
    "allow_ptrace": "stagescope.middleware.probe.ops:allow_ptrace",
    "capture": "stagescope.middleware.torch.capture:answer",
    "dump": "stagescope.middleware.probe.ops:dump",
    "hello": "stagescope.middleware.probe.ops:hello",
    "memory_snapshot": "stagescope.middleware.torch.snapshot:answer",
    "stacks": "stagescope.middleware.probe.stacks:answer",
    "torch": "stagescope.middleware.torch.memory:torch_answer",
}
"""Names of questions, and the function that answers each of them."""


class Connection:
    """One connection, as an op sees it."""

    def __init__(self, connection: socket.socket, recorder: Recorder) -> None:
        self._connection = connection
        self.recorder = recorder

    def send(self, line: Mapping[str, Any]) -> None:
        """Send one line; raises OSError where nobody listens any more."""
        self._connection.sendall(json.dumps(line).encode() + b"\n")

    def peer_pid(self) -> int:
        """Return the process that asks, as it is seen from here; 0: from another PID namespace."""
        told = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid: int = _CREDENTIALS.unpack(told)[0]
        return pid

    def closed(self, wait_s: float = 0.0) -> bool:
        """Return whether the asker has gone, or goes within *wait_s*; also the way to wait."""
        readable, _, _ = select.select([self._connection], [], [], wait_s)
        return bool(readable) and not self._connection.recv(4096, socket.MSG_PEEK)

    def has_input(self) -> bool:
        """Return whether the asker has said anything since its question, and take it as heard."""
        readable, _, _ = select.select([self._connection], [], [], 0)
        return bool(readable) and bool(self._connection.recv(4096))


Answer = Callable[[Mapping[str, Any], Connection], Mapping[str, Any]]


class Refused(Exception):
    """An op's way to say in one sentence why not."""


class Probe:
    """Answers on the socket at *path* until `stop`."""

    def __init__(self, path: Path, recorder: Recorder) -> None:
        """Raises OSError where the socket cannot be made."""
        self.path = path
        self._recorder = recorder
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Of the socket before it has a name, so nobody else can open it in between (unix(7)):
            # the umask would be the whole process's.
            os.fchmod(self._listener.fileno(), 0o600)
            bind(self._listener, path)
            self._listener.listen(BACKLOG)  # before it, a connection is refused
        except OSError:
            self._listener.close()
            raise
        self._open: set[socket.socket] = set()
        self._thread = Thread(target=self._live, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and remove the socket."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread; close alone would not
        self._thread.join(1.0)
        self._listener.close()

    def close_inherited(self) -> None:
        """In a forked child: close the copies; threads and file are the parent's."""
        for connection in (self._listener, *self._open):
            connection.close()

    def _live(self) -> None:
        with guarded(self._recorder):
            self._accept()
        self._listener.close()  # after a fault: who asks is refused and does not wait

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.add(connection)
            # A thread each: a capture may take long, and memory is asked for meanwhile.
            Thread(target=self._serve, args=(connection,), name=THREAD_NAME, daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, guarded(self._recorder):
            self._converse(connection)
        self._open.discard(connection)

    def _converse(self, connection: socket.socket) -> None:
        with suppress(OSError):
            asker = Connection(connection, self._recorder)
            connection.settimeout(5.0)
            question = _question(connection)
            if question is None:
                return
            try:
                reply = _op_of(question)(question, asker)
            except Refused as why:
                reply = {"error": str(why)}
            except Exception as error:  # noqa: BLE001 - the seam: our fault is not the server's
                fault(error, self._recorder)
                reply = {"error": f"a fault of the probe: {type(error).__name__}: {error}"}
            asker.send({**reply, "done": True})


def start_probe(ring: Path, recorder: Recorder) -> Probe | None:
    """Start the probe of the process that writes *ring*; None where it is off, or cannot be."""
    if settings.PROBE.choice() == "off":
        return None
    try:
        return Probe(ring.with_name(ring.name.removesuffix(RING_SUFFIX) + SUFFIX), recorder)
    except (OSError, RuntimeError) as problem:  # RuntimeError: no thread to be had
        say_once(f"no probe in this process, so no captures: {problem}")
        return None


def _question(connection: socket.socket) -> Mapping[str, Any] | None:
    line = b""
    while not line.endswith(b"\n"):
        block = connection.recv(4096)
        line += block
        if not block or len(line) > MAX_QUESTION_BYTES:
            return None
    try:
        question = json.loads(line)
    except ValueError:
        return None
    return question if isinstance(question, dict) else None


def _op_of(question: Mapping[str, Any]) -> Answer:
    name = str(question.get("op"))
    if name not in OPS:
        raise Refused(f"this process knows no {name!r}; it knows {', '.join(sorted(OPS))}")
    module, _, function = OPS[name].partition(":")
    answer: Answer = getattr(import_module(module), function)
    return answer


def bind(listener: socket.socket, path: Path) -> None:
    """Bind to *path*, however long: by way of its folder's descriptor, for sun_path is short."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)
