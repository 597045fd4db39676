"""What is sent with every request, checked before the run: URL, method, headers, body."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from stagescope.errors import UsageError
from stagescope.identity import RUN_KEY, format_run

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""RFC 9110 section 5.6.2: what a method and a header name may hold."""
_OURS = "traceparent"


@dataclass(frozen=True, slots=True)
class Target:
    """One request, to be sent again and again."""

    url: str
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    @property
    def host(self) -> str:
        """Host name or address."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """Port, also where the URL leaves it to the scheme."""
        return urlsplit(self.url).port or (443 if self.tls else 80)

    @property
    def tls(self) -> bool:
        """Whether the scheme is https."""
        return self.url.lower().startswith("https:")

    @property
    def shown_url(self) -> str:
        """The URL as it may be stored: no user, no password, no query string."""
        parts = urlsplit(self.url)
        place = parts.netloc.rpartition("@")[2]
        return urlunsplit((parts.scheme, place, parts.path, "..." if parts.query else "", ""))

    def headers_for(self, run_id: str) -> list[tuple[str, str]]:
        """Give the headers of every request of run *run_id*; the user's own baggage is kept."""
        baggage = [format_run(run_id)]
        others = []
        for name, value in self.headers:
            if name.lower() == "baggage":
                baggage += [m for m in value.split(",") if not _is_run(m)]
            else:
                others.append((name, value))
        return [*others, ("baggage", ",".join(baggage))]


def _is_run(member: str) -> bool:
    return member.partition("=")[0].strip() == RUN_KEY


def target(
    url: str,
    *,
    method: str = "",
    headers: tuple[str, ...] = (),
    body: Path | bytes | None = None,
    json_text: str | None = None,
) -> Target:
    """Check and put together what to send; *headers* are texts like `Name: value`.

    The method is POST where there is a body and none was named, else GET.
    Raises UsageError, which says what is wrong with which part.
    """
    _check_url(url)
    content = _content(body, json_text)
    pairs = tuple(_header(text) for text in headers)
    if json_text is not None and not any(n.lower() == "content-type" for n, _ in pairs):
        pairs += (("Content-Type", "application/json"),)
    chosen = method.upper() or ("GET" if content is None else "POST")
    if not _TOKEN.fullmatch(chosen):
        raise UsageError(f"method {method!r} is not an HTTP method")
    return Target(url, chosen, pairs, content or b"")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or any(c.isspace() for c in url):
        raise UsageError(f"{url!r} is not a URL to load: give http://HOST:PORT/PATH or https://...")


def _content(body: Path | bytes | None, json_text: str | None) -> bytes | None:
    if body is not None and json_text is not None:
        raise UsageError("a body file and JSON text are both given: choose one")
    if json_text is not None:
        try:
            json.loads(json_text)
        except ValueError as problem:
            raise UsageError(f"the JSON text is not JSON: {problem}") from None
        return json_text.encode()
    if body is None or isinstance(body, bytes):
        return body
    try:
        return body.read_bytes()
    except OSError as problem:
        raise UsageError(f"body file {body} cannot be read: {problem.strerror}") from None


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not _TOKEN.fullmatch(name) or any(c in value for c in "\r\n\0"):
        raise UsageError(f"header {name!r} is not usable: give it as 'Name: value', on one line")
    if name.lower() == _OURS:
        raise UsageError(
            f"header {name} is set by stagescope, fresh for each request: leave it out"
        )
    return name, value.strip()
