"""Ray Serve, real: a cluster of its own, FastAPI ingress, a batching model, a method without batches."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stagescope.records import RequestRecord, State
from stagescope.testing import wait_until
from stagescope.testing.spool import Spool
from tests.support.server_processes import (
    ask,
    ask_at_once,
    end_processes_with,
    free_port,
    port_is_free,
    processes_with,
    stages_ms,
)

pytestmark = [pytest.mark.server, pytest.mark.timeout(240)]

ROOT = Path(__file__).parent.parent.parent.parent
SLACK_MS = 60
"""What scheduling on a busy machine may add to a sleep."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A served application, and what it records."""

    port: int
    spool: Spool

    def one(self, trace_id: str) -> RequestRecord:
        """Return the one record of a trace."""
        (record,) = self.spool.requests(trace_id)[trace_id]
        return record


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> None:
    """A server starts its workers when it likes; its own fixture looks for what is left of it."""


@pytest.fixture(scope="module")
def cluster(server_python: Path) -> Iterator[Cluster]:
    """Serve the application; afterwards nothing of it runs, and its port is free."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        port, spool = free_port(), str(Path(folder) / "spool")
        environment = os.environ | {
            "HOME": folder,
            "PYTHONPATH": str(ROOT / "src"),
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "STAGESCOPE_AGENT": "off",
            "STAGESCOPE_RAISE": "1",
            "STAGESCOPE_SPOOL": spool,
        }
        with subprocess.Popen(
            [server_python, Path(__file__).with_name("serving.py"), str(port)],
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as server:  # fmt: skip
            records = Spool(Path(spool))
            try:
                assert server.stdout is not None
                assert any(line.startswith("serving") for line in server.stdout)
                warm(port, records)
                yield Cluster(port, records)
            finally:
                records.close()
                server.communicate(timeout=60)
                end_processes_with("STAGESCOPE_SPOOL", spool)
        assert not processes_with("STAGESCOPE_SPOOL", spool)
        assert port_is_free(port)


def warm(port: int, records: Spool) -> None:
    """Let each replica serve once: the first call of a handle takes long."""
    for trace_id, which in zip(traces("warm", 2), ("model", "plain"), strict=True):
        assert ask(port, f"/{which}", {"name": "first"}, trace_id)[0] == 200
        records.requests(trace_id)


def traces(word: str, many: int) -> list[str]:
    """Return trace ids that say where they come from."""
    return [word.encode().hex().ljust(16, "0") + f"{number + 1:016x}" for number in range(many)]


def near(found_ms: float, wanted_ms: float) -> bool:
    """Return whether a stage took its sleep, and not much more."""
    return wanted_ms - 2 <= found_ms <= wanted_ms + SLACK_MS


def test_members_of_batches_keep_their_own_stages(cluster: Cluster) -> None:
    """Eight requests at once, distinct traces: each has its answer, its stages, its batch's link."""
    ids = traces("batched", 8)
    answers = ask_at_once(cluster.port, "/model", {key: {"name": key} for key in ids})

    assert {key: body for key, (_, body) in answers.items()} == {
        key: f'"{key}"'.encode() for key in ids
    }
    batches = cluster.spool.batches(*ids)
    members = [member.trace_id for batch in batches for member in batch.members]
    assert sorted(members) == sorted(ids)
    assert max(batch.size for batch in batches) > 1
    for key in ids:
        record = cluster.one(key)
        spent = stages_ms(record)
        assert near(spent["inference"], 60), spent
        assert near(spent["preprocess"], 20), spent
        assert near(spent["preprocess.tokens"], 10), spent
        assert near(spent["postprocess"], 10), spent
        assert spent.get("queue.batch", 0) + spent.get("batch.wait", 0) > 0, spent
        assert record.route == "/{which}"
        assert record.parent_span_id == key[:16]
        assert sum(record.self_ns().values()) == record.duration_ns
        (batch,) = [one for one in batches if one.batch_id in record.batch_ids]
        assert key in {member.trace_id for member in batch.members}
    for batch in batches:
        assert batch.model == "Model.predict"
        assert [span.stage for span in batch.stages] == ["batch.wait", "inference", "preprocess"]


