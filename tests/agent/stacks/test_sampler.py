"""Stacks of a real server under load, by py-spy and by the server itself."""

import logging
import os
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import pytest

from stagescope.agent.context import AgentContext
from stagescope.agent.samplers import chosen
from stagescope.agent.stacks import sampler as stack_sampler
from stagescope.agent.stacks.sampler import FOLDER, Stacks, make
from stagescope.stacks import StackSpan
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.sampled import ServerProcess, sampling_agent, serving

SERVER = [Path(__file__).parent / "stack_server.py"]
LONG = 1 << 63


def sampler(agent: AgentContext, *, window_s: float = 1.0, always: bool = False) -> list[Stacks]:
    """Only this one, with short windows."""
    return [Stacks(agent, always=always, window_s=window_s)]


def windows(
    agent: AgentContext, server: ServerProcess, *paths: str, most: int = 2
) -> list[StackSpan]:
    """Ask for *paths* until so many windows are over, and give what they saw."""
    for _ in range(20):
        server.load(0.5, *paths)
        if agent.evidence.counts["stacks_windows"] >= most:
            break
    agent.evidence.settle(10)
    return agent.evidence.stacks.between(0, LONG)


@pytest.mark.parametrize("shared", [False, True], ids=["py-spy", "in-process"])
def test_a_planted_function_is_the_top_of_its_stage_and_of_no_other(shared: bool) -> None:
    """In a decorated function and in a block alike, whoever samples."""
    with (
        short_spool() as spool,
        serving(SERVER, spool) as server,
        sampling_agent(spool, sampler, shared=shared) as agent,
    ):
        spans = windows(agent, server, "/decorated", "/block")
    assert {span.how for span in spans} == {"in-process" if shared else "py-spy"}
    # Between our own frames and the leaf stands the function that the server's author wrote.
    hot = _top(spans, ("planted", "model", "prepare"))
    assert hot["preprocess"].most_common(1)[0][0] == "planted"
    assert hot["inference"].most_common(1)[0][0] == "model"
    # Not none: py-spy does not pause the server, and one sample in 300 is torn.
    elsewhere = sum(counts["planted"] for stage, counts in hot.items() if stage != "preprocess")
    assert elsewhere <= 0.05 * hot["preprocess"]["planted"]
    assert {span.by for span in spans if span.stage == "preprocess"} >= {"marker", "block"}
    main = {span.thread_id for span in spans if span.stage == "preprocess"}
    assert main == {server.pid}
    assert all(span.end_ns > span.start_ns for span in spans)


def _top(spans: list[StackSpan], names: tuple[str, ...]) -> dict[str, Counter[str]]:
    """Count by stage which of *names* is the innermost."""
    found: dict[str, Counter[str]] = {}
    for span in spans:
        own = [frame.function for frame in span.frames if frame.function in names]
        if span.running and own:
            found.setdefault(span.stage, Counter())[own[-1]] += span.samples
    return found


