"""LitServe's inference worker: takes up each request's timeline and writes its stages there.

Seen from its edges alone, whichever loop runs between them: what is taken from the queue, the
calls of the LitAPI, and what is sent back.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from stagescope.middleware.batch import Ticket, batch
from stagescope.middleware.process import recorder_beside
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.remote import extract
from stagescope.middleware.stage import stage

_INFERENCE = CODES["inference"]
_POSTPROCESS = CODES["postprocess"]


def inference_worker(lit_api: Any, *args: Any, **kwargs: Any) -> None:
    """Run LitServe's own worker with its queue, transport and LitAPI timed."""
    from litserve.loops.loops import inference_worker as run

    with guarded():
        device, worker_id, request_queue, transport, *rest = args
        args = (device, worker_id, *_timed(lit_api, request_queue, transport), *rest)
    run(lit_api, *args, **kwargs)


def _timed(lit_api: Any, request_queue: Any, transport: Any) -> tuple[Any, Any]:
    from litserve.loops.continuous_batching_loop import ContinuousBatchingLoop

    continuous = isinstance(lit_api.loop, ContinuousBatchingLoop)
    if lit_api.max_batch_size > 1 and not continuous:
        work: Work = BatchedWork(lit_api.api_path)
    else:
        work = Work()
    work.time(lit_api)
    if continuous:
        lit_api.loop.add_request = work.joining(lit_api.loop.add_request)
    send = transport.send
    transport.send = lambda item, *args, **kwargs: send(work.sent(item), *args, **kwargs)
    return TakingQueue(request_queue, work), transport


class TakingQueue:
    """The queue of requests, which says what is taken from it."""

    def __init__(self, inner: Any, work: Work) -> None:
        self._inner = inner
        self._work = work

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """Take the next request."""
        return self._work.taken(self._inner.get(*args, **kwargs))

    def get_nowait(self) -> Any:
        """Take the next request, without waiting."""
        return self._work.taken(self._inner.get_nowait())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Item:
    """One request in this worker."""

    __slots__ = ("decoded", "index", "payload", "ticket", "timeline")

    def __init__(self, payload: object, timeline: Timeline | None, since_ns: int) -> None:
        self.payload = payload
        self.timeline = timeline
        self.decoded = False
        self.index = -1
        """The entry that is open until the reply is sent; -1: none."""
        self.ticket = None if timeline is None else Ticket(timeline, since_ns)
        """Its wait in the queue, while it lasts."""

    def taken_up(self) -> None:
        """End the wait in the queue."""
        if self.timeline is not None and self.ticket is not None:
            self.ticket.leave(self.timeline.clock())
            self.ticket = None

    def open(self, code: int) -> None:
        """Open the stage that lasts until the reply."""
        if self.timeline is not None:
            self.index = self.timeline.open(code)

    def end(self, *, failed: bool) -> None:
        """Write the last of it; after the reply the timeline's owner may end it at any moment."""
        timeline = self.timeline
        if timeline is None:
            return
        self.taken_up()
        if self.index >= 0:
            timeline.close_at(self.index, timeline.clock(), failed=failed)
        timeline.done = True


class Work:
    """The requests in this worker, each on its own, one after the other or side by side."""

    def __init__(self) -> None:
        self._items: dict[str, Item] = {}

    def time(self, lit_api: Any) -> None:
        """Replace the LitAPI's methods by timed ones."""
        relayed = bool(lit_api.stream)
        lit_api.decode_request = self.decoding(lit_api.decode_request, lit_api.enable_async)
        lit_api.predict = _staged("inference", lit_api.predict, relayed)
        lit_api.encode_response = _staged("postprocess.serialize", lit_api.encode_response, relayed)

    def taken(self, message: Any) -> Any:
        """Note that *message* has left the queue."""
        with guarded():
            _, request_id, _, payload = message
            if request_id is not None:
                self.take(request_id, payload)
        return message

    def take(self, request_id: str, payload: object) -> Item:
        """Take up the timeline that came with the id."""
        carrier = getattr(request_id, "carrier", None)
        recorder = recorder_beside(carrier) if carrier else None
        timeline = extract(carrier, recorder) if recorder else None
        item = Item(payload, timeline, timeline.lent_ns if timeline else 0)
        self._items[request_id] = item
        return item

    def decoding(self, decode: Callable[..., Any], in_tasks: bool) -> Callable[..., Any]:
        """Time `decode_request`, with which the work for a request begins."""

        @functools.wraps(decode)
        def timed(request: Any, *args: Any, **kwargs: Any) -> Any:
            self.begin(request)
            with stage("preprocess.parse"):
                return decode(request, *args, **kwargs)

        @functools.wraps(decode)
        async def timed_in_task(request: Any, *args: Any, **kwargs: Any) -> Any:
            # A coroutine in any case: what it makes current stays so for the rest of the task.
            self.begin(request)
            with stage("preprocess.parse"):
                if inspect.iscoroutinefunction(decode):
                    return await decode(request, *args, **kwargs)
                result = await asyncio.to_thread(decode, request, *args, **kwargs)
                return await result if inspect.iscoroutine(result) else result

        return timed_in_task if in_tasks else timed

    def begin(self, request: object) -> None:
        """Work for the item whose payload is *request*, from here on, in this task or thread."""
        current.set(None)  # Not the last one's, whatever goes wrong below.
        with guarded():
            if item := self.next_item(request):
                current.set(item.timeline)
                item.taken_up()

    def next_item(self, request: object) -> Item | None:
        """Find the first item with that payload which has not been decoded.

        By identity: equal payloads of two requests are two objects, and where they are not
        (None, small numbers) the order of the queue holds.
        """
        for item in self._items.values():
            if not item.decoded and item.payload is request:
                item.decoded = True
                return item
        return None

    def joining(self, add_request: Callable[..., Any]) -> Callable[..., Any]:
        """Time `add_request` of continuous batching: from there on a request is in the model."""

        @functools.wraps(add_request)
        def timed(request_id: str, *args: Any, **kwargs: Any) -> Any:
            with _for(self._in_model(request_id)):
                return add_request(request_id, *args, **kwargs)

        return timed

    def _in_model(self, request_id: str) -> Item | None:
        with guarded():
            if item := self._items.get(request_id):
                item.taken_up()
                item.open(_INFERENCE)
                return item
        return None

    def sent(self, message: Any) -> Any:
        """Note that *message* is about to go back; the last one for a request ends the work."""
        with guarded():
            request_id, (data, status, kind, *rest) = message
            streaming = getattr(kind, "name", "") == "STREAMING"
            if status in ("ERROR", "FINISH_STREAMING") or (status == "OK" and not streaming):
                self.end(request_id, failed=status == "ERROR")
            return str(request_id), (data, status, kind, *rest)
        return message

    def end(self, request_id: str, *, failed: bool) -> None:
        """End the work for one request."""
        if item := self._items.pop(request_id, None):
            item.end(failed=failed)
            if current.get() is item.timeline:
                current.set(None)


