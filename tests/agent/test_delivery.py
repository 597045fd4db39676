"""What was recorded reaches the back end or is counted as lost, whatever becomes of the agent."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.agent.drain import load_cursors
from stagescope.agent.lock import AGENT, SpoolLock, try_hold
from stagescope.agent.loop import Agent
from stagescope.agent.pipeline import sinks_from_environment
from stagescope.recorder.spool import LOCK_NAME
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agent_kills import kill_agents
from tests.support.agents import AgentProcesses
from tests.support.otlp import Behaviour, OtlpReceiver
from tests.support.rings import write_ring


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as folder:
        yield folder


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
    """A back end, to which the environment points."""
    with OtlpReceiver() as receiver:
        monkeypatch.setenv(
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", receiver.http_endpoint + "/v1/traces"
        )
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield receiver


def make_agent(spool: Path) -> Agent:
    """Make an agent that exports spans."""
    return Agent(spool, sinks_from_environment().sinks)


def servers_spans(receiver: OtlpReceiver) -> Counter[str]:
    """Count the SERVER spans that arrived, by their ids."""
    return Counter(span.span_id for span in receiver.spans if span.kind == "server")


def kill(agent: Agent) -> None:
    """End *agent* as a kill would: nothing is saved, nor sent by a back end that hangs."""
    agent._drain.close()
    for sink in agent.sinks.values():
        sink.close(0.2)


def test_records_wait_in_their_file_until_they_can_be_kept(
    spool: Path, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backlog far above the queue, at a back end that is well: nothing is dropped."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8000")
    with write_ring(spool / "a.ring", 4000, ring_slots=8192, run_id="run"):
        agent = make_agent(spool)
        wait_until(lambda: not agent.step() and agent.counters()["records"] == 4000, 60)
        agent.close(30)

    assert agent.counters()["otlp_dropped_full_spans"] == 0
    assert servers_spans(receiver).total() == len(servers_spans(receiver)) == 4000


def test_a_place_is_saved_only_when_all_before_it_is_sent(
    spool: Path, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that are not kept settle at once, but not the one before them that still waits."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    receiver.behave(Behaviour.HANG)
    with write_ring(spool / "a.ring", 1, run_id="run") as writer:
        agent = make_agent(spool)
        agent.step()
        wait_until(lambda: receiver.attempts)
        for _ in range(50):
            writer.request()
        agent.step()
        agent.hurry()
        agent.step()
        kill(agent)
        receiver.behave(Behaviour.CLOSE)
        receiver.behave(Behaviour.OK)
        after = make_agent(spool)
        after.step()
        after.close(20)

        assert after.counters()["records"] == 51


def test_what_was_sent_is_saved_without_delay(spool: Path, receiver: OtlpReceiver) -> None:
    """An agent that dies after a batch was sent leaves the next one nothing to send twice."""
    with write_ring(spool / "a.ring", 20, run_id="run") as writer:
        agent = make_agent(spool)
        agent.step()
        wait_until(lambda: load_cursors(spool))
        kill(agent)
        writer.request("run")
        after = make_agent(spool)
        after.step()
        after.close(20)

    assert servers_spans(receiver).total() == len(servers_spans(receiver)) == 21


def test_what_was_overwritten_is_counted_by_every_later_agent(spool: Path) -> None:
    """Records that came while no agent ran, and found no room: a kill does not forget them."""
    with write_ring(spool / "a.ring", 100, ring_slots=64) as writer:
        first = make_agent(spool)
        first.step()
        first.hurry()
        first.step()
        kill(first)
        for _ in range(100):
            writer.request()
        second = make_agent(spool)
        second.step()
        second.close(20)
        counted = [agent.counters()["overwritten"] for agent in (first, second)]

    assert counted == [36, 72]


def test_an_agent_killed_at_each_delivery_loses_nothing(
    spool: Path, receiver: OtlpReceiver
) -> None:
    """SIGKILL when the back end has just taken spans: all arrive, and one delivery at most twice."""

    def one_more_delivery() -> None:
        before = len(receiver.deliveries)
        wait_until(lambda: len(receiver.deliveries) > before, 60)

    found = kill_agents(spool, receiver, 60, [one_more_delivery] * 4)

    assert len(found.missing) <= found.counted_as_lost == 0
    assert found.doubled <= found.under_way
    assert len(found.finished) > 60


def test_what_waits_at_the_end_is_sent_by_the_next_agent(
    spool: Path, receiver: OtlpReceiver
) -> None:
    """An agent that is stopped while its back end hangs takes nothing with it."""
    receiver.behave(Behaviour.HANG)
    with write_ring(spool / "a.ring", 20, run_id="run"):
        agent = make_agent(spool)
        agent.step()
        wait_until(lambda: receiver.attempts)
        agent.close(0.5)
        receiver.behave(Behaviour.CLOSE)
        receiver.behave(Behaviour.OK)
        after = make_agent(spool)
        after.step()
        after.close(20)

    assert len(servers_spans(receiver)) == 20


def test_a_batch_outlives_the_agent_that_read_it(
    spool: Path, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch read before a restart, its member after: both spans arrive, linked."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    with write_ring(spool / "a.ring", 3) as writer:
        batch_id = "00000000000000b1"
        writer.batch(span_id=batch_id)
        agent = make_agent(spool)
        agent.step()
        agent.close(20)
        writer.request("run", batch_id=batch_id)
        after = make_agent(spool)
        after.step()
        after.close(20)

    requests = {span.span_id for span in receiver.spans if span.kind == "server"}
    (member,) = [s for s in receiver.spans if s.links and s.parent_span_id in requests]
    assert [span_id for _, span_id in member.links] == [batch_id]
    assert batch_id in {span.span_id for span in receiver.spans}


def held_agent(spool: Path) -> tuple[Agent, SpoolLock]:
    """Make an agent that exports spans and holds the spool's lock."""
    hold = try_hold(spool, AGENT)
    assert hold
    return Agent(spool, sinks_from_environment().sinks, holds=hold.valid), hold


