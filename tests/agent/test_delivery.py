"""What was recorded reaches the back end or is counted as lost, whatever becomes of the agent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.agent.drain import load_cursors
from stagescope.agent.loop import Agent
from stagescope.agent.pipeline import sinks_from_environment
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agent_kills import kill_agents
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

    (member,) = [span for span in receiver.spans if span.links and span.kind == "server"]
    assert [span_id for _, span_id in member.links] == [batch_id]
    assert batch_id in {span.span_id for span in receiver.spans}
