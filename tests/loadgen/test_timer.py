"""Both alarms call back once for a setting, never before its time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from stagescope.loadgen.timer import KernelAlarm, LoopAlarm, Timer

KINDS = [KernelAlarm, LoopAlarm]


def rings(kind: type[KernelAlarm | LoopAlarm], delays_ns: list[int]) -> list[int]:
    """Set an alarm for each delay in turn; give how late each call was, in ns."""
    late: list[int] = []

    async def ring_all() -> None:
        for delay_ns in delays_ns:
            rung = asyncio.Event()
            alarm: Timer = kind(asyncio.get_running_loop(), rung.set)
            at_ns = time.monotonic_ns() + delay_ns
            alarm.set(at_ns)
            await asyncio.wait_for(rung.wait(), 5)
            late.append(time.monotonic_ns() - at_ns)
            alarm.close()

    asyncio.run(ring_all())
    return late


@pytest.mark.parametrize("kind", KINDS)
def test_it_rings_at_its_time_and_not_before(kind: type[KernelAlarm | LoopAlarm]) -> None:
    """Times to come, times past and the beginning of time all ring, none early."""
    late = rings(kind, [5_000_000, 300_000, 0, -1_000_000, -time.monotonic_ns()])
    assert min(late) >= 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_alarm_is_silent(kind: Callable[..., Timer]) -> None:
    """Closing takes the setting back."""
    rung: list[bool] = []

    async def close_first() -> None:
        alarm = kind(asyncio.get_running_loop(), lambda: rung.append(True))
        alarm.set(time.monotonic_ns() + 1_000_000)
        alarm.close()
        await asyncio.sleep(0.01)

    asyncio.run(close_first())
    assert not rung
