"""Real LitServe: API server, queue and spawned worker; every request has its own stages."""

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

SERVER = Path(__file__).parent / "server.py"
ENCODE_MS = 20.0
SLACK_MS = 30.0
"""How much longer than asked for a stage may last on a busy machine; it is never shorter."""


@pytest.fixture
def environment(server_environment: dict[str, str]) -> dict[str, str]:
    """Return the server's environment, with nobody but the test to read what it records."""
    return server_environment | {"STAGESCOPE_AGENT": "off"}


@pytest.fixture
def spool(environment: dict[str, str]) -> Iterator[Spool]:
    """Read the recorder files of the test's server."""
    spool = Spool(Path(environment["STAGESCOPE_SPOOL"]))
    yield spool
    spool.close()


@contextmanager
def served(
    python: Path, environment: dict[str, str], mode: str, before: Sequence[str] = ()
) -> Iterator[int]:
    """Serve *mode*, started by the command *before* if there is one; give the port."""
    port = free_port()
    output = Path(environment["STAGESCOPE_SPOOL"]).parent / "output.txt"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [*before, str(python), str(SERVER), str(port), mode],
            env=environment, start_new_session=True, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_until(lambda: _answers(port) or process.poll() is not None, 60)
        assert process.poll() is None, output.read_text()
        yield port
    finally:
        # Its API server outlives a SIGTERM to the main process, and keeps the port.
        end_processes_with("STAGESCOPE_SPOOL", environment["STAGESCOPE_SPOOL"])
        process.wait()
    wait_until(lambda: port_is_free(port))
    assert "stagescope: a fault" not in output.read_text(), output.read_text()


def _answers(port: int) -> bool:
    try:
        return ask(port, "/predict", wanted(0), timeout_s=10)[0] == 200
    except OSError:
        return False


def wanted(number: int, **more: Any) -> dict[str, Any]:
    """Return a request whose stages tell it from the others."""
    return {
        "decode": 0.03 + 0.03 * number, "predict": 0.05 + 0.04 * number, "encode": ENCODE_MS / 1e3,
    } | more  # fmt: skip


def traces(count: int) -> list[str]:
    """Return distinct trace ids."""
    return [f"{number + 1:016x}" * 2 for number in range(count)]


def close(found_ms: float, asked_s: float) -> bool:
    """Return whether a stage lasted as long as asked for."""
    return asked_s * 1e3 - 1 <= found_ms <= asked_s * 1e3 + SLACK_MS


@pytest.mark.parametrize("mode", ["plain", "async", "stream", "async-stream"])
def test_each_request_has_its_own_stages(
    mode: str, server_python: Path, environment: dict[str, str], spool: Spool
) -> None:
    """At once, one after the other in the worker or side by side: decode, predict and encode are
    those that each asked for, and what remains is waiting."""
    asked = {trace: wanted(number) for number, trace in enumerate(traces(4))}
    with served(server_python, environment, mode) as port:
        answers = ask_at_once(port, "/predict", asked)
        assert [status for status, _ in answers.values()] == [200] * 4
        found = spool.requests(*asked)

    for trace, request in asked.items():
        (record,) = found[trace]
        spent = stages_ms(record)
        assert close(spent["preprocess.parse"], request["decode"]), spent
        assert close(spent["inference"], request["predict"]), spent
        assert close(spent["postprocess.serialize"], request["encode"]), spent
        assert sum(spent.values()) == pytest.approx(record.duration_ns / 1e6)
        assert record.parent_span_id == trace[:16]
    if mode in ("plain", "stream"):
        # One at a time: the last one has waited for the three others.
        waits = sorted(stages_ms(one)["queue.batch"] for (one,) in found.values())
        total = sum(sum(request.values()) for request in asked.values()) * 1e3
        assert waits[-1] > total / 2


def test_members_of_a_batch_have_their_own_stages(
    server_python: Path, environment: dict[str, str], spool: Spool
) -> None:
    """Four at once are one batch with links to all: each has its own decoding and encoding, the
    model's time of all, and waits for the others' decoding; the next four wait in the queue."""
    asked = {trace: wanted(number, collate=0.04) for number, trace in enumerate(traces(4))}
    later = {f"{9 + number:016x}" * 2: wanted(0, collate=0.0) for number in range(4)}
    with served(server_python, environment, "batched") as port:
        answers = ask_at_once(port, "/predict", asked)
        assert [status for status, _ in answers.values()] == [200] * 4
        found = spool.requests(*asked)
        batches = spool.batches(*asked)
        ask_at_once(port, "/predict", later)
        others = spool.requests(*later)

    decoding = sum(request["decode"] for request in asked.values())
    for trace, request in asked.items():
        (record,) = found[trace]
        spent = stages_ms(record)
        (mine,) = [one for one in batches if one.batch_id in record.batch_ids]
        together = {member.trace_id for member in mine.members}
        assert {member.span_id for member in mine.members} >= {record.span_id}
        assert close(spent["preprocess.parse"], request["decode"]), spent
        assert close(spent["postprocess.serialize"], request["encode"]), spent
        assert close(spent["inference"], max(asked[one]["predict"] for one in together)), spent
        assert close(spent["batch.collate"], 0.04), spent
        if len(together) == 4:
            assert spent["batch.wait"] >= (decoding - request["decode"]) * 1e3 - 1
            assert spent["postprocess"] >= 3 * ENCODE_MS - 1
    assert sum(one.size for one in batches) == 4
    for batch in batches:
        assert batch.trace_id not in asked
        assert batch.model == "/predict"
    for (record,) in others.values():
        assert not {one.batch_id for one in batches} & set(record.batch_ids)


