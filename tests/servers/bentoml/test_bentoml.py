"""Real BentoML: two services in processes of their own, adaptive batches, calls between them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from stagescope.records import BatchRecord, RequestRecord, State, last_stage
from stagescope.testing import wait_until
from stagescope.testing.spool import Spool
from tests.support.server_processes import (
    ask,
    ask_at_once,
    end_processes_with,
    free_port,
    port_is_free,
    stages_ms,
)

pytestmark = pytest.mark.server

FOLDER = Path(__file__).parent
SLACK_MS = 30.0
"""How much longer than asked for a stage may last on a busy machine; it is never shorter."""


@pytest.fixture
def environment(server_environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Return the server's environment, with nobody but the test to read what it records."""
    return server_environment | {
        "STAGESCOPE_AGENT": "off",
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(tmp_path / "bentoml"),
    }


@pytest.fixture
def spool(environment: dict[str, str]) -> Iterator[Spool]:
    """Read the recorder files of the test's server."""
    spool = Spool(Path(environment["STAGESCOPE_SPOOL"]))
    yield spool
    spool.close()


@contextmanager
def served(python: Path, environment: dict[str, str], before: Sequence[str] = ()) -> Iterator[int]:
    """Serve both services, started by the command *before* if there is one; give the port."""
    port = free_port()
    output = Path(environment["STAGESCOPE_SPOOL"]).parent / "output.txt"
    serve = ["-m", "bentoml", "serve", "service:Outer", "--host", "127.0.0.1", "--port", str(port)]
    with output.open("wb") as log:
        process = subprocess.Popen(
            [*before, str(python), *serve],
            cwd=FOLDER, env=environment, start_new_session=True, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_until(lambda: _answers(port) or process.poll() is not None, 60)
        assert process.poll() is None, output.read_text()
        yield port
    finally:
        end_processes_with("STAGESCOPE_SPOOL", environment["STAGESCOPE_SPOOL"])
        process.wait()
    wait_until(lambda: port_is_free(port))
    assert "stagescope: a fault" not in output.read_text(), output.read_text()


def _answers(port: int) -> bool:
    try:
        return ask(port, "/nested", {"wanted": wanted(0)}, timeout_s=10)[0] == 200
    except OSError:
        return False


def wanted(number: int, **more: Any) -> dict[str, Any]:
    """Return a request whose stages tell it from the others."""
    return {"decode": 0.03 + 0.03 * number, "predict": 0.05 + 0.04 * number} | more


def traces(count: int, first: int = 1) -> list[str]:
    """Return distinct trace ids."""
    return [f"{first + number:016x}" * 2 for number in range(count)]


def close(found_ms: float, asked_s: float) -> bool:
    """Return whether a stage lasted as long as asked for."""
    return asked_s * 1e3 - 1 <= found_ms <= asked_s * 1e3 + SLACK_MS


def test_each_request_has_its_own_stages(
    server_python: Path, environment: dict[str, str], spool: Spool
) -> None:
    """At once, on one thread: each has its own time in the function, the user's own stage apart,
    and waits for the thread; parsing and serialising are there."""
    asked = {trace: wanted(number) for number, trace in enumerate(traces(4))}
    with served(server_python, environment) as port:
        bodies = {trace: {"wanted": request} for trace, request in asked.items()}
        answers = ask_at_once(port, "/plain", bodies)
        assert [status for status, _ in answers.values()] == [200] * 4
        found = spool.requests(*asked)

    for trace, request in asked.items():
        (record,) = found[trace]
        spent = stages_ms(record)
        assert close(spent["preprocess"], request["decode"]), spent
        assert close(spent["inference"], request["predict"]), spent
        assert {"preprocess.parse", "postprocess.serialize"} <= spent.keys()
        assert sum(spent.values()) == pytest.approx(record.duration_ns / 1e6)
        assert record.parent_span_id == trace[:16]
    waits = sorted(stages_ms(one)["queue.threadpool"] for (one,) in found.values())
    assert waits[-1] > sum(sum(request.values()) for request in asked.values()) * 1e3 / 2


def test_batches_charge_their_own_members(
    server_python: Path, environment: dict[str, str], spool: Spool
) -> None:
    """Wave after wave, whoever was first of all: each request is in one batch, which links to it
    and it alone to that; members have the time of their batch's model, and of no other."""
    waves = [traces(4, first) for first in (1, 11, 21)]
    asked: dict[str, dict[str, Any]] = {}
    with served(server_python, environment) as port:
        for wave in waves:
            asked |= {trace: wanted(number) for number, trace in enumerate(wave)}
            bodies = {trace: {"wanted": [asked[trace]]} for trace in wave}
            answers = ask_at_once(port, "/batched", bodies)
            assert [status for status, _ in answers.values()] == [200] * 4
        found = spool.requests(*asked)
        batches = spool.batches(*asked)

    assert sum(batch.size for batch in batches) == 12
    for trace in asked:
        (record,) = found[trace]
        (mine,) = [batch for batch in batches if batch.batch_id in record.batch_ids]
        assert record.span_id in {member.span_id for member in mine.members}
        slowest = max(asked[member.trace_id]["predict"] for member in mine.members)
        spent = stages_ms(record)
        assert close(spent["inference"], slowest), spent
        assert mine.model == "Outer.batched"
        assert mine.trace_id not in asked
        # Before its batch began it was in the queue.
        waited = (mine.start_ns - record.start_ns) / 1e6
        assert spent.get("queue.batch", 0) == pytest.approx(max(waited, 0), abs=SLACK_MS)


def test_a_call_to_another_service_names_its_caller(
    server_python: Path, environment: dict[str, str], spool: Spool
) -> None:
    """The other process's record is in the same trace, and its parent is the caller's record."""
    asked = {trace: wanted(number) for number, trace in enumerate(traces(3))}
    with served(server_python, environment) as port:
        bodies = {trace: {"wanted": request} for trace, request in asked.items()}
        ask_at_once(port, "/nested", bodies)
        wait_until(lambda: all(len(one) == 2 for one in spool.requests(*asked).values()))
        found = spool.requests(*asked)

    for trace, request in asked.items():
        outer, inner = found[trace]
        assert outer.parent_span_id == trace[:16]
        assert inner.parent_span_id == outer.span_id
        assert inner.process.pid != outer.process.pid
        assert close(stages_ms(inner)["inference"], request["predict"])
        assert stages_ms(outer)["inference"] >= request["predict"] * 1e3


@pytest.mark.parametrize("path", ["/stream", "/async_stream"])
def test_streams_are_in_the_model_while_they_work(
    path: str, server_python: Path, environment: dict[str, str], spool: Spool
) -> None:
    """The steps of a generator are `inference`, not `respond`."""
    (trace,) = traces(1)
    with served(server_python, environment) as port:
        assert ask(port, path, {"wanted": wanted(2)}, trace) == (200, b"chunk\n" * 3)
        (record,) = spool.requests(trace)[trace]
    assert close(stages_ms(record)["inference"], wanted(2)["predict"]), stages_ms(record)
    assert record.chunks >= 3


@pytest.mark.parametrize("path", ["/plain", "/batched"])
def test_an_error_is_the_users_with_its_stage_failed(
    path: str, server_python: Path, environment: dict[str, str], spool: Spool
) -> None:
    """BentoML answers 500 as ever, `inference` is failed, and the next one is served."""
    bad, good = traces(2)
    requests = {bad: wanted(0, fail=True), good: wanted(0)}
    with served(server_python, environment) as port:
        for trace, status in ((bad, 500), (good, 200)):
            body = requests[trace] if path == "/plain" else [requests[trace]]
            assert ask(port, path, {"wanted": body}, trace)[0] == status
        found = spool.requests(bad, good)
        errors = [one.error for one in spool.batches(bad)] if path == "/batched" else ["Failed"]
    assert errors == ["Failed"]
    (record,) = found[bad]
    assert [span.stage for span in record.stages if span.failed] == ["inference"]
    (record,) = found[good]
    assert not [span for span in record.stages if span.failed]


def test_a_process_that_dies_in_the_model_leaves_its_batch_there(
    server_python: Path, environment: dict[str, str], spool: Spool
) -> None:
    """The batch and its member are reported with the stage in which the process died."""
    (trace,) = traces(1)
    with served(server_python, environment) as port:
        body = {"wanted": [wanted(0, die=True)]}
        asking = threading.Thread(target=_ask_the_dying, args=(port, body, trace))
        asking.start()
        (batch,) = wait_until(lambda: _died(spool, BatchRecord), 30)
        (request,) = wait_until(lambda: _died(spool, RequestRecord), 10)
        asking.join()
    assert isinstance(batch, BatchRecord)
    assert [member.trace_id for member in batch.members] == [trace]
    assert [span.stage for span in batch.stages if span.open] == ["inference"]
    assert isinstance(request, RequestRecord)
    assert request.trace_id == trace
    assert last_stage(request) == "inference"
    assert request.batch_ids == (batch.batch_id,)


def _ask_the_dying(port: int, body: dict[str, Any], trace: str) -> None:
    with suppress(OSError, ConnectionError):
        ask(port, "/batched", body, trace)


def _died(spool: Spool, kind: type[Any]) -> list[Any]:
    return [one for one in spool.records() if isinstance(one, kind) and one.state is State.DIED]


def test_without_a_line_of_code(
    server_python: Path, environment: dict[str, str], spool: Spool
) -> None:
    """Under `stagescope run` services that do not install the hook have the same stages."""
    (trace,) = traces(1)
    started = [sys.executable, "-m", "stagescope", "run", "--no-agent", "--"]
    with served(server_python, environment | {"BY_HAND": "no"}, started) as port:
        assert ask(port, "/batched", {"wanted": [wanted(1)]}, trace)[0] == 200
        (record,) = spool.requests(trace)[trace]
        (batch,) = spool.batches(trace)
    assert close(stages_ms(record)["inference"], wanted(1)["predict"])
    assert record.batch_ids == (batch.batch_id,)


def test_switched_off(server_python: Path, environment: dict[str, str], spool: Spool) -> None:
    """With STAGESCOPE_DISABLE=1 the services serve, and nothing is recorded."""
    with served(server_python, environment | {"STAGESCOPE_DISABLE": "1"}) as port:
        assert ask(port, "/batched", {"wanted": [wanted(0)]})[0] == 200
    assert spool.records() == []
