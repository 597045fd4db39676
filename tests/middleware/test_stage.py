"""Stages: as blocks and decorators, in every kind of code, charged by the partition rule."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import typing
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagescope import carry, stage
from stagescope.middleware.recording.names import intern
from stagescope.middleware.recording.timeline import current
from stagescope.records import RequestRecord
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


def only(recording: Recording) -> RequestRecord:
    """The one request that was recorded."""
    (record,) = recording.requests
    return record


def test_nested_stages_share_time_without_overlap(recording: Recording, clock: HandClock) -> None:
    """Time inside an inner stage is the inner's alone; the outer keeps what is around it."""
    with recording.request():
        clock.tick(1)
        with stage("preprocess"):
            clock.tick(10)
            with stage("preprocess.parse"):
                clock.tick(100)
            clock.tick(1_000)
        clock.tick(5)

    record = only(recording)
    assert record.self_ns() == {"preprocess": 1_010, "preprocess.parse": 100, "other": 6}
    assert record.stage_ns() == {"preprocess": 1_110, "other": 6}
    assert record.duration_ns == 1_116


def test_the_stage_opened_last_is_charged(recording: Recording, clock: HandClock) -> None:
    """Where two are open side by side, all goes to the later one, also after the earlier ends."""
    with recording.request() as timeline:
        first = timeline.open_at(2, clock())
        clock.tick(10)
        second = timeline.open_at(3, clock())
        clock.tick(100)
        timeline.close(first)
        clock.tick(1_000)
        timeline.close(second)

    assert only(recording).self_ns() == {"queue": 10, "preprocess": 1_100, "other": 0}


def test_an_exception_passes_through_and_marks_the_stage(
    recording: Recording, clock: HandClock
) -> None:
    """A stage left by an exception is closed, marked failed, and the exception is the same."""
    error = ValueError("the user's")
    with recording.request():
        with pytest.raises(ValueError, match="the user's") as caught, stage("inference"):
            clock.tick(7)
            raise error
        clock.tick(1)

    assert caught.value is error
    (span,) = only(recording).stages
    assert (span.stage, span.self_ns, span.failed, span.open) == ("inference", 7, True, False)


def test_a_cancelled_stage_is_closed_and_not_failed(recording: Recording) -> None:
    """Cancellation ends a stage; it is nobody's failure."""

    async def request() -> None:
        with recording.request():
            started = asyncio.Event()

            async def work() -> None:
                with stage("inference"):
                    started.set()
                    await asyncio.Event().wait()

            task = asyncio.create_task(work())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(request())

    (span,) = only(recording).stages
    assert (span.failed, span.open) == (False, False)


def test_a_stage_that_outlives_its_request_is_charged_until_its_end(
    recording: Recording, clock: HandClock
) -> None:
    """What is still open when the request ends counts up to there, and is shown as open."""
    left_open = stage("postprocess")
    with recording.request():
        left_open.__enter__()
        clock.tick(9)
    clock.tick(1_000)
    left_open.__exit__(None, None, None)

    (span,) = only(recording).stages
    assert (span.self_ns, span.open) == (9, True)


def test_outside_a_request_a_stage_does_nothing(recording: Recording) -> None:
    """Code with stages runs the same where no request is."""
    with stage("inference"):
        pass

    assert current.get() is None
    assert carry(len) is len
    assert recording.requests == []


def test_a_decorated_function_is_charged_at_each_call(
    recording: Recording, clock: HandClock
) -> None:
    """A plain function, with its name, its arguments and its result kept."""

    @stage("preprocess")
    def decode(width: int, *, height: int) -> int:
        """Decode."""
        clock.tick(width)
        return width * height

    with recording.request():
        assert [decode(2, height=3), decode(5, height=1)] == [6, 5]

    assert (decode.__name__, decode.__doc__) == ("decode", "Decode.")
    assert only(recording).self_ns() == {"preprocess": 7, "other": 0}


def test_a_decorated_coroutine_is_charged_while_it_is_awaited(
    recording: Recording, clock: HandClock
) -> None:
    """An async function, through its own awaits."""

    @stage("inference")
    async def infer() -> str:
        clock.tick(3)
        await asyncio.sleep(0)
        clock.tick(4)
        return "top"

    async def request() -> None:
        with recording.request():
            assert await infer() == "top"
            clock.tick(1)

    asyncio.run(request())

    assert only(recording).self_ns() == {"inference": 7, "other": 1}


