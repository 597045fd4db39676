"""LitServe's worker without LitServe: whatever function of ours raises, its loop goes on as before."""

from __future__ import annotations

import asyncio
import inspect
import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stagescope.middleware.hooks.litserve import worker
from stagescope.middleware.hooks.litserve.worker import BatchedWork, TakingQueue, Work
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.timeline import current
from stagescope.middleware.remote import carried
from stagescope.testing.recording import Recording
from tests.support.planted_faults import Functions, targets

FILE = Path(worker.__file__).resolve()
REQUESTS = 4
OK = SimpleNamespace(name="REGULAR")
PASSES = {
    "TakingQueue.get", "TakingQueue.get_nowait", "TakingQueue.__getattr__", "_staged.returning",
    "Work.decoding.timed", "Work.decoding.timed_in_task", "Work.joining.timed", "_for", "_relay",
    "BatchedWork._decoding.timed", "BatchedWork._collating.timed", "BatchedWork._encoding.timed",
    "BatchedWork._predicting.timed", "BatchedWork._failing",
}  # fmt: skip
"""Hand the call on to LitServe or the LitAPI, and guard all else that they do."""
GUARDS = {
    "Work.taken", "Work.begin", "Work._in_model", "Work.sent", "BatchedWork._form",
    "BatchedWork._decoded", "BatchedWork._predicted",
}  # fmt: skip
"""Are called by those, and do all that they do below a guard."""


class Api:
    """As much of a LitAPI as the hook asks for."""

    stream = enable_async = False

    def decode_request(self, request: Any, **_: Any) -> Any:
        """Return the number in it."""
        return request["number"]

    def batch(self, inputs: list[int]) -> list[int]:
        """Leave them as they are."""
        return inputs

    def predict(self, inputs: Any) -> Any:
        """Double one or all; 3 fails."""
        if inputs == 3:
            raise ValueError("three")
        return [2 * one for one in inputs] if isinstance(inputs, list) else 2 * inputs

    def encode_response(self, output: Any, **_: Any) -> Any:
        """Return it as an answer."""
        return {"answer": output}


def one_by_one(api: Any, requests: Any, send: Callable[[Any], None]) -> None:
    """Do what LitServe's loop for single requests does."""
    for _ in range(REQUESTS):
        _, request_id, _, payload = requests.get()
        try:
            answer = api.encode_response(api.predict(api.decode_request(payload)))
            send((request_id, (answer, "OK", OK)))
        except ValueError as error:
            send((request_id, (str(error), "ERROR", OK)))


def in_tasks(api: Any, requests: Any, send: Callable[[Any], None]) -> None:
    """Do what LitServe's loop for an asynchronous LitAPI does: a task a request."""

    async def answered(request_id: str, payload: Any) -> None:
        decoded = api.decode_request(payload)
        decoded = await decoded if inspect.isawaitable(decoded) else decoded
        send((request_id, (api.encode_response(api.predict(decoded % 3)), "OK", OK)))

    async def all_of_them() -> None:
        taken = [requests.get_nowait() for _ in range(REQUESTS)]
        await asyncio.gather(*(answered(one[1], one[3]) for one in taken))

    asyncio.run(all_of_them())


def in_batches(api: Any, requests: Any, send: Callable[[Any], None]) -> None:
    """Do what LitServe's loop for batches does: take, decode, collate, predict, encode, send."""
    for _ in range(REQUESTS // 2):
        taken = [requests.get() for _ in range(2)]
        outputs = api.predict(api.batch([api.decode_request(one[3]) for one in taken]))
        for one, output in zip(taken, outputs, strict=True):
            send((one[1], (api.encode_response(output), "OK", OK)))


def joined(api: Any, requests: Any, send: Callable[[Any], None]) -> None:
    """Do what LitServe's loop for continuous batching does: requests join, and go one by one."""
    for _ in range(REQUESTS):
        _, request_id, _, payload = requests.get()
        api.add_request(request_id, api.decode_request(payload))
        send((request_id, (api.encode_response(api.predict(payload["number"] % 3)), "OK", OK)))


Loop = Callable[[Any, Any, Callable[[Any], None]], None]
LOOPS: tuple[Loop, ...] = (one_by_one, in_tasks, in_batches, joined)


def answers(loop: Loop, recording: Recording | None) -> list[Any]:
    """Let *loop* answer all requests; with our hook where there is a recording to write to.

    Return the answers by their request, for tasks may end in any order, and what was added.
    """
    api: Any = Api()
    api.enable_async = loop is in_tasks
    api.added = []
    api.add_request = lambda request_id, payload: api.added.append((str(request_id), payload))
    requests: Any = queue.Queue()
    sent: list[Any] = []
    take_from, send = requests, sent.append
    with guarded():  # As `inference_worker` does.
        if recording:
            work = BatchedWork("model") if loop is in_batches else Work()
            work.time(api)
            if loop is joined:
                api.add_request = work.joining(api.add_request)
            take_from = TakingQueue(requests, work)
            send = lambda item: sent.append(work.sent(item))
    with ExitStack() as serving:
        for number in range(REQUESTS):
            request_id = f"id-{number}"
            if recording:
                serving.enter_context(recording.request())
                request_id = carried(request_id)
            requests.put((0, request_id, 0.0, {"number": number}))
        current.set(None)
        loop(api, take_from, send)
    return [sorted(((str(name), *rest) for name, rest in sent), key=itemgetter(0)), api.added]


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Recording]]:
    """Make a recorder for each try, with room for its requests alone."""
    made: list[Recording] = []

    def make() -> Recording:
        made.append(Recording(tmp_path, in_flight_slots=4 * REQUESTS))
        monkeypatch.setattr(worker, "recorder_beside", lambda carrier: made[-1].recorder)
        return made[-1]

    monkeypatch.delenv("STAGESCOPE_RAISE", raising=False)
    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_whatever_raises_the_worker_answers_as_without_us(
    loop: Loop, recording: Callable[[], Recording]
) -> None:
    """Each function of the hook, at every call; what is left out hands on or is the guard's place."""
    want = answers(loop, None)
    whole = recording()
    assert answers(loop, whole) == want
    assert {span.stage for record in whole.requests for span in record.stages} > {
        "preprocess.parse"
    }

    functions = Functions([FILE])
    wrong, hit = [], set()
    for target in targets(FILE.parent, [FILE]):
        name = target.name.partition(":")[2]
        if name in PASSES | GUARDS or "<lambda>" in name:
            continue
        hits: list[str] = []
        undo = functions.plant(target, lambda hits=hits, name=name: not hits.append(name))  # type: ignore[misc]
        try:
            found = answers(loop, recording())
        except Exception as error:  # noqa: BLE001 - told as it is
            found = [f"{type(error).__name__}: {error}"]
        finally:
            undo()
        hit |= set(hits)
        if found != want:
            wrong.append((name, found))
    assert wrong == []
    assert len(hit) > 2
