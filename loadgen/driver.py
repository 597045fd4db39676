"""The open-loop driver: sends by the clock, whatever the server does.

A request is taken up when the plan says so, never when an earlier one has come back;
so a server that stalls is met by as many requests as its users would have sent meanwhile,
and latency counted from `intended` holds the whole wait (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from inspect import signature
from ipaddress import ip_address
from typing import Any

import aiohttp
from aiohttp.hdrs import CONTENT_TYPE
from multidict import CIMultiDict, istr
from yarl import URL

from stagescope.identity import format_traceparent
from stagescope.loadgen.arrivals import Schedule
from stagescope.loadgen.client_log import Call, ClientLog
from stagescope.loadgen.failures import INTERRUPTED, REQUEST_FAILURES, failure_word
from stagescope.loadgen.instrumented_client import CURRENT, StampingConnector, StampingRequest
from stagescope.loadgen.target import Target
from stagescope.loadgen.timer import alarm

HEAD_START_NS = 20_000_000
"""From the driver's start to the schedule's zero."""
AT_ONCE = 16
"""Taken up in one turn of the loop: a late driver must still read what comes back, or each late
request would open a connection of its own and make it later yet."""
GRACE_S = 2.0
"""How long an ended run waits for the requests in flight."""
MAX_HEADER_BYTES = 1 << 20
MAX_HEADERS = 10_000
"""As Go's clients take: 1 MB of headers is a server's business, not an error."""
_RESPONSE_LIMITS: Mapping[str, Any] = {
    name: limit
    for name, limit in (
        ("max_line_size", MAX_HEADER_BYTES),
        ("max_field_size", MAX_HEADER_BYTES),
        ("max_headers", MAX_HEADERS),
    )
    if name in signature(aiohttp.ClientSession).parameters  # older aiohttp lacks the last
}
_SERVER_TIMING = istr("Server-Timing")
STREAMS = frozenset({"text/event-stream", "application/x-ndjson", "application/jsonl"})
"""Types of responses that come token by token: the time to the first is worth a figure."""


@dataclass(frozen=True, slots=True)
class Ids:
    """Fresh trace and span ids; *source* is seeded by the system, not by the run's seed."""

    source: random.Random

    @classmethod
    def fresh(cls) -> Ids:
        """Ids that no other run will have."""
        return cls(random.Random(os.urandom(32)))

    def pair(self) -> tuple[str, str]:
        """Return a trace id and a span id, neither of them zero."""
        bits = self.source.getrandbits(192)
        trace, span = bits >> 64, bits & 0xFFFF_FFFF_FFFF_FFFF
        return f"{trace or 1:032x}", f"{span or 1:016x}"


