"""Why a request failed, as one word: the only table from exceptions to words."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl

import aiohttp

REQUEST_FAILURES = (aiohttp.ClientError, OSError, asyncio.TimeoutError, ValueError)
"""What counts as a request's own failure; anything else is a fault of the driver's."""

TIMEOUT = "timeout"
INTERRUPTED = "interrupted"
"""The run was ended (Ctrl-C) while the request was in flight."""

OWN_LIMITS = {
    "files": "the limit of open files (`ulimit -n`) stopped connections",
    "ports": "this machine ran out of local ports",
}
"""Words whose cause is on the driver's side: they make a run invalid."""

_BY_ERRNO = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset",
    errno.EPIPE: "reset",
    errno.ECONNABORTED: "reset",
    errno.ETIMEDOUT: TIMEOUT,
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETUNREACH: "unreachable",
    errno.EMFILE: "files",
    errno.ENFILE: "files",
    errno.EADDRNOTAVAIL: "ports",
}

_BY_TYPE: tuple[tuple[type[BaseException], str], ...] = (
    (asyncio.TimeoutError, TIMEOUT),
    (socket.gaierror, "dns"),
    (ssl.SSLError, "tls"),
    (ssl.CertificateError, "tls"),
    (aiohttp.ClientSSLError, "tls"),
    (aiohttp.ServerFingerprintMismatch, "tls"),
    (aiohttp.ClientPayloadError, "incomplete"),
    (aiohttp.ServerDisconnectedError, "closed"),
    (aiohttp.ClientResponseError, "protocol"),
    (aiohttp.InvalidURL, "url"),
)


def failure_word(problem: BaseException) -> str:
    """Return the word for *problem*; an exception of no known kind is its class name."""
    if isinstance(problem, aiohttp.ClientConnectorError) and isinstance(
        problem.os_error, socket.gaierror
    ):
        return "dns"
    for kind, word in _BY_TYPE:
        if isinstance(problem, kind):
            return word
    if isinstance(problem, OSError):
        return _by_errno(problem)
    return type(problem).__name__


def _by_errno(problem: OSError) -> str:
    if problem.errno in _BY_ERRNO:
        return _BY_ERRNO[problem.errno]
    if isinstance(problem, ConnectionResetError | BrokenPipeError):
        return "reset"
    # Several addresses tried, each with its own error: asyncio says it only in the text.
    return "refused" if "Connect call failed" in str(problem) else type(problem).__name__
