"""The watchdog, with real servers whose loops are blocked."""

import logging
import signal
import time
from pathlib import Path

import pytest

from stagescope.agent.context import AgentContext
from stagescope.agent.loop import Agent
from stagescope.agent.stacks import loop_watchdog
from stagescope.agent.stacks.loop_watchdog import LoopWatchdog, make
from stagescope.testing import wait_until
from stagescope.testing.clock import HandClock
from stagescope.testing.spool import short_spool
from tests.support.rings import write_ring
from tests.support.sampled import ServerProcess, sampling_agent, serving

PROGRAM = Path(__file__).parent / "stack_server.py"
PROGRAM_LINES = PROGRAM.read_text().splitlines()


def watchdog(agent: AgentContext) -> list[LoopWatchdog]:
    """Only this one."""
    return [LoopWatchdog(agent, 200_000_000)]


def blocks_until(agent: AgentContext, count: str, server: ServerProcess, path: str) -> None:
    """Block the loop until that was seen: a watchdog that knows no loop yet looks rarely."""
    deadline = time.monotonic() + 30
    while not agent.evidence.counts[count] and time.monotonic() < deadline:
        server.get(path)
    assert agent.evidence.counts[count]


@pytest.mark.parametrize(
    ("path", "planted", "how"),
    [
        ("/sleeps", "time.sleep(0.7)", ("in-process", "py-spy")),
        ("/in-c", "sum(range(", ("py-spy",)),
    ],
)
def test_what_holds_the_loop_is_caught_with_its_line(
    path: str,
    planted: str,
    how: tuple[str, ...],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sleep, which lets the probe answer, and C code that holds the interpreter's lock."""
    monkeypatch.setattr(loop_watchdog, "QUIET_NS", 600 * 10**9)
    with (
        short_spool() as spool,
        serving([PROGRAM], spool) as server,
        sampling_agent(spool, watchdog) as agent,
        caplog.at_level(logging.WARNING),
    ):
        wait_until(lambda: any(ticks for _, _, ticks, _ in agent.loop_ticks()))
        blocks_until(agent, "loop_dumps", server, path)
        first, *_ = agent.evidence.stacks.between(0, 1 << 63)
        assert planted in PROGRAM_LINES[first.frames[-1].line - 1]
        assert (first.reason, first.thread_id) == ("loop_lag", server.pid)
        assert first.how in how  # a busy machine's probe may take too long to answer
        blocks_until(agent, "loop_dumps_withheld", server, "/sleeps")  # soon after the first
        assert agent.evidence.counts["loop_dumps"] == 1
        wait_until(lambda: agent.counters()["notices"] >= 2)
        assert {(one.kind, one.pid) for one in agent.notices.take()} == {("loop_lag", server.pid)}
    told = [message for message in caplog.messages if "is blocked for" in message]
    assert len(told) == 1
    assert f"({PROGRAM}:{first.frames[-1].line})" in told[0]


def test_a_stopped_or_ended_loop_is_not_blamed() -> None:
    """A process that was stopped by a signal, and one that is gone: no dump."""
    with (
        short_spool() as spool,
        serving([PROGRAM], spool) as server,
        sampling_agent(spool, watchdog) as agent,
    ):
        wait_until(lambda: any(ticks for _, _, ticks, _ in agent.loop_ticks()))
        server.process.send_signal(signal.SIGSTOP)
        late = [ticks for _, _, ticks, _ in agent.loop_ticks()]
        wait_until(lambda: agent.counters()["collector_watchdog_calls"] > 2)
        assert [ticks for _, _, ticks, _ in agent.loop_ticks()] == late
        server.process.send_signal(signal.SIGCONT)
        server.kill()
        wait_until(lambda: not agent.loop_ticks())
        assert not agent.evidence.counts["loop_dumps"]


def lag_sentences(spool: Path, *looks: tuple[float, int, int]) -> list[str]:
    """Return what is noticed when a loop shows (seconds, ticks, lag in ms) at each look."""
    clock = HandClock(0)
    with write_ring(spool / "a.ring", 0) as writer:
        agent = Agent(spool, {}, shared=True)
        agent.step()
        watch = LoopWatchdog(agent, 250_000_000, clock)
        for now_s, ticks, lag_ms in looks:
            clock.now_ns = int(now_s * 1e9)
            writer.set_wait("loop_ticks", ticks)
            writer.set_wait("loop_lag_ns", lag_ms * 10**6)
            watch.collect()
        agent.close()
    return [notice.sentence for notice in agent.notices.take()]


def test_loop_lag_by_its_figures_within_a_server(tmp_path: Path) -> None:
    """Late ticks and a loop that is blocked are noticed once; a healthy loop and none are not."""
    spool = tmp_path
    assert lag_sentences(spool, (0, 10, 0), (0.5, 15, 2), (1, 20, 4)) == []
    assert lag_sentences(spool, (0, 0, 0), (1, 0, 0), (2, 0, 0)) == []
    (late,) = lag_sentences(spool, (0, 10, 0), (0.5, 11, 300))
    assert "late by 300 ms in 1 ticks within 500 ms" in late
    looks = ((0, 10, 0), (0.5, 10, 0), (1, 10, 0), (1.5, 12, 1400), (2, 17, 1401))
    (blocked,) = lag_sentences(spool, *looks)
    assert "is blocked for 400 ms" in blocked


def test_no_limit_no_watchdog() -> None:
    """`off` makes none."""
    with short_spool() as spool, sampling_agent(spool, lambda agent: []) as agent:
        assert make(agent, {"STAGESCOPE_LOOP_LIMIT_MS": "off"}) == ()