def test_nothing_is_sampled_without_a_run(tmp_path: Path) -> None:
    """The default samples while a load run is under way; `always` samples anyway."""
    with short_spool() as spool, serving(SERVER, spool):
        with sampling_agent(spool, sampler) as agent:
            wait_until(lambda: agent.alive() and agent.counters()["collector_stacks_calls"] > 3)
            assert not agent.evidence.counts["stacks_windows"]
        with sampling_agent(spool, partial(sampler, always=True)) as agent:
            wait_until(lambda: agent.evidence.counts["stacks_windows"], 20)


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (None, "processes sample their own stacks, which costs them more: pip install py-spy"),
        ("#!/bin/sh\necho 'Error: it is too new' >&2; exit 1\n",
         "Error: it is too new; if it lives, it samples its stacks by itself from now on"),
    ],
    ids=["missing", "failing"],
)  # fmt: skip
def test_without_py_spy_the_server_samples_itself(
    program: str | None,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Said in one sentence; the stacks are there all the same."""
    if program is not None:
        (tmp_path / "py-spy").write_text(program)
        (tmp_path / "py-spy").chmod(0o700)
    monkeypatch.setattr(stack_sampler, "REST_S", 0.1)
    with short_spool() as spool, serving(SERVER, spool) as server:
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        monkeypatch.setenv("PATH", str(tmp_path))
        with sampling_agent(spool, sampler) as agent, caplog.at_level(logging.WARNING):
            spans = windows(agent, server, "/block", most=1)
    assert {span.how for span in spans} == {"in-process"}
    told = [message for message in caplog.messages if message.endswith(sentence)]
    assert len(told) == 1


@pytest.mark.parametrize("shared", [False, True], ids=["py-spy", "in-process"])
def test_a_server_killed_in_a_window_costs_nothing_else(shared: bool) -> None:
    """What was seen until then may be kept; another server is sampled, nothing is left."""
    with (
        short_spool() as spool,
        sampling_agent(spool, partial(sampler, window_s=3.0), shared=shared) as agent,
    ):
        with serving(SERVER, spool) as server:
            server.load(1.5, "/block")
        with serving(SERVER, spool) as server:
            windows(agent, server, "/block", most=2)
            agent.evidence.settle(10)
            spans = agent.evidence.stacks.between(0, LONG)
            assert "preprocess" in {span.stage for span in spans if span.pid == server.pid}
        assert not agent.counters()["faults"]
    assert not (spool / FOLDER).exists()


def test_twenty_agents_leave_nothing() -> None:
    """Begun and given up in the midst of a window: no thread, descriptor, process or file."""
    with short_spool() as spool, serving(SERVER, spool) as server:
        threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
        for round_ in range(20):
            kind = partial(sampler, window_s=5.0, always=True)
            with sampling_agent(spool, kind, shared=round_ % 4 == 0):
                wait_until(_begun, 20)
        assert set(threading.enumerate()) <= threads
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)
        assert not (spool / FOLDER).exists()
        wait_until(lambda: not _sampling_threads(server))


def _begun() -> list[str]:
    """Name the windows that are going on, by their processes or threads."""
    children = [child.name() for child in psutil.Process().children()]
    threads = [thread.name for thread in threading.enumerate()]
    return [name for name in children + threads if name in ("py-spy", "stagescope-stacks")]


def _sampling_threads(server: ServerProcess) -> int:
    """Count the server's threads beside those that it has anyway: the one that answers us."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    count = int(next(line for line in status.splitlines() if line.startswith("Threads")).split()[1])
    return max(0, count - 3)  # its own, the probe's, the watch of the interpreter's lock


def test_off_makes_no_sampler() -> None:
    """`off` makes none, and the sampler has its name."""
    with short_spool() as spool, sampling_agent(spool, lambda agent: []) as agent:
        assert make(agent, {"STAGESCOPE_STACKS": "off"}) == ()
        assert {"stacks"} == {one.name for one in chosen("stacks")(agent)}


def test_a_trigger_has_its_window_with_its_reason_and_what_it_cost() -> None:
    """One at a time and process; the CPU time of py-spy is the collector's."""
    with (
        short_spool() as spool,
        serving(SERVER, spool) as server,
        sampling_agent(spool, lambda agent: []) as agent,
    ):
        ((ring, process),) = wait_until(agent.alive)
        (mine,) = make(agent, {})
        assert isinstance(mine, Stacks)
        assert agent.actions.stacks is mine
        assert mine.window(ring, process, "slow", 1.0)
        assert not mine.window(ring, process, "slow", 1.0)
        server.load(1.5, "/block")
        wait_until(lambda: mine.collect() or agent.evidence.counts["stacks_windows"])  # type: ignore[func-returns-value]
        mine.close()
        assert {span.reason for span in agent.evidence.stacks.between(0, LONG)} >= {"slow"}
        assert mine.children_cpu_s() > 0