def test_members_of_a_streaming_batch_wait_for_all_its_steps(
    server_python: Path, environment: dict[str, str], spool: Spool
) -> None:
    """The model's time of a batch that streams lasts until its last step, for every member."""
    asked = {trace: wanted(number) for number, trace in enumerate(traces(4))}
    with served(server_python, environment, "batched-stream") as port:
        answers = ask_at_once(port, "/predict", asked)
        found = spool.requests(*asked)
        batches = spool.batches(*asked)
    assert {body for _, body in answers.values()} == {b"chunk\n" * 3}
    for trace, request in asked.items():
        (record,) = found[trace]
        (mine,) = [one for one in batches if one.batch_id in record.batch_ids]
        slowest = max(asked[member.trace_id]["predict"] for member in mine.members)
        assert close(stages_ms(record)["inference"], slowest), stages_ms(record)
        assert close(stages_ms(record)["preprocess.parse"], request["decode"]), stages_ms(record)


@pytest.mark.parametrize(
    ("step", "stage"),
    [("decode", "preprocess.parse"), ("predict", "inference"), ("encode", "postprocess.serialize")],
)
@pytest.mark.parametrize("mode", ["plain", "batched"])
def test_an_error_is_the_users_with_its_stage_failed(
    mode: str, step: str, stage: str,
    server_python: Path, environment: dict[str, str], spool: Spool,
) -> None:  # fmt: skip
    """LitServe answers 500 as ever, the stage that raised is failed, and the next one is served."""
    (bad, good) = traces(2)
    with served(server_python, environment, mode) as port:
        status, _ = ask(port, "/predict", wanted(0, fail=step), bad)
        assert status == 500
        assert ask(port, "/predict", wanted(0), good)[0] == 200
        found = spool.requests(bad, good)
        if mode == "batched":
            spool.batches(bad, good)
    (record,) = found[bad]
    assert stage in [span.stage for span in record.stages if span.failed]
    (record,) = found[good]
    assert not [span for span in record.stages if span.failed]
    if mode == "batched":
        (batch,) = spool.batches(bad)
        assert batch.error == ("Failed" if step != "encode" else "")


def test_a_worker_that_dies_in_the_model_leaves_its_batch_there(
    server_python: Path, environment: dict[str, str], spool: Spool
) -> None:
    """The batch and its members are reported with the stage in which the worker died."""
    (trace,) = traces(1)
    with served(server_python, environment, "batched") as port:
        asking = threading.Thread(
            target=_ask_the_dying, args=(port, wanted(0, die="predict"), trace)
        )
        asking.start()
        (batch,) = wait_until(lambda: _died(spool, BatchRecord), 30)
    asking.join()
    (request,) = wait_until(lambda: _died(spool, RequestRecord), 10)
    assert isinstance(batch, BatchRecord)
    assert [member.trace_id for member in batch.members] == [trace]
    assert [span.stage for span in batch.stages if span.open] == ["inference"]
    assert isinstance(request, RequestRecord)
    assert request.trace_id == trace
    assert last_stage(request) == "inference"
    assert request.batch_ids == (batch.batch_id,)


def _ask_the_dying(port: int, request: dict[str, Any], trace: str) -> None:
    with suppress(OSError, ConnectionError):
        ask(port, "/predict", request, trace)


def _died(spool: Spool, kind: type[Any]) -> list[Any]:
    return [one for one in spool.records() if isinstance(one, kind) and one.state is State.DIED]


def test_without_a_line_of_code(
    server_python: Path, environment: dict[str, str], spool: Spool
) -> None:
    """Under `stagescope run` a server that does not name us has the same stages."""
    (trace,) = traces(1)
    started = [sys.executable, "-m", "stagescope", "run", "--no-agent", "--"]
    with served(server_python, environment | {"BY_HAND": "no"}, "batched", started) as port:
        assert ask(port, "/predict", wanted(1), trace)[0] == 200
        (record,) = spool.requests(trace)[trace]
        (batch,) = spool.batches(trace)
    spent = stages_ms(record)
    assert close(spent["preprocess.parse"], wanted(1)["decode"])
    assert close(spent["inference"], wanted(1)["predict"])
    assert record.batch_ids == (batch.batch_id,)


def test_switched_off(server_python: Path, environment: dict[str, str], spool: Spool) -> None:
    """With STAGESCOPE_DISABLE=1 the server serves, and nothing is recorded."""
    with served(server_python, environment | {"STAGESCOPE_DISABLE": "1"}, "batched") as port:
        assert ask(port, "/predict", wanted(0))[0] == 200
    assert spool.records() == []
