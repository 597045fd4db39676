"""An ASGI app behind a real uvicorn on a port of its own, for tests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from stagescope.testing import wait_until


@contextmanager
def served(app: Any, http: str = "h11", **options: Any) -> Iterator[int]:
    """Serve *app* on a thread with real sockets; give the port.

    *http* is uvicorn's protocol (`h11`, `httptools`), *options* go to `uvicorn.Config`.
    Raises AssertionError where the server does not start, which is what a failed lifespan does.
    """
    import uvicorn

    defaults = {"log_config": None, "access_log": False, "ws": "websockets-sansio"}
    server = uvicorn.Server(uvicorn.Config(app, http=http, **(defaults | options)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_run, args=(server, listener), name="served")
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            if not server.started:
                raise AssertionError("the server did not start")
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)


def _run(server: Any, listener: socket.socket) -> None:
    with suppress(SystemExit):  # How uvicorn says that the app's lifespan failed.
        server.run([listener])


def exchange(port: int, request: bytes, *, timeout_s: float = 10.0) -> bytes:
    """Send raw bytes and give every byte of the answer, until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))
