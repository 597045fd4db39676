"""A question to a probe that is asked now and whose answer is fetched later: nothing waits."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 16
"""An answer stays in the socket until it is fetched, so it has to fit there."""


class Question:
    """Asks *op* of the process behind *probe*; whoever does not answer is passed over."""

    def __init__(self, probe: Path, op: str) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.setblocking(False)
        self.asked = self._ask(probe, op)
        """False where nobody listens."""
        if not self.asked:
            self._connection.close()

    def _ask(self, probe: Path, op: str) -> bool:
        try:
            # By way of its folder's descriptor: sun_path takes 107 bytes.
            folder = os.open(probe.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._connection.connect(f"/proc/self/fd/{folder}/{probe.name}")
            finally:
                os.close(folder)
            self._connection.sendall(json.dumps({"op": op}).encode() + b"\n")
        except OSError:  # Gone, off, or busy beyond its backlog.
            return False
        return True

    def answer(self) -> Mapping[str, Any] | None:
        """Give the answer; empty where none will come, None where it may come yet."""
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
        """Ask no more; what the answer was does not matter."""
        self._connection.close()


def _told(line: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:  # It ended, or is none of ours.
        return {}
    return answer if isinstance(answer, dict) and "error" not in answer else {}