def look_twice(agent: Agent) -> None:
    """Have *agent* notice what has become of its spool, and work on once, as its end does."""
    for _ in range(2):
        agent.hurry()
        agent.step()


def test_an_agent_whose_spool_was_deleted_leaves_the_new_one_alone(
    spool: Path, receiver: OtlpReceiver
) -> None:
    """What it had read is sent, what came into the new spool is the second agent's: nothing twice."""
    with write_ring(spool / "a.ring", 20, run_id="run"):
        first, _ = held_agent(spool)
        first.step()
        shutil.rmtree(spool)
        spool.mkdir(mode=0o700)
        with write_ring(spool / "b.ring", 30, run_id="run"):
            second, hold = held_agent(spool)
            look_twice(first)
            second.step()
            first.close(20)
            second.close(20)
            hold.release()

    assert first.lost_spool
    assert servers_spans(receiver).total() == len(servers_spans(receiver)) == 50


def test_an_agent_whose_lock_was_deleted_leaves_what_waits_to_the_next(
    spool: Path, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are there, and the second agent reads them again: the first sends nothing more."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    with write_ring(spool / "a.ring", 20, run_id="run") as writer:
        first, _ = held_agent(spool)
        first.step()
        (spool / LOCK_NAME).unlink()
        second, hold = held_agent(spool)
        writer.request("run")
        look_twice(first)
        second.step()
        first.close(20)
        second.close(20)
        hold.release()

    assert first.counters()["otlp_sent_spans"] == 0
    assert servers_spans(receiver).total() == len(servers_spans(receiver)) == 21


def test_a_pause_of_the_agent_loses_nothing(
    spool: Path, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM, then far more requests than the queue holds, then the next agent process."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2048")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "512")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    with (
        write_ring(spool / "a.ring", 0, ring_slots=32_768) as writer,
        AgentProcesses() as start,
    ):
        for _ in range(200):
            writer.request(stages=())
        first = start(spool)
        first.terminate()
        assert first.wait(60) == 0
        for _ in range(18_000):
            writer.request(stages=())
        second = start(spool)
        wait_until(lambda: len(receiver.spans) >= 18_200, 120)
        second.terminate()
        assert second.wait(60) == 0

    assert servers_spans(receiver).total() == len(servers_spans(receiver)) == 18_200
