"""The watchdog, with real servers whose loops are blocked."""

import logging
import signal
from pathlib import Path

import pytest

from stagescope.agent.context import AgentContext
from stagescope.agent.stacks.loop_watchdog import LoopWatch, make
from stagescope.stacks import StackSpan
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.sampled import sampling_agent, serving

PROGRAM = Path(__file__).parent / "stack_server.py"
PROGRAM_LINES = PROGRAM.read_text().splitlines()


def watchdog(agent: AgentContext) -> list[LoopWatch]:
    """Only this one."""
    return [LoopWatch(agent, 200_000_000)]


def dumped(agent: AgentContext) -> list[StackSpan]:
    """Return the stacks of the only dump, once there is one."""
    wait_until(lambda: agent.evidence.counts["loop_dumps"], 10)
    return agent.evidence.stacks.between(0, 1 << 63)


@pytest.mark.parametrize(
    ("path", "planted", "how"),
    [("/sleeps", "time.sleep(0.7)", "in-process"), ("/in-c", "sum(range(", "py-spy")],
)
def test_what_holds_the_loop_is_caught_with_its_line(
    path: str, planted: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A sleep, which lets the probe answer, and C code that holds the interpreter's lock."""
    with (
        short_spool() as spool,
        serving([PROGRAM], spool) as server,
        sampling_agent(spool, watchdog) as agent,
        caplog.at_level(logging.WARNING),
    ):
        wait_until(lambda: any(ticks for _, _, ticks in agent.loop_ticks()))
        server.get(path)
        first, *_ = dumped(agent)
        assert planted in PROGRAM_LINES[first.frames[-1].line - 1]
        assert (first.reason, first.how, first.thread_id) == ("loop_lag", how, server.pid)
        server.get("/sleeps")  # another block within ten seconds
        wait_until(lambda: agent.evidence.counts["loop_dumps_withheld"])
        assert agent.evidence.counts["loop_dumps"] == 1
        assert [(one.kind, one.pid) for one in agent.notices.take()] == [("loop_lag", server.pid)]
    told = [message for message in caplog.messages if "has stood still" in message]
    assert len(told) == 1
    assert f"({PROGRAM}:{first.frames[-1].line})" in told[0]


def test_a_stopped_or_ended_loop_is_not_blamed() -> None:
    """A process that was stopped by a signal, and one that is gone: no dump."""
    with (
        short_spool() as spool,
        serving([PROGRAM], spool) as server,
        sampling_agent(spool, watchdog) as agent,
    ):
        wait_until(lambda: any(ticks for _, _, ticks in agent.loop_ticks()))
        server.process.send_signal(signal.SIGSTOP)
        late = [ticks for _, _, ticks in agent.loop_ticks()]
        wait_until(lambda: agent.counters()["collector_watchdog_calls"] > 2)
        assert [ticks for _, _, ticks in agent.loop_ticks()] == late
        server.process.send_signal(signal.SIGCONT)
        server.kill()
        wait_until(lambda: not agent.loop_ticks())
        assert not agent.evidence.counts["loop_dumps"]


def test_no_limit_no_watchdog() -> None:
    """`off` makes none."""
    with short_spool() as spool, sampling_agent(spool, lambda agent: []) as agent:
        assert make(agent, {"STAGESCOPE_LOOP_LIMIT_MS": "off"}) == ()
