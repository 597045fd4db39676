"""A real TorchServe: each request by its own trace, with its own stages and its own waiting."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from stagescope.records import RequestRecord, State, last_stage
from stagescope.testing import wait_until
from tests.support.torchserve import BATCH_SIZE, Answer, TorchServe, serving

HANDLER = Path(__file__).parent / "sleepy_handler.py"

pytestmark = [pytest.mark.server, pytest.mark.timeout(240)]

SLEPT_MS = {"preprocess": 60, "inference": 120, "postprocess": 30}
"""What the handler sleeps in each stage."""
SLACK_MS = 100
"""How much longer a sleep may take on a busy machine."""
TRANSFER_MS = 500
"""How much more than the record's duration a client may see on a busy machine."""


@pytest.fixture(params=["mixin", "run"])
def server(
    request: pytest.FixtureRequest, server_python: Path, server_environment: dict[str, str]
) -> Iterator[TorchServe]:
    """Yield a server timed by one line in its handler, and one timed by no line at all."""
    how = str(request.param)
    with serving(server_python, server_environment, HANDLER, mixin=how == "mixin") as running:
        yield running


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a test: what it carried, what came back, and when."""

    trace_id: str
    span_id: str
    run_id: str
    answer: Answer
    latency_ms: float


def ask(server: TorchServe, word: str, *, header: str = "traceparent", run_id: str = "") -> Asked:
    """Send one request with a trace of its own."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    headers = {header: f"00-{trace_id}-{span_id}-01"}
    if run_id:
        headers["Baggage"] = f"stagescope.run={run_id}"
    begun = time.monotonic()
    answer = server.ask(word, headers)
    return Asked(trace_id, span_id, run_id, answer, (time.monotonic() - begun) * 1e3)


def ask_together(server: TorchServe, words: Sequence[str], run_id: str = "") -> list[Asked]:
    """Send requests at once; every other one as k6 does, with a capital in the header's name."""
    with ThreadPoolExecutor(len(words)) as pool:
        return [
            future.result()
            for future in [
                pool.submit(
                    ask, server, word, header=("traceparent", "Traceparent")[number % 2],
                    run_id=run_id,
                )
                for number, word in enumerate(words)
            ]
        ]  # fmt: skip


def recorded(server: TorchServe, asked: Sequence[Asked]) -> list[RequestRecord]:
    """Wait for the records of what was asked; give them in that order."""
    traces = [one.trace_id for one in asked]
    wait_until(lambda: set(traces) <= server.requests().keys(), timeout_s=15)
    requests = server.requests()
    return [requests[trace] for trace in traces]


def waited_ns(record: RequestRecord) -> int:
    """Return how long a request waited until its batch was closed."""
    spent = record.self_ns()
    return spent.get("queue.batch", 0) + spent.get("batch.wait", 0)


def logged_ns(server: TorchServe, job_id: str) -> int:
    """Return what TorchServe's own log says that a request waited."""
    found = re.search(
        rf"(W-\d+)\S* \S+ - Sending response for jobId {job_id}\n"
        r"(?:.*\n)*?.* \1\S* \S+ - Waiting time ns: (\d+),",
        server.log_text(),
    )
    assert found, f"job {job_id} is not in the log"
    return int(found[2])


def test_each_request_has_its_own(server: TorchServe) -> None:
    """Ten requests at once, more than two batches: stages, waiting, links and ids are each its own."""
    words = [f"word{number}" for number in range(10)]
    asked = ask_together(server, words, run_id="run-1")
    records = recorded(server, asked)
    batches = {batch.batch_id: batch for batch in server.batches()}

    for word, one, record in zip(words, asked, records, strict=True):
        answer = json.loads(one.answer.body)
        assert (one.answer.status, answer["word"]) == (200, word)
        assert (record.state, record.status, record.error) == (State.FINISHED, 200, "")
        assert (record.parent_span_id, record.run_id) == (one.span_id, "run-1")
        assert record.route == record.path == "/predictions/sleepy"

        spent = record.self_ns()
        for stage, slept_ms in SLEPT_MS.items():
            assert slept_ms <= spent[stage] / 1e6 <= slept_ms + SLACK_MS, (stage, spent)
        assert sum(spent.values()) == record.duration_ns
        assert 0 <= one.latency_ms - record.duration_ns / 1e6 <= TRANSFER_MS

        # TorchServe's own figure for this very request, to the nanosecond.
        assert waited_ns(record) == logged_ns(server, one.answer.headers["x-request-id"])

        (batch_id,) = record.batch_ids
        batch = batches[batch_id]
        assert batch.size == answer["size"] <= BATCH_SIZE
        assert (record.trace_id, record.span_id) in [
            (member.trace_id, member.span_id) for member in batch.members
        ]
        timing = one.answer.headers["server-timing"]
        assert all(f"{stage};dur=" in timing for stage in SLEPT_MS), timing

    assert sum(batch.size for batch in batches.values()) == len(records)
    assert max(batch.size for batch in batches.values()) > 1
    for batch in batches.values():
        assert (batch.model, batch.run_id, batch.state) == ("sleepy", "run-1", State.FINISHED)
        assert [span.stage for span in batch.stages if span.stage in SLEPT_MS] == list(SLEPT_MS)
    # With one worker and more than one batch somebody waited for a whole batch of others.
    assert max(record.self_ns().get("queue.batch", 0) for record in records) / 1e6 > 100


