"""What is sent with every request, checked before the run: URL, method, headers, body."""

from __future__ import annotations

import base64
import json
import re
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from stagescope.errors import UsageError
from stagescope.identity import RUN_KEY, format_run

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""RFC 9110 section 5.6.2: what a method and a header name may hold."""
_OURS = "traceparent"

ACCEPT_ENCODING = "gzip, deflate"
"""Stated and not left to the client library, which asks for whatever it finds installed."""
USER_AGENT = "stagescope"


@dataclass(frozen=True, slots=True)
class Target:
    """One request, to be sent again and again."""

    url: str
    """Without user and fragment; what follows the host goes to the server byte for byte."""
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    chunked: bool = False
    """The body is sent in chunks, as the header `Transfer-Encoding: chunked` asked."""
    trust: ssl.SSLContext | None = field(default=None, compare=False)
    """How the server's certificate is checked; None for http."""

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
        """Return the headers of every request of run *run_id*; the user's own baggage is kept."""
        baggage = [format_run(run_id)]
        others = []
        for name, value in self.headers:
            if name.lower() == "baggage":
                baggage += [m for m in value.split(",") if not _is_run(m)]
            else:
                others.append((name, value))
        defaults = (("Accept-Encoding", ACCEPT_ENCODING), ("User-Agent", USER_AGENT))
        others += [default for default in defaults if self.header(default[0]) is None]
        return [*others, ("baggage", ",".join(baggage))]

    def header(self, name: str) -> str | None:
        """Return the value of the first header called *name* that was given; None without one."""
        wanted = name.lower()
        return next((value for known, value in self.headers if known.lower() == wanted), None)


def _is_run(member: str) -> bool:
    return member.partition("=")[0].strip() == RUN_KEY


def target(
    url: str,
    *,
    method: str = "",
    headers: tuple[str, ...] = (),
    body: Path | bytes | None = None,
    json_text: str | None = None,
    cacert: Path | None = None,
    insecure: bool = False,
) -> Target:
    """Check and put together what to send; *headers* are texts like `Name: value`.

    The method is POST where there is a body and none was named, else GET. A user in the URL
    becomes an `Authorization` header, unless *headers* has one, as with curl.
    Raises UsageError, which says what is wrong with which part.
    """
    _check_url(url)
    content = _content(body, json_text)
    given = [_header(text) for text in headers]
    names = {name.lower() for name, _ in given}
    pairs, chunked = _framing(given, len(content or b""))
    address, authorization = _split_user(url)
    defaults = {
        "Content-Type": "application/json" if json_text is not None else "",
        "Authorization": authorization,
    }
    pairs += [(name, v) for name, v in defaults.items() if v and name.lower() not in names]
    chosen = method.upper() or ("GET" if content is None else "POST")
    if not _TOKEN.fullmatch(chosen):
        raise UsageError(f"method {method!r} is not an HTTP method")
    trust = _trust(url, cacert, insecure=insecure)
    return Target(address, chosen, tuple(pairs), content or b"", chunked, trust)


def _split_user(url: str) -> tuple[str, str]:
    """Return *url* as it is sent, and the value of `Authorization` that its user stands for.

    The path and the query are not touched, but for characters that no URL may hold: those are
    percent-encoded as UTF-8.
    """
    parts = urlsplit(url)
    rest = url.partition("://")[2]
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    tail = rest[len(place) :].partition("#")[0]
    tail = "".join(char if char.isascii() else quote(char) for char in tail)
    user, _, host = place.rpartition("@")
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    address = f"{parts.scheme}://{host}{'' if tail.startswith('/') else '/'}{tail}"
    if not user:
        return address, ""
    name, _, password = user.partition(":")
    secret = f"{unquote(name)}:{unquote(password)}".encode()
    return address, f"Basic {base64.b64encode(secret).decode('ascii')}"


def _framing(headers: list[tuple[str, str]], body_bytes: int) -> tuple[list[tuple[str, str]], bool]:
    """Return *headers* without those that frame the body, and whether it is sent in chunks.

    Raises UsageError where they do not fit the body: what followed it would be read as another
    request.
    """
    kept, chunked = [], False
    for name, value in headers:
        match name.lower():
            case "transfer-encoding":
                if value.lower() != "chunked":
                    raise UsageError(f"header {name}: {value} is not usable: chunked is, or none")
                chunked = True
            case "content-length":
                if value != str(body_bytes):
                    raise UsageError(
                        f"header {name}: {value} does not fit the body of {body_bytes} bytes: "
                        "leave it out, it is set to the right value"
                    )
            case _:
                kept.append((name, value))
    if chunked and len(headers) - len(kept) > 1:
        raise UsageError("headers Transfer-Encoding and Content-Length exclude each other")
    return kept, chunked


def _trust(url: str, cacert: Path | None, *, insecure: bool) -> ssl.SSLContext | None:
    if not url.lower().startswith("https:"):
        return None
    context = ssl.create_default_context()  # reads SSL_CERT_FILE and SSL_CERT_DIR
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if cacert is not None:
        try:
            context.load_verify_locations(cacert)
        except (OSError, ssl.SSLError) as problem:
            raise UsageError(
                f"certificate file {cacert} cannot be used: {problem.strerror or problem}; "
                "it holds certificates as PEM"
            ) from None
    return context


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