def test_a_decorated_generator_is_charged_while_it_runs(
    recording: Recording, clock: HandClock
) -> None:
    """The consumer's time between two items is not the generator's."""

    @stage("inference")
    def tokens() -> Generator[int, int, str]:
        clock.tick(10)
        sent = yield 1
        clock.tick(sent)
        yield 2
        return "done"

    seen: list[object] = []

    def consume() -> Generator[int, int, None]:
        seen.append((yield from tokens()))

    with recording.request():
        consumer = consume()
        seen.append(next(consumer))
        clock.tick(1_000)
        seen.append(consumer.send(20))
        assert list(consumer) == []

    assert seen == [1, 2, "done"]
    assert only(recording).self_ns() == {"inference": 30, "other": 1_000}


def test_a_decorated_generator_gets_what_is_thrown_and_is_closed(recording: Recording) -> None:
    """throw() reaches the user's code, and close() runs its finally."""
    told: list[str] = []

    @stage("inference")
    def tokens() -> Iterator[int]:
        try:
            while True:
                try:
                    yield 1
                except KeyError:
                    told.append("thrown")
        finally:
            told.append("closed")

    with recording.request():
        running = tokens()
        assert isinstance(running, Generator)
        next(running)
        assert running.throw(KeyError()) == 1
        running.close()

    assert told == ["thrown", "closed"]
    assert all(not span.open for span in only(recording).stages)


def test_a_decorated_async_generator_is_charged_while_it_runs(
    recording: Recording, clock: HandClock
) -> None:
    """Tokens of a stream: what the sending takes between them is not the model's."""

    @stage("inference")
    async def tokens() -> AsyncIterator[int]:
        for token in range(3):
            clock.tick(10)
            await asyncio.sleep(0)
            yield token

    async def request() -> None:
        with recording.request():
            got = []
            async for token in tokens():
                got.append(token)
                clock.tick(100)
            assert got == [0, 1, 2]

    asyncio.run(request())

    assert only(recording).self_ns() == {"inference": 30, "other": 300}


def test_a_long_stream_takes_a_bounded_number_of_entries(
    recording: Recording, clock: HandClock
) -> None:
    """After its first steps a generator is one opening, however many tokens follow."""

    @stage("inference")
    def tokens() -> Iterator[int]:
        for token in range(10_000):
            clock.tick(1)
            yield token

    with recording.request():
        assert sum(1 for _ in tokens()) == 10_000

    record = only(recording)
    assert len(record.stages) == 17
    assert record.stages_dropped == 0
    assert record.self_ns() == {"inference": 10_000, "other": 0}


def test_threads_of_asyncio_know_the_request(recording: Recording, clock: HandClock) -> None:
    """asyncio.to_thread takes the context along by itself."""

    def work() -> None:
        with stage("preprocess"):
            clock.tick(4)

    async def request() -> None:
        with recording.request():
            await asyncio.to_thread(work)

    asyncio.run(request())

    assert only(recording).self_ns() == {"preprocess": 4, "other": 0}


def test_carry_takes_the_request_into_a_bare_executor(
    recording: Recording, clock: HandClock
) -> None:
    """The wait for a thread is queue.threadpool, the work is what the work says."""

    def work(number: int) -> int:
        with stage("inference"):
            clock.tick(number)
        return number

    with concurrent.futures.ThreadPoolExecutor(1) as pool, recording.request():
        carried = carry(work)
        clock.tick(50)
        assert pool.submit(carried, 3).result() == 3
        assert pool.submit(carried, 4).result() == 4
        assert pool.submit(current.get).result() is None

    assert only(recording).self_ns() == {"queue.threadpool": 50, "inference": 7, "other": 0}


def test_carry_takes_the_request_into_a_thread_and_passes_errors(recording: Recording) -> None:
    """A user's own thread, whose exception is the user's."""
    caught: list[BaseException] = []

    def work() -> None:
        with stage("inference"):
            raise ZeroDivisionError

    def guarded(function: object) -> None:
        assert callable(function)
        try:
            function()
        except ZeroDivisionError as error:
            caught.append(error)

    with recording.request():
        thread = threading.Thread(target=guarded, args=(carry(work),))
        thread.start()
        thread.join()

    assert len(caught) == 1
    assert [s.failed for s in only(recording).stages if s.stage == "inference"] == [True]


def test_requests_side_by_side_keep_their_own_stages(recording: Recording) -> None:
    """A hundred concurrent tasks: each record has its own stage and no other's."""

    async def request(number: int) -> None:
        with recording.request(), stage(f"own{number % 7}"):
            await asyncio.sleep(0)

    async def all_of_them() -> None:
        await asyncio.gather(*(request(number) for number in range(100)))

    asyncio.run(all_of_them())

    assert len(recording.requests) == 100
    assert all(len(record.stages) == 1 for record in recording.requests)


