"""A dynamic batcher: requests that wait together go through the model together.

One worker takes what waits, up to *max_size* members, and gives late ones *max_delay_s* seconds
from the first member on. While a batch is in the model the next requests wait, so batches grow
with the load. Four calls tell stagescope about it: `batch.enqueue`, `batch`, `collate`,
`inference`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

from stagescope import batch
from stagescope.examples.image_server.settings import BatchLimits
from stagescope.middleware.batch import Ticket

Item = TypeVar("Item")
Collated = TypeVar("Collated")
Result = TypeVar("Result")


class BatcherFull(Exception):
    """As many requests wait as the batcher takes; the caller may try again later."""


class BatcherClosed(Exception):
    """The batcher stops, and this request was not yet in the model."""


class ModelFailed(Exception):
    """The batch that this request was in failed; the cause is the model's own exception."""


@dataclass(frozen=True, slots=True)
class _Member(Generic[Item, Result]):
    item: Item
    ticket: Ticket | None
    answer: asyncio.Future[Result]


class Batcher(Generic[Item, Collated, Result]):
    """Use as `async with`: inside, `submit` gives an item's result.

    *collate* turns items into the model's input, *infer* turns that into one result an item,
    in the same order. Both run on the batcher's own thread, one batch at a time.
    """

    def __init__(
        self,
        collate: Callable[[Sequence[Item]], Collated],
        infer: Callable[[Collated], Sequence[Result]],
        limits: BatchLimits,
        *,
        model: str,
    ) -> None:
        self._collate = collate
        self._infer = infer
        self._limits = limits
        self._model = model
        self._closed = False
        self._waiting: asyncio.Queue[_Member[Item, Result] | None] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"batcher-{model}")

    @property
    def waiting(self) -> int:
        """How many requests are not yet in a batch."""
        return self._waiting.qsize()

    async def submit(self, item: Item) -> Result:
        """Wait for the result of *item*.

        Raises BatcherFull, BatcherClosed, or ModelFailed.
        """
        if self._closed:
            raise BatcherClosed("the server is shutting down")
        if self.waiting >= self._limits.max_waiting:
            raise BatcherFull(f"{self.waiting} requests are waiting already")
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait(_Member(item, batch.enqueue(), answer))
        return await answer

    async def __aenter__(self) -> Self:
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the batch that is in the model, and tell who still waits that it is over."""
        self._closed = True
        while not self._waiting.empty():
            _fail(self._waiting.get_nowait(), BatcherClosed("the server is shutting down"))
        self._waiting.put_nowait(None)
        await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        while (first := await self._waiting.get()) is not None:
            members: list[_Member[Item, Result]] = []
            done = asyncio.create_task(self._serve(first, members))
            await asyncio.wait([done])  # its exception is the members' answer, not ours
            self._answer(members, done)

    async def _serve(
        self, first: _Member[Item, Result], members: list[_Member[Item, Result]]
    ) -> Sequence[Result]:
        """Form a batch into *members* and give its results."""
        if first.answer.done():
            return ()
        with batch(model=self._model) as formed:
            members.append(first)
            formed.add(first.ticket)
            await self._gather(formed, members)
            run = asyncio.get_running_loop().run_in_executor
            return await run(self._thread, self._call, formed, [each.item for each in members])

    async def _gather(self, formed: batch, members: list[_Member[Item, Result]]) -> None:
        """Add companions until the batch is full or its time is over."""
        deadline = asyncio.get_running_loop().time() + self._limits.max_delay_s
        while len(members) < self._limits.max_size:
            try:
                # What waits already is taken even after the deadline: it costs no delay.
                async with asyncio.timeout_at(deadline):
                    companion = await self._waiting.get()
            except TimeoutError:
                return
            if companion is None:
                return self._waiting.put_nowait(None)  # the end is `_work`'s to see
            if not companion.answer.done():  # its request may be gone
                members.append(companion)
                formed.add(companion.ticket)

    def _call(self, formed: batch, items: Sequence[Item]) -> Sequence[Result]:
        """On the batcher's thread: the model, with its input made ready."""
        with formed.collate():
            collated = self._collate(items)
        with formed.inference():
            results = self._infer(collated)
        if len(results) != len(items):
            raise ValueError(f"{self._model} gave {len(results)} results for {len(items)} items")
        return results

    def _answer(
        self,
        members: Sequence[_Member[Item, Result]],
        done: asyncio.Task[Sequence[Result]],
    ) -> None:
        error = done.exception()
        if error is not None:
            for member in members:
                _fail(member, ModelFailed(f"{self._model} failed: {error!r}"), error)
            return
        for member, result in zip(members, done.result(), strict=True):
            if not member.answer.done():
                member.answer.set_result(result)


def _fail(
    member: _Member[Item, Result] | None, error: Exception, cause: BaseException | None = None
) -> None:
    if member is not None and not member.answer.done():
        error.__cause__ = cause
        member.answer.set_exception(error)
