"""How many requests a second the example server answers when it always has enough to do.

A closed loop: *clients* that each send their next request when the last one is answered.
That is the wrong way to measure latency (the load driver's open loop is the right one), but it
finds the throughput in seconds and cannot bury the server.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from stagescope.errors import StagescopeError

if TYPE_CHECKING:
    import aiohttp

SETTLE_S = 1.0
MEASURE_S = 3.0
CLIENTS = 32
"""Four full batches: one in the model, and more than one waiting."""


def measure_capacity(url: str, body: bytes, *, measure_s: float = MEASURE_S) -> float:
    """Post *body* to *url* for a few seconds and give the requests answered a second.

    Raises StagescopeError where an answer is not 200 or does not come.
    """
    return asyncio.run(_measure(url, body, SETTLE_S * min(1.0, measure_s), measure_s))


async def _measure(url: str, body: bytes, settle_s: float, measure_s: float) -> float:
    import aiohttp

    start = time.monotonic() + settle_s
    end = start + measure_s
    answered: list[float] = []
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CLIENTS)) as session,
            asyncio.TaskGroup() as clients,
        ):
            for _ in range(CLIENTS):
                clients.create_task(_client(session, url, body, end, answered))
    except* (aiohttp.ClientError, TimeoutError) as problems:
        first = problems.exceptions[0]
        raise StagescopeError(f"the probe of {url} failed: {first!r}") from first
    return sum(start <= at < end for at in answered) / measure_s


async def _client(
    session: aiohttp.ClientSession, url: str, body: bytes, end: float, answered: list[float]
) -> None:
    headers = {"Content-Type": "image/jpeg"}
    while time.monotonic() < end:
        async with session.post(url, data=body, headers=headers) as response:
            response.raise_for_status()
            await response.read()
        answered.append(time.monotonic())
