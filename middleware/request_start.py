"""The stamp by which a proxy says when a request reached it: how long it waited before us.

The three common forms of `X-Request-Start` (some call it `X-Queue-Start`):
`t=1700000000.123` (nginx, `t=${msec}`: seconds), `1700000000123` (Heroku: ms) and
`t=1700000000123456` (Apache httpd, `t=%t`: µs); ns are known by their size too.
"""

from __future__ import annotations

from stagescope import settings

HEADERS = frozenset((b"x-request-start", b"x-queue-start"))

MOST_S = 3600
"""A stamp further back than an hour is no wait but a wrong clock."""

_MOST_BYTES = 32

_SCALES = ((1e17, 1), (1e14, 1_000), (1e11, 1_000_000), (1e8, 1_000_000_000))
"""From which size on a stamp counts which unit (in ns); each holds for the years 1973 to 5000."""

LONGEST_NS = int(min(settings.INGRESS.number(), MOST_S) * 1e9) if settings.INGRESS.on() else 0
"""A stamp further back is not believed: whoever reaches the server past the proxy can send one."""


def waited_ns(stamp: bytes, wall_ns: int) -> int:
    """Return how long before *wall_ns* (Unix time, ns) the *stamp* is.

    0 where it is none, lies in the future, or lies more than LONGEST_NS back.
    """
    if not LONGEST_NS or len(stamp) > _MOST_BYTES:
        return 0
    digits = stamp.strip().removeprefix(b"t=")
    whole, dot, fraction = digits.partition(b".")
    if not whole.isdigit() or (dot and not fraction.isdigit()):
        return 0
    for least, unit_ns in _SCALES:
        if int(whole) >= least:
            # Whole numbers all the way: a float of 1.7e18 ns is wrong by 128 ns.
            part = int(fraction) * unit_ns // 10 ** len(fraction) if fraction else 0
            waited = wall_ns - int(whole) * unit_ns - part
            return waited if 0 < waited <= LONGEST_NS else 0
    return 0
