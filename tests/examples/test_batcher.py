"""The example's dynamic batcher."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagescope.examples.image_server.batcher import (
    Batcher,
    BatcherClosed,
    BatcherFull,
    ModelFailed,
)
from stagescope.examples.image_server.settings import BatchLimits

Doubling = Batcher[int, Sequence[int], int]
LONG_S = 30.0
"""A delay that no test waits out."""


class DoublingModel:
    """Doubles its items, keeps the batches it saw, and can be held or told to fail."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Semaphore(0)
        self.free = threading.Event()
        self.free.set()

    def infer(self, items: Sequence[int]) -> Sequence[int]:
        """Return each item doubled; an item below zero fails the batch, 99 loses a result."""
        self.batches.append(list(items))
        self.entered.release()
        assert self.free.wait(LONG_S)
        if min(items) < 0:
            raise ArithmeticError("below zero")
        return [2 * item for item in items if item != 99]

    async def wait_entered(self) -> None:
        """Return once one more batch is in the model."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=LONG_S)


def with_batcher(
    model: DoublingModel,
    limits: BatchLimits,
    body: Callable[[Doubling], Coroutine[Any, Any, None]],
) -> None:
    """Run *body* with an open batcher around *model*."""

    async def main() -> None:
        async with Batcher[int, Sequence[int], int](
            list, model.infer, limits, model="doubling"
        ) as batcher:
            await body(batcher)

    asyncio.run(main())


async def hold(batcher: Doubling, model: DoublingModel) -> asyncio.Task[int]:
    """Put a batch of one into the model and keep it there until `model.free` is set."""
    model.free.clear()
    first = asyncio.create_task(batcher.submit(1000))
    await model.wait_entered()
    return first


async def submit_all(batcher: Doubling, items: Sequence[int]) -> list[asyncio.Task[int]]:
    """Submit *items* and return when all of them wait."""
    before = batcher.waiting
    tasks = [asyncio.create_task(batcher.submit(item)) for item in items]
    while batcher.waiting < before + len(items):
        await asyncio.sleep(0)
    return tasks


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=60), st.integers(1, 9))
def test_each_caller_gets_its_own_result(items: list[int], max_size: int) -> None:
    """However requests fall into batches, each gets its result, once, in batches of max_size."""
    model = DoublingModel()

    async def body(batcher: Doubling) -> None:
        results = await asyncio.gather(*(batcher.submit(item) for item in items))

        assert results == [2 * item for item in items]

    with_batcher(model, BatchLimits(max_size=max_size, max_delay_s=0), body)
    assert sorted(item for served in model.batches for item in served) == sorted(items)
    assert max(map(len, model.batches)) <= max_size


def test_requests_that_wait_together_go_together() -> None:
    """While a batch is in the model the next ones gather, in order, and fill whole batches."""
    model = DoublingModel()

    async def body(batcher: Doubling) -> None:
        first = await hold(batcher, model)
        waiting = await submit_all(batcher, range(7))
        model.free.set()
        await asyncio.gather(first, *waiting)

    with_batcher(model, BatchLimits(max_size=4, max_delay_s=0), body)
    assert model.batches == [[1000], [0, 1, 2, 3], [4, 5, 6]]


def test_a_full_batch_does_not_wait_for_the_delay() -> None:
    """A batch goes to the model as soon as it is full, however long the delay."""
    model = DoublingModel()

    async def body(batcher: Doubling) -> None:
        await asyncio.wait_for(asyncio.gather(*map(batcher.submit, range(3))), LONG_S / 2)

    with_batcher(model, BatchLimits(max_size=3, max_delay_s=LONG_S), body)
    assert model.batches == [[0, 1, 2]]


def test_a_batch_that_does_not_fill_goes_after_the_delay() -> None:
    """A lone request is served once the delay is over, and not before."""
    model = DoublingModel()

    async def body(batcher: Doubling) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()

        assert await batcher.submit(4) == 8
        assert loop.time() - began >= 0.05

    with_batcher(model, BatchLimits(max_size=8, max_delay_s=0.05), body)


def test_a_failing_model_fails_its_members_alone() -> None:
    """Members of a failed batch each get ModelFailed with its cause; the next batch is served."""
    model = DoublingModel()

    async def body(batcher: Doubling) -> None:
        first = await hold(batcher, model)
        waiting = await submit_all(batcher, [-1, 5, 6, 7])
        model.free.set()
        results = await asyncio.gather(first, *waiting, return_exceptions=True)

        assert results[0] == 2000
        assert results[3:] == [12, 14]
        for failed in results[1:3]:
            assert isinstance(failed, ModelFailed)
            assert isinstance(failed.__cause__, ArithmeticError)
        assert results[1] is not results[2]

    with_batcher(model, BatchLimits(max_size=2, max_delay_s=0), body)


def test_a_lost_result_fails_the_batch() -> None:
    """A model that gives too few results gives nobody somebody else's."""
    model = DoublingModel()

    async def body(batcher: Doubling) -> None:
        results = await asyncio.gather(*map(batcher.submit, [99, 1]), return_exceptions=True)

        assert [type(result) for result in results] == [ModelFailed, ModelFailed]

    with_batcher(model, BatchLimits(max_size=2, max_delay_s=LONG_S), body)


