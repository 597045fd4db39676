"""Serves `/metrics` over TCP, through prometheus_client's own WSGI app."""

from __future__ import annotations

import socket
import threading
from typing import Any, ClassVar, Self
from wsgiref.simple_server import WSGIRequestHandler, make_server

import prometheus_client
from prometheus_client.exposition import ThreadingWSGIServer

from stagescope.errors import StagescopeError


class MetricsServer:
    """Answers scrapes of *registry* until closed; port 0 takes a free one.

    Raises StagescopeError where the address cannot be had.
    """

    def __init__(
        self, registry: prometheus_client.CollectorRegistry, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            server = type("_Server", (_JoiningServer,), {"address_family": family})
            app = _wsgi_app(registry)
            self._server: Any = make_server(host, port, app, server, handler_class=_QuietHandler)
        except OSError as problem:
            raise StagescopeError(
                f"metrics cannot be served at {host}:{port}: {problem.strerror or problem}"
            ) from None
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_port}/metrics"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="stagescope-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening, and wait for the answers that are on their way."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _wsgi_app(registry: prometheus_client.CollectorRegistry) -> Any:
    exposition: Any = prometheus_client  # its types say nothing of the app
    return exposition.make_wsgi_app(registry)


class _JoiningServer(ThreadingWSGIServer):
    """Ends its threads with itself; prometheus_client's leaves them to the process's end."""

    daemon_threads = False


class _QuietHandler(WSGIRequestHandler):
    """Logs nothing, and waits a few seconds for a scraper that does not ask."""

    timeout: ClassVar[float | None] = 2.0

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
