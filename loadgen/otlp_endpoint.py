"""Where the load driver takes spans: what `--otlp-listen` says."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from stagescope.errors import UsageError

_DEFAULT_PORT = {"grpc": 4317, "http": 4318}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to listen: `grpc` or `http`, host, port (0 picks one)."""

    protocol: str
    host: str
    port: int


def endpoint(text: str) -> Endpoint:
    """Read `grpc://HOST:PORT`, `http://HOST:PORT`, or either without a port.

    Raises UsageError for anything else.
    """
    try:
        url = urlsplit(text)
        protocol, host, port = url.scheme, url.hostname, url.port
    except ValueError:
        protocol, host, port = "", None, None
    if protocol not in _DEFAULT_PORT or not host:
        raise UsageError(f"--otlp-listen {text!r} is neither grpc://HOST:PORT nor http://HOST:PORT")
    return Endpoint(protocol, host, _DEFAULT_PORT[protocol] if port is None else port)