def test_one_object_may_be_open_in_many_requests_at_once(
    recording: Recording, clock: HandClock
) -> None:
    """A stage made once at module level is charged to each request by its own time in it."""
    shared = stage("inference")
    outside = threading.Event()

    async def request(number: int) -> None:
        with recording.request(), shared:
            for _ in range(number):
                await asyncio.sleep(0)
                clock.tick(1)

    async def all_of_them() -> None:
        await asyncio.gather(*(request(number) for number in (3, 1, 2)), request(0))

    with shared:  # Outside of any request; closed first while others are open, or last.
        asyncio.run(all_of_them())
        outside.set()

    assert outside.is_set()
    found = recording.requests
    assert len(found) == 4
    for record in found:
        (span,) = record.stages
        assert not span.open
        assert span.end_ns - span.start_ns == record.duration_ns


def test_one_object_may_be_nested_in_itself(recording: Recording, clock: HandClock) -> None:
    """Recursive code may use one object: each block is an opening that ends with the block."""
    shared = stage("inference")
    with recording.request():
        with shared:
            clock.tick(5)
            with shared:
                clock.tick(7)
            clock.tick(11)
        clock.tick(100)

    assert [(s.start_ns, s.end_ns, s.self_ns) for s in only(recording).stages] == [
        (0, 23, 16), (5, 12, 7),
    ]  # fmt: skip


class Refused(Exception):
    """An exception that a framework answers with its status."""

    def __init__(self, status_code: int) -> None:
        self.status_code = status_code


@pytest.mark.parametrize(("status", "failed"), [(401, False), (404, False), (500, True)])
def test_what_answers_the_client_with_a_4xx_is_no_failure(
    recording: Recording, status: int, failed: bool
) -> None:
    """A dependency that refuses a caller did what it is there for."""
    with recording.request(), pytest.raises(Refused), stage("preprocess"):
        raise Refused(status)

    assert [span.failed for span in only(recording).stages] == [failed]


FUNCTIONS = """
from __future__ import annotations
class Item: ...
def function(item: Item) -> Item: ...
async def coroutine(item: Item) -> Item: ...
def generator(item: Item) -> Item: yield
async def async_generator(item: Item) -> Item: yield
"""


@pytest.mark.parametrize("name", ["function", "coroutine", "generator", "async_generator"])
def test_annotations_are_found_where_the_decorated_function_is(name: str) -> None:
    """Frameworks look string annotations up in the outermost function's own module."""
    made: dict[str, Any] = {"__name__": "made"}
    exec(FUNCTIONS, made)  # noqa: S102 - a module of its own

    decorated = stage("inference")(made[name])

    assert typing.get_type_hints(decorated, decorated.__globals__)["item"] is made["Item"]


def test_the_collector_closes_a_decorated_async_generator_silently(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A stream that was left in a reference cycle is closed once, to its last line, without a log."""
    closed: list[int] = []

    @stage("inference.decode")
    async def stream() -> AsyncIterator[int]:
        try:
            for number in range(9):
                yield number
        finally:
            await asyncio.sleep(0)
            closed.append(1)

    async def leave() -> None:
        left = stream()
        cycle: list[object] = [left]
        cycle.append(cycle)
        async for number in left:
            if number == 2:
                break

    async def main() -> None:
        for _ in range(20):
            await leave()
        gc.collect()
        async with asyncio.timeout(20):
            while len(closed) < 20:
                await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()

    assert len(closed) == 20
    assert [record.getMessage() for record in caplog.records] == []


# One step of a random program: open a stage, close one of those open, or let time pass.
Step = st.one_of(
    st.tuples(st.just("open"), st.integers(1, 6)),
    st.tuples(st.just("close"), st.integers(0, 200)),
    st.tuples(st.just("tick"), st.integers(0, 10**9)),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(Step, max_size=150))
def test_every_nanosecond_is_charged_once(
    tmp_path_factory: pytest.TempPathFactory, program: list[tuple[str, int]]
) -> None:
    """Random nested and concurrent stages: each instant is charged to the one opened last."""
    clock = HandClock()
    recording = Recording(tmp_path_factory.mktemp("ring"), clock=clock)
    expected: dict[str, int] = {}
    try:
        with recording.request() as timeline:
            still_open: list[tuple[int, str]] = []
            for act, number in program:
                if act == "open":
                    name = ("queue", "preprocess", "batch", "inference", "mine", "other")[
                        number - 1
                    ]
                    still_open.append((timeline.open(intern(name)), name))
                elif act == "close" and still_open:
                    index, _ = still_open.pop(number % len(still_open))
                    timeline.close(index)
                elif act == "tick":
                    clock.tick(number)
                    charged = still_open[-1][1] if still_open else "other"
                    expected[charged] = expected.get(charged, 0) + number
        record = only(recording)
    finally:
        recording.close()

    assert sum(record.self_ns().values()) == record.duration_ns
    assert {k: v for k, v in record.self_ns().items() if v} == {
        k: v for k, v in expected.items() if v
    }
