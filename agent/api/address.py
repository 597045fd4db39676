"""HOST:PORT as people write it, and where Prometheus looks by default."""

from __future__ import annotations

import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from stagescope.errors import StagescopeError, UsageError
from stagescope.files import replace_file
from stagescope.settings import METRICS_PORT as OURS

LOOPBACK = "127.0.0.1"
METRICS_PORT = 9464
"""The OpenTelemetry specification's default for OTEL_EXPORTER_PROMETHEUS_PORT."""


def parse_address(text: str, *, option: str, default_host: str = "") -> tuple[str, int]:
    """Parse `HOST:PORT`, `[V6]:PORT`, or `PORT` where there is a default host.

    Raises UsageError, which names *option*, for anything else.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or default_host
    if not host or not (port.isascii() and port.isdigit() and int(port) < 65536):
        form = "PORT or HOST:PORT" if default_host else "HOST:PORT"
        raise UsageError(f"{option} {text}: give {form}, for example {LOOPBACK}:{METRICS_PORT}")
    return host, int(port)


def named_metrics_address(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the address that our own variable names, if it is set; raises UsageError for a bad one."""
    named = OURS.text(environment)
    return parse_address(named, option=OURS.name, default_host=LOOPBACK) if named else None


def default_metrics_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return the address that the variables name, ours first; raises UsageError for a bad port."""
    if named := named_metrics_address(environment):
        return named
    host = environment.get("OTEL_EXPORTER_PROMETHEUS_HOST") or LOOPBACK
    variable = "OTEL_EXPORTER_PROMETHEUS_PORT"
    port = environment.get(variable) or str(METRICS_PORT)
    return parse_address(port, option=variable, default_host=host)


def url(host: str, port: int, path: str = "") -> str:
    """Return the URL of an address."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"


FILE_NAME = "agent.token"


def read_token(path: Path) -> str:
    """Read a token file.

    Raises UsageError where it is missing, open to other users, empty, or holds odd characters.
    """
    try:
        mode = path.stat().st_mode
        token = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"token file {path} cannot be read: {problem}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UsageError(
            f"token file {path} can be read by others (mode {mode & 0o777:o}): chmod 600 {path}"
        )
    if not token or not token.isprintable() or " " in token:
        raise UsageError(f"token file {path} holds no token: write one word of plain characters")
    return token


def make_token(spool: Path) -> tuple[str, Path]:
    """Make a token and keep it in the spool, for its owner alone (0600)."""
    path, token = spool / FILE_NAME, secrets.token_urlsafe(24)
    try:
        replace_file(path, token + "\n")
    except OSError as problem:
        raise StagescopeError(f"token file {path} cannot be written: {problem.strerror}") from None
    return token, path
