"""What the standard `OTEL_*` variables ask for, of traces or of metrics.

Endpoint, headers, timeout, compression and TLS are read by OpenTelemetry's exporters themselves;
here it is only decided which of them runs, and refused what they would pass over.
Variables: https://opentelemetry.io/docs/specs/otel/protocol/exporter/.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from stagescope.errors import UsageError

TRACES: Final = "TRACES"
METRICS: Final = "METRICS"

DEFAULT_ENDPOINT: Final = "http://localhost:4318"
GRPC_PORT: Final = 4317
OTLP: Final = "otlp"
CONSOLE: Final = "console"
NONE: Final = "none"
SERVED_ANYWAY: Final = {TRACES: (), METRICS: ("prometheus",)}
"""Exporters that ask for what an agent does anyway: no error, and nothing to be sent."""


def exporter_asked_for(signal: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return `OTLP` or `CONSOLE`; empty where nothing is to be sent.

    Nothing is sent unless `OTEL_EXPORTER_OTLP_ENDPOINT`, its form for *signal* or
    `OTEL_<signal>_EXPORTER` is set. Raises UsageError for a value that cannot be used.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ""
    variable = f"OTEL_{signal}_EXPORTER"
    text = environ.get(variable, "").strip().lower()
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = (OTLP, CONSOLE, *SERVED_ANYWAY[signal], NONE)
    if not set(names) <= set(known):
        raise UsageError(
            f"{variable}={text!r} is not supported; give {', '.join(known[:-1])} or {known[-1]}"
        )
    if not names:
        return OTLP if named_endpoint(signal, environ) else ""
    return next((name for name in names if name in (OTLP, CONSOLE)), "")


def pointed_at(endpoint: str, environ: Mapping[str, str]) -> Mapping[str, str]:
    """Return *environ* with the OTLP endpoint of a command line, which goes before all variables."""
    if not endpoint:
        return environ
    others = ("OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    kept = {name: value for name, value in environ.items() if name not in others}
    return kept | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}


def named_endpoint(signal: str, environ: Mapping[str, str]) -> str:
    """Return the endpoint that is set; empty where none is."""
    for variable in (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        if value := environ.get(variable, "").strip():
            return value
    return ""


def http_url(signal: str, environ: Mapping[str, str]) -> str:
    """Return the URL that *signal* is posted to: the variable of its own names it whole."""
    if own := environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "").strip():
        return own
    general = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").strip() or DEFAULT_ENDPOINT
    return f"{general.rstrip('/')}/v1/{signal.lower()}"


def protocol(signal: str, environ: Mapping[str, str]) -> str:
    """Return `grpc`, `http/protobuf` or `http/json`. Raises UsageError for another."""
    for variable in (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if value := environ.get(variable, "").strip().lower():
            if value not in ("grpc", "http/protobuf", "http/json"):
                raise UsageError(
                    f"{variable}={value!r} is not supported; give grpc, http/protobuf or http/json"
                )
            return value
    # The specification's default is HTTP; but 4317 is gRPC's own port, and HTTP fails there.
    port = _port(named_endpoint(signal, environ))
    return "grpc" if port == GRPC_PORT else "http/protobuf"


def check(signal: str, environ: Mapping[str, str]) -> None:
    """Refuse what the exporters would pass over with a line in the log, or not at all.

    Raises UsageError, which names the variable.
    """
    _port(named_endpoint(signal, environ))
    for kind in (f"OTEL_EXPORTER_OTLP_{signal}", "OTEL_EXPORTER_OTLP"):
        compression = environ.get(f"{kind}_COMPRESSION", "none").strip().lower()
        if compression not in ("", "none", "gzip", "deflate"):
            raise UsageError(f"{kind}_COMPRESSION={compression!r} is not none, gzip or deflate")
        timeout = environ.get(f"{kind}_TIMEOUT", "").strip()
        if timeout and not _is_seconds(timeout):
            raise UsageError(f"{kind}_TIMEOUT={timeout!r} is not a number of seconds above 0")


def whole(environ: Mapping[str, str], variable: str, default: int) -> int:
    """Return the whole number above 0 that *variable* holds. Raises UsageError for anything else."""
    text = environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"{variable}={text!r} is not a whole number above 0")
    return int(text)


def _port(endpoint: str) -> int | None:
    try:
        return urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").port
    except ValueError:
        host = endpoint.rpartition("@")[2]  # what comes before it may be a password
        raise UsageError(f"the OTLP endpoint {host!r} is not a URL") from None


def _is_seconds(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