def test_two_workers_share_one_queue(server: TorchServe) -> None:
    """Each worker finds its own requests' waiting in the log that both are in."""
    pids = server.scale(2)
    asked = ask_together(server, [f"word{number}" for number in range(16)])
    records = recorded(server, asked)
    assert {record.process.pid for record in records} == set(pids)
    for one, record in zip(asked, records, strict=True):
        assert waited_ns(record) == logged_ns(server, one.answer.headers["x-request-id"])
    for batch in server.batches():
        members = {member.trace_id for member in batch.members}
        linked = {record.trace_id for record in records if batch.batch_id in record.batch_ids}
        assert members == linked
        assert {r.process.pid for r in records if r.trace_id in members} == {batch.process.pid}


def test_users_error_is_the_users(server: TorchServe) -> None:
    """A handler that raises in preprocess answers as ever, and its stage is marked failed."""
    (asked,) = ask_together(server, ["raise"])
    (record,) = recorded(server, [asked])
    assert (asked.answer.status, record.status, record.error) == (503, 503, "LookupError")
    failed = [span.stage for span in record.stages if span.failed]
    assert failed == ["preprocess"]
    assert "inference" not in record.self_ns()
    assert waited_ns(record) > 0
    (batch,) = server.batches()
    assert (batch.error, [span.stage for span in batch.stages if span.failed]) == (
        "LookupError", ["preprocess"],
    )  # fmt: skip
    assert "LookupError: the test asked for it" in server.log_text()

    (asked,) = ask_together(server, ["after"])
    (record,) = recorded(server, [asked])
    assert (record.status, record.error) == (200, "")


def test_waiting_in_a_failed_batch_is_by_request(server: TorchServe) -> None:
    """The log names no job where a batch failed: each member still gets its own waiting."""
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(ask, server, "raise")
        time.sleep(0.05)
        second = pool.submit(ask, server, "two")
        time.sleep(0.05)
        third = pool.submit(ask, server, "three")
        asked = [first.result(), second.result(), third.result()]
    records = recorded(server, asked)
    assert {record.batch_ids for record in records} == {records[0].batch_ids}
    waits = [waited_ns(record) for record in records]
    logged = re.findall(r"Waiting time ns: (\d+), Inference time", server.log_text())
    assert set(waits) == set(map(int, logged))
    assert waits[0] > waits[1] > waits[2]


def test_died_worker_leaves_what_it_died_in(server: TorchServe) -> None:
    """A worker killed in the model: its batch and both members are reported, in `inference`."""
    pid = server.wait_ready()
    asked = ask_together(server, ["die", "with it"])
    assert {one.answer.status for one in asked} <= {500, 503, 507}
    died = [record for record in recorded(server, asked) if record.state is State.DIED]
    batches = [batch for batch in server.batches() if batch.state is State.DIED]
    assert {record.batch_ids for record in died} == {(batch.batch_id,) for batch in batches}
    assert len(died) == 2
    for record in died:
        assert (last_stage(record), record.process.pid) == ("inference", pid)
        assert record.status == 0
    for batch in batches:
        assert [span.stage for span in batch.stages if span.open] == ["inference"]

    assert server.wait_ready() != pid
    (after,) = ask_together(server, ["after"])
    (record,) = recorded(server, [after])
    assert record.status == 200
    assert record.process.pid != pid