def test_a_batch_that_waits_for_its_turn_is_charged_to_the_queue(cluster: Cluster) -> None:
    """With eight requests and batches of four the second batch waits in `queue.batch`."""
    ids = traces("turns", 8)
    ask_at_once(cluster.port, "/model", {key: {"name": key} for key in ids})

    first, *_, last = sorted(cluster.spool.batches(*ids), key=lambda one: one.start_ns)
    assert last.start_ns >= first.start_ns + first.duration_ns
    waited = [
        stages_ms(cluster.one(member.trace_id)).get("queue.batch", 0) for member in last.members
    ]
    assert max(waited) > 20, waited


def test_calls_without_batches_and_the_wait_for_a_replica(cluster: Cluster) -> None:
    """A replica that takes one at a time: each has its own 80 ms, the later ones waited in `queue`."""
    ids = traces("plain", 3)
    answers = ask_at_once(cluster.port, "/plain", {key: {"name": key} for key in ids})

    assert all(status == 200 for status, _ in answers.values())
    spent = sorted((stages_ms(cluster.one(key)) for key in ids), key=lambda one: one["queue"])
    for one in spent:
        assert near(one["preprocess"], 30), one
        assert near(one["inference.Plain"], 50), one
    assert spent[1]["queue"] > 70
    assert spent[2]["queue"] > 140


def test_the_time_before_the_replica_is_in_the_record(cluster: Cluster) -> None:
    """The record begins when the proxy took the request: the way to the replica is `queue.ingress`."""
    (key,) = traces("ingress", 1)
    ask(cluster.port, "/plain", {"name": "x"}, key)

    first = cluster.one(key).stages[0]
    assert first.stage == "queue.ingress"
    assert first.start_ns == 0
    assert first.end_ns > 0


def test_a_call_of_a_call_is_a_record_of_its_own_under_its_caller(cluster: Cluster) -> None:
    """A lent timeline is not lent on: the third process writes a record with the right parent."""
    (key,) = traces("chain", 1)
    assert ask(cluster.port, "/plain", {"name": "x", "chain": "1"}, key)[0] == 200

    wait_until(lambda: len(cluster.spool.requests(key)[key]) == 2)
    outer, inner = cluster.spool.requests(key)[key]
    assert inner.parent_span_id == outer.span_id
    assert (inner.method, inner.path) == ("CALL", "/default/Model/__call__")
    assert near(stages_ms(inner)["inference"], 60)
    (batch,) = cluster.spool.batches(key)
    assert batch.batch_id in inner.batch_ids


@pytest.mark.parametrize(("which", "stage"), [("model", "inference"), ("plain", "inference.Plain")])
def test_an_error_of_the_users_stays_the_users(cluster: Cluster, which: str, stage: str) -> None:
    """The client gets Ray's own 500, and the record names the error and the stage that failed."""
    (key,) = traces(f"err{which}", 1)
    status, _ = ask(cluster.port, f"/{which}", {"name": "x", "fail": "1"}, key)

    record = cluster.one(key)
    assert status == record.status == 500
    assert "ArithmeticError" in record.error
    assert stage in [span.stage for span in record.stages if span.failed]


def test_a_replica_killed_in_the_model(cluster: Cluster) -> None:
    """Its batch and both members are reported, with the stage in which it died."""
    ids = traces("killed", 2)
    answers = ask_at_once(cluster.port, "/model", {key: {"name": key, "die": "1"} for key in ids})

    assert {status for status, _ in answers.values()} == {500}
    batches = cluster.spool.batches(*ids)
    assert {batch.state for batch in batches} == {State.DIED}
    for batch in batches:
        assert "inference" in [span.stage for span in batch.stages if span.open]
    for key in ids:
        record = cluster.one(key)
        assert "inference" in [span.stage for span in record.stages if span.open]
        assert record.error == "ActorDiedError"