def test_a_cancelled_request_leaves_its_batch() -> None:
    """A request that is gone before its batch forms is not computed; its companions are."""
    model = DoublingModel()

    async def body(batcher: Doubling) -> None:
        first = await hold(batcher, model)
        waiting = await submit_all(batcher, [1, 2, 3])
        waiting[1].cancel()
        await asyncio.sleep(0)
        model.free.set()
        results = await asyncio.gather(first, *waiting, return_exceptions=True)

        assert [results[0], results[1], results[3]] == [2000, 2, 6]
        assert isinstance(results[2], asyncio.CancelledError)

    with_batcher(model, BatchLimits(max_size=8, max_delay_s=0), body)
    assert model.batches == [[1000], [1, 3]]


def test_a_request_cancelled_in_the_model_does_not_disturb_the_others() -> None:
    """A request that goes while its batch is in the model costs its companions nothing."""
    model = DoublingModel()

    async def body(batcher: Doubling) -> None:
        model.free.clear()
        tasks = [asyncio.create_task(batcher.submit(item)) for item in (1, 2)]
        await model.wait_entered()
        tasks[0].cancel()
        await asyncio.sleep(0)
        model.free.set()

        assert await tasks[1] == 4
        assert await asyncio.gather(*map(batcher.submit, [3, 4])) == [6, 8]

    with_batcher(model, BatchLimits(max_size=2, max_delay_s=LONG_S), body)


def test_too_many_waiting_are_refused() -> None:
    """Beyond max_waiting a request is refused at once, and those that wait are served."""
    model = DoublingModel()

    async def body(batcher: Doubling) -> None:
        first = await hold(batcher, model)
        waiting = await submit_all(batcher, [1, 2])
        with pytest.raises(BatcherFull):
            await batcher.submit(3)
        model.free.set()

        assert await asyncio.gather(first, *waiting) == [2000, 2, 4]

    with_batcher(model, BatchLimits(max_size=8, max_delay_s=0, max_waiting=2), body)


def test_closing_finishes_the_batch_in_the_model_and_tells_the_waiting() -> None:
    """At the end, what is in the model is answered, what waits is told, nothing hangs."""
    model = DoublingModel()

    async def main() -> None:
        batcher: Doubling = Batcher(
            list, model.infer, BatchLimits(max_size=1, max_delay_s=0), model="doubling"
        )
        await batcher.__aenter__()
        first = await hold(batcher, model)
        waiting = await submit_all(batcher, [1, 2])
        closing = asyncio.create_task(batcher.__aexit__(None, None, None))
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [BatcherClosed, BatcherClosed]
        assert not closing.done()
        model.free.set()
        await closing

        assert await first == 2000
        with pytest.raises(BatcherClosed):
            await batcher.submit(3)

    asyncio.run(main())


def test_closing_ends_the_wait_for_companions() -> None:
    """A batch that still gathers when the batcher closes goes to the model at once."""
    model = DoublingModel()

    async def main() -> None:
        async with Batcher[int, Sequence[int], int](
            list, model.infer, BatchLimits(max_size=8, max_delay_s=LONG_S), model="doubling"
        ) as batcher:
            lone = asyncio.create_task(batcher.submit(4))
            for _ in range(5):  # let the worker take it
                await asyncio.sleep(0)
            assert batcher.waiting == 0
        assert await lone == 8

    asyncio.run(asyncio.wait_for(main(), LONG_S / 2))