class Driver:
    """One run: made, `run` once, ended early by `stop`."""

    def __init__(
        self,
        target: Target,
        schedule: Schedule,
        run_id: str,
        *,
        timeout_s: float,
        ids: Ids | None = None,
    ) -> None:
        """Nothing is sent before `run`; *timeout_s* is for each request, from its start."""
        self._target = target
        self._schedule = schedule
        self._ids = ids or Ids.fresh()
        self._timeout_s = timeout_s
        self._url = URL(target.url, encoded=True)  # sent as it was given
        self._headers = CIMultiDict(target.headers_for(run_id))
        self._tasks: set[asyncio.Task[None]] = set()
        self._next = 0
        self._over: asyncio.Event | None = None
        self._stops = 0
        self.log = ClientLog(0)
        self.started_ns = self.started_wall_ns = 0
        self.stopped_ns = 0
        """When `stop` was first called; 0 where it was not."""
        self.cpu_share = 0.0
        """Of one core, from the first planned send to the last."""
        self.faults: list[BaseException] = []
        """Exceptions that were no request's failure: our own bugs, said at the end."""

    @property
    def planned(self) -> int:
        """Requests in the plan."""
        return len(self._schedule.offsets_ns)

    @property
    def started(self) -> int:
        """Requests taken up so far."""
        return self._next

    @property
    def in_flight(self) -> int:
        """Requests taken up and not over."""
        return len(self._tasks)

    @property
    def interrupted(self) -> bool:
        """Whether the run was ended before its plan was."""
        return self._stops > 0

    @property
    def measured_s(self) -> float:
        """How long the measured phase lasted: to its planned end, or to the first `stop`."""
        begin = self.started_ns + self._schedule.measure_from_ns
        end = self.started_ns + self._schedule.end_ns
        return max(0, min(end, self.stopped_ns or end) - begin) / 1e9

    def stop(self) -> None:
        """End the run: the first time gently, the second time at once; nothing kept is lost."""
        self._stops += 1
        self.stopped_ns = self.stopped_ns or time.monotonic_ns()
        if self._over is not None:
            self._over.set()
        if self._stops > 1:
            for task in self._tasks:
                task.cancel()

    async def run(self) -> None:
        """Send the plan, then wait for what is outstanding."""
        connector = StampingConnector(
            resolves=not _is_address(self._target.host), trust=self._target.trust
        )
        session = aiohttp.ClientSession(
            connector=connector,
            request_class=StampingRequest,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s, ceil_threshold=float("inf")),
            auto_decompress=False,  # the bytes are counted as they came
            **_RESPONSE_LIMITS,
        )
        # One request planned is one request sent: aiohttp would repeat some in silence.
        session._retry_connection = False  # pyright: ignore[reportPrivateUsage]
        with _QuietCollector():
            async with session:
                await self._send_all(session)
                await self._settle()

    async def _send_all(self, session: aiohttp.ClientSession) -> None:
        loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        if self._stops:
            self._over.set()
        self.started_wall_ns, self.started_ns = time.time_ns(), time.monotonic_ns()
        self.started_ns += HEAD_START_NS
        self.started_wall_ns += HEAD_START_NS
        self.log.measure_from_ns = self.started_ns + self._schedule.measure_from_ns
        cpu_s, begun_s = time.process_time(), time.monotonic()
        pace = alarm(loop, lambda: self._send_due(loop, session, pace.set))
        pace.set(self.started_ns)
        try:
            await self._over.wait()
        finally:
            pace.close()
        self.cpu_share = (time.process_time() - cpu_s) / max(time.monotonic() - begun_s, 1e-9)

    def _send_due(
        self,
        loop: asyncio.AbstractEventLoop,
        session: aiohttp.ClientSession,
        wake: Callable[[int], None],
    ) -> None:
        """Take up every request whose time has come, and have us woken for the next."""
        offsets, zero, seq = self._schedule.offsets_ns, self.started_ns, self._next
        planned = len(offsets)
        pause = min(seq + AT_ONCE, planned)
        while seq < pause and offsets[seq] + zero <= time.monotonic_ns():
            call = Call(seq, offsets[seq] + zero, *self._ids.pair())
            task = loop.create_task(self._request(session, call))
            self._tasks.add(task)
            task.add_done_callback(self._done)
            seq += 1
        self._next = seq
        if seq < planned:
            wake(offsets[seq] + zero)
        elif self._over is not None:
            self._over.set()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self.faults.append(fault)

    async def _request(self, session: aiohttp.ClientSession, call: Call) -> None:
        call.started_ns = time.monotonic_ns()
        CURRENT.set(call)
        try:
            await self._exchange(session, call)
        except REQUEST_FAILURES as problem:
            call.last_byte_ns = time.monotonic_ns()
            call.error = failure_word(problem)
        except BaseException as problem:
            call.last_byte_ns = time.monotonic_ns()
            cancelled = isinstance(problem, asyncio.CancelledError)
            call.error = INTERRUPTED if cancelled else type(problem).__name__
            raise
        finally:
            self.log.append(call)

    async def _exchange(self, session: aiohttp.ClientSession, call: Call) -> None:
        headers = self._headers.copy()
        headers["traceparent"] = format_traceparent(call.trace_id, call.span_id)
        body = self._target.body
        call.request_bytes = len(body)
        async with session.request(
            self._target.method,
            self._url,
            headers=headers,
            data=body or None,
            chunked=self._target.chunked or None,
            allow_redirects=False,
        ) as response:
            call.status = response.status
            answered = response.headers
            call.server_timing = ", ".join(answered.getall(_SERVER_TIMING, ()))
            call.streamed = answered.get(CONTENT_TYPE, "").partition(";")[0].lower() in STREAMS
            content = response.content
            while chunk := await content.readany():
                if not call.chunks:
                    call.first_body_ns = call.last_byte_ns
                call.chunks += 1
                call.response_bytes += len(chunk)

    async def _settle(self) -> None:
        """Wait for the requests in flight: each has its own timeout, an ended run less."""
        deadline = None
        while self._tasks:
            if self.interrupted and deadline is None:
                deadline = time.monotonic() + GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                for task in self._tasks:
                    task.cancel()
            await asyncio.wait(tuple(self._tasks), timeout=0.05)


def _is_address(host: str) -> bool:
    with suppress(ValueError):
        ip_address(host)
        return True
    return False


class _QuietCollector:
    """Keep what is there out of the garbage collector's way: a full collection is a late send."""

    def __enter__(self) -> None:
        gc.collect()
        gc.freeze()

    def __exit__(self, *problem: object) -> None:
        gc.unfreeze()
