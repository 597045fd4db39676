"""Batches: members charged as they waited, the batch a record of its own, links both ways."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from stagescope import batch, stage
from stagescope.middleware.batch import Ticket
from stagescope.records import Member, RequestRecord
from stagescope.testing.clock import HandClock
from stagescope.testing.recording import Recording


@pytest.fixture
def clock() -> HandClock:
    """A clock that does not move."""
    return HandClock()


@pytest.fixture
def recording(tmp_path: Path, clock: HandClock) -> Iterator[Recording]:
    """A recorder on that clock."""
    made = Recording(tmp_path, clock=clock)
    yield made
    made.close()


def spent(record: RequestRecord) -> dict[str, int]:
    """What a request was charged, without the stages that took no time."""
    return {name: ns for name, ns in record.self_ns().items() if ns}


def test_members_are_charged_as_they_waited(recording: Recording, clock: HandClock) -> None:
    """One that came before the worker was free, one that came while the batch formed."""
    with ExitStack() as requests:
        requests.enter_context(recording.request())
        early = batch.enqueue()
        clock.tick(1_000)  # The worker is busy.
        formed = batch(model="resnet", clock=clock)
        formed.add(early)
        clock.tick(200)
        requests.enter_context(recording.request())
        late = batch.enqueue()
        clock.tick(30)
        formed.add(late)
        clock.tick(4)
        with formed.collate():
            clock.tick(50_000)
        with formed.inference():
            clock.tick(600_000)
        clock.tick(7)

    late_record, early_record = recording.requests
    assert spent(early_record) == {
        "queue.batch": 1_000,
        "batch.wait": 234,
        "batch.collate": 50_000,
        "inference": 600_000,
        "other": 7,
    }
    assert spent(late_record) == {
        "batch.wait": 34,
        "batch.collate": 50_000,
        "inference": 600_000,
        "other": 7,
    }


def test_the_batch_is_a_record_of_its_own_with_links_both_ways(
    recording: Recording, clock: HandClock
) -> None:
    """Its own trace, its members' ids, and its id in each member."""
    with ExitStack() as requests:
        tickets: list[Ticket | None] = []
        for _ in range(40):  # More than fit one slot.
            requests.enter_context(recording.request())
            tickets.append(batch.enqueue())
        clock.tick(5)
        with batch(model="resnet", clock=clock) as formed:
            formed.add(*tickets)
            clock.tick(2)
            with formed.inference():
                clock.tick(30)

    (record,) = recording.batches
    assert (record.size, record.model, record.error, record.members_dropped) == (
        40,
        "resnet",
        "",
        0,
    )
    assert record.duration_ns == 32
    assert [(s.stage, s.self_ns) for s in record.stages] == [("batch.wait", 2), ("inference", 30)]
    members = {Member(r.trace_id, r.span_id) for r in recording.requests}
    assert set(record.members) == members
    assert {r.batch_ids for r in recording.requests} == {(record.batch_id,)}
    assert record.trace_id not in {r.trace_id for r in recording.requests}


def test_a_batch_record_comes_before_its_members(recording: Recording, clock: HandClock) -> None:
    """Readers rely on it: when a member is read, its batch is known."""
    with recording.request():
        ticket = batch.enqueue()
        with batch(clock=clock) as formed:
            formed.add(ticket)

    assert [type(record).__name__ for record in recording.read()] == [
        "BatchRecord",
        "RequestRecord",
    ]


def test_a_batch_of_one_that_waits_for_nobody(recording: Recording, clock: HandClock) -> None:
    """The worker was free before the request came: no queue, all of it batch and inference."""
    formed = batch(clock=clock)
    clock.tick(10_000)
    with recording.request():
        ticket = batch.enqueue()
        clock.tick(3)
        formed.add(ticket)
        with formed.inference():
            clock.tick(20)

    (record,) = recording.requests
    assert spent(record) == {"batch.wait": 3, "inference": 20}
    assert recording.batches[0].duration_ns == 23


def test_a_failing_model_marks_batch_and_members(recording: Recording, clock: HandClock) -> None:
    """The exception passes through; the batch has its class, each member a failed inference."""
    with recording.request():
        ticket = batch.enqueue()
        with pytest.raises(MemoryError), batch(clock=clock) as formed:
            formed.add(ticket)
            with formed.inference():
                clock.tick(9)
                raise MemoryError

    (record,) = recording.batches
    assert record.error == "MemoryError"
    assert record.stages[-1].failed
    (member,) = recording.requests
    assert [(s.stage, s.failed) for s in member.stages if s.failed] == [("inference", True)]


def test_a_cancelled_member_harms_nobody(recording: Recording, clock: HandClock) -> None:
    """Its request ends early and is charged until then; the batch still counts it."""
    with recording.request():
        gone = batch.enqueue()
        clock.tick(5)
    with recording.request():
        stays = batch.enqueue()
        with batch(clock=clock) as formed:
            formed.add(gone, stays)
            clock.tick(1)
            with formed.inference():
                clock.tick(10)

    first, second = recording.requests
    assert spent(first) == {"queue.batch": 5}
    assert spent(second)["inference"] == 10
    assert recording.batches[0].size == 2


def test_a_late_member_of_continuous_batching_joins_and_leaves_alone(
    recording: Recording, clock: HandClock
) -> None:
    """Added while the model runs, released before the others: charged just its own part."""
    with ExitStack() as requests:
        requests.enter_context(recording.request())
        first = batch.enqueue()
        formed = batch(clock=clock)
        formed.add(first)
        formed.inference()
        clock.tick(10)
        requests.enter_context(recording.request())
        second = batch.enqueue()
        clock.tick(100)
        formed.add(second)
        clock.tick(1_000)
        formed.release(second)
        clock.tick(10_000)
        formed.done()

    late, early = recording.requests
    assert spent(early) == {"inference": 11_110}
    assert spent(late) == {"queue.batch": 100, "inference": 1_000, "other": 10_000}


def test_tickets_of_no_request_are_passed_over(recording: Recording, clock: HandClock) -> None:
    """A batcher works the same in tests and warm-ups, where nothing is recorded."""
    assert batch.enqueue() is None
    with batch(clock=clock) as formed:
        formed.add(None)
        with formed.collate(), formed.inference():
            pass

    assert recording.read() == []


def test_members_that_wait_in_another_loop_and_thread(tmp_path: Path) -> None:
    """A real batcher thread, members in tasks: each gets its own, the clock is the real one."""
    recording = Recording(tmp_path)
    waiting: list[tuple[Ticket | None, asyncio.Future[None], asyncio.AbstractEventLoop]] = []
    all_there = threading.Event()

    def batcher() -> None:
        all_there.wait(10)
        with batch(model="m") as formed:
            formed.add(*(ticket for ticket, _, _ in waiting))
            with formed.collate():
                pass
            with formed.inference():
                pass
        for _, future, loop in waiting:
            loop.call_soon_threadsafe(future.set_result, None)

    async def member() -> None:
        with recording.request():
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting.append((batch.enqueue(), future, asyncio.get_running_loop()))
            if len(waiting) == 20:
                all_there.set()
            await future
            with stage("postprocess"):
                pass

    async def members() -> None:
        await asyncio.gather(*(member() for _ in range(20)))

    thread = threading.Thread(target=batcher)
    thread.start()
    asyncio.run(members())
    thread.join()

    assert recording.batches[0].size == 20
    for record in recording.requests:
        names = [span.stage for span in record.stages]
        assert names[-4:] == ["batch.wait", "batch.collate", "inference", "postprocess"]
        assert sum(record.self_ns().values()) == record.duration_ns
    recording.close()