class BatchedWork(Work):
    """The requests in this worker, in batches.

    Each is charged its own decoding and encoding; while others are decoded it waits for the
    batch (`batch.wait`), while others are encoded it is in `postprocess`, for all replies leave
    together.
    """

    def __init__(self, model: str) -> None:
        super().__init__()
        self._model = model
        self._next_batch()

    def _next_batch(self) -> None:
        self._batch = batch(self._model)  # The worker is free from now on.
        self._members: list[Item] = []
        self._encoded: Iterator[Item] = iter(())

    def time(self, lit_api: Any) -> None:
        """Replace the LitAPI's methods by timed ones."""
        lit_api.decode_request = self._decoding(lit_api.decode_request)
        lit_api.batch = self._collating(lit_api.batch)
        lit_api.predict = self._predicting(lit_api.predict, bool(lit_api.stream))
        if not lit_api.stream:
            lit_api.encode_response = self._encoding(lit_api.encode_response)

    def take(self, request_id: str, payload: object) -> Item:
        """Take up a request for the next batch."""
        if self._members:  # A loop that sent no last reply for one of them.
            self._next_batch()
        return super().take(request_id, payload)

    def _form(self) -> None:
        """Take in what has been taken from the queue; the first call of a batch does."""
        with guarded():
            if self._members:
                return
            self._members = list(self._items.values())
            for item in self._members:
                self._batch.add(item.ticket)
                item.ticket = None  # It is the batch's now.

    def _decoding(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(decode)
        def timed(request: Any, *args: Any, **kwargs: Any) -> Any:
            self._form()
            with self._failing(), _for(self._decoded(request)), stage("preprocess.parse"):
                return decode(request, *args, **kwargs)

        return timed

    def _decoded(self, request: object) -> Item | None:
        with guarded():
            return self.next_item(request)
        return None

    def _collating(self, collate: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collate)
        def timed(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._form()
            with self._batch.collate():
                return collate(inputs, *args, **kwargs)

        return timed

    def _predicting(self, predict: Callable[..., Any], stream: bool) -> Callable[..., Any]:
        @functools.wraps(predict)
        def timed(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._form()
            with self._batch.inference():
                outputs = predict(inputs, *args, **kwargs)
            self._predicted()
            return outputs

        @functools.wraps(predict)
        def timed_stream(inputs: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
            self._form()
            with self._batch.inference():
                yield from predict(inputs, *args, **kwargs)
            self._predicted()

        return timed_stream if stream else timed

    def _predicted(self) -> None:
        with guarded():
            for item in self._members:
                item.open(_POSTPROCESS)
            self._encoded = iter(self._members)

    def _encoding(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(encode)
        def timed(output: Any, *args: Any, **kwargs: Any) -> Any:
            with _for(next(self._encoded, None)), stage("postprocess.serialize"):
                return encode(output, *args, **kwargs)

        return timed

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._batch.fail(type(error))
            raise

    def end(self, request_id: str, *, failed: bool) -> None:
        """End the work for one request, and with the last one of a batch that of the batch."""
        super().end(request_id, failed=failed)
        if not self._items:
            self._batch.done()
            self._next_batch()


@contextmanager
def _for(item: Item | None) -> Iterator[None]:
    """Work for *item* inside the block."""
    token = current.set(item.timeline if item else None)
    try:
        yield
    finally:
        current.reset(token)


def _staged(name: str, function: Callable[..., Any], relayed: bool) -> Callable[..., Any]:
    """Charge *function* to stage *name*, and where *relayed* the generator that it returns too."""
    timed = stage(name)(function)
    if not relayed or inspect.isgeneratorfunction(function) or _is_async(function):
        return timed

    @functools.wraps(function)
    def returning(*args: Any, **kwargs: Any) -> Any:
        outputs = timed(*args, **kwargs)
        return stage(name)(_relay)(outputs) if inspect.isgenerator(outputs) else outputs

    return returning


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _relay(outputs: Iterator[Any]) -> Iterator[Any]:
    yield from outputs
