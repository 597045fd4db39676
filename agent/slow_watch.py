"""Notices a slow tail: several requests of a route far beyond its running p99, in a short time.

A sink, so it sees every request: a dictionary and a bucket each, less than a microsecond.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from stagescope.agent.notices import SLOW, Notice, Notices
from stagescope.exporters.slow_tail import SlowTail
from stagescope.records import Process, Record, RequestRecord, State

FACTOR: Final = 2.0
"""Slow is what takes this many times the p99 of its route..."""
FLOOR_NS: Final = 20_000_000
"""...and by this much longer: a doubled millisecond is no reason to look."""
AT_LEAST: Final = 3
WITHIN_S: Final = 10.0
MAX_ROUTES: Final = 256
"""Of a service's routes beyond these no tail is watched."""
OWN_STALL: Final = "capture"
"""Cause of the stalls that a capture of ours makes: no reason for another one."""

Key = tuple[str, str, str]
"""Service, method, route."""


class Route:
    """One route: its running p99, and the newest requests that went far beyond it."""

    __slots__ = ("slow", "tail")

    def __init__(self) -> None:
        self.tail = SlowTail()
        self.slow: deque[RequestRecord] = deque(maxlen=AT_LEAST)


class SlowWatch:
    """Puts a notice where at least AT_LEAST requests of a route were slow within WITHIN_S."""

    def __init__(
        self, notices: Notices, counts: Callable[[], dict[str, int]] = dict[str, int]
    ) -> None:
        """*counts*: what is shown as this sink's counters, the triggers' own."""
        self.accepted = 0
        self.newest: Process | None = None
        """Whose record came last."""
        self._notices = notices
        self._counts = counts
        self._routes: dict[Key, Route] = {}

    @property
    def settled(self) -> int:
        """All that was accepted: nothing waits here."""
        return self.accepted

    def accept(self, records: Sequence[Record]) -> None:
        """Look at each request."""
        routes = self._routes
        for record in records:
            if type(record) is RequestRecord:
                key = record.process.service, record.method, record.route
                route = routes.get(key)
                if route is None:
                    if len(routes) >= MAX_ROUTES:
                        continue
                    route = routes[key] = Route()
                tail = route.tail
                if tail.add(record.duration_ns) and record.duration_ns > (
                    FACTOR * tail.limit_ns + FLOOR_NS
                ):
                    self._found(route, record)
        self.accepted += len(records)
        if records:
            self.newest = records[-1].process

    def _found(self, route: Route, record: RequestRecord) -> None:
        if record.state is State.DIED or any(one.cause == OWN_STALL for one in record.stalls):
            return
        slow = route.slow
        slow.append(record)
        if len(slow) == AT_LEAST and _end_ns(record) - _end_ns(slow[0]) <= WITHIN_S * 1e9:
            at_ns, pid = _end_ns(record), record.process.pid
            self._notices.put(Notice(SLOW, pid, "", at_ns, _sentence(list(slow), route.tail)))
            slow.clear()

    def counters(self) -> dict[str, int]:
        """Give what the triggers made of it."""
        return self._counts()

    def close(self, timeout_s: float) -> None:
        """Nothing waits here."""


def _end_ns(record: RequestRecord) -> int:
    return record.start_ns + record.duration_ns


def _sentence(slow: list[RequestRecord], tail: SlowTail) -> str:
    worst = max(slow, key=lambda record: record.duration_ns)
    spent = worst.self_ns()
    stage = max(spent, key=lambda name: spent[name])
    return (
        f"{len(slow)} requests of {worst.method} {worst.route or worst.path} took more than "
        f"{FACTOR:g} times its p99 ({tail.limit_ns / 1e6:.3g} ms) within {WITHIN_S:g} s; the "
        f"slowest took {worst.duration_ns / 1e6:.4g} ms, {spent[stage] / 1e6:.4g} of them in "
        f"{stage} (trace {worst.trace_id})"
    )
