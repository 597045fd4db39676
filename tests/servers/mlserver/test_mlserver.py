"""MLServer, real: alone and with a pool worker, batched and not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stagescope.records import RequestRecord
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

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

ROOT = Path(__file__).parent.parent.parent.parent
SLACK_MS = 60
"""What scheduling on a busy machine may add to a sleep."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server, how many workers it has, and what it records."""

    port: int
    workers: int
    spool: Spool

    def one(self, trace_id: str) -> RequestRecord:
        """Return the one record of a trace."""
        (record,) = self.spool.requests(trace_id)[trace_id]
        return record

    def ask_at_once(self, model: str, numbers: dict[str, int]) -> dict[str, tuple[int, bytes]]:
        """Ask *model* with one number each, by trace id."""
        bodies = {key: body(number) for key, number in numbers.items()}
        return ask_at_once(self.port, f"/v2/models/{model}/infer", bodies)


def body(number: int) -> object:
    """Return an inference request with one number."""
    return {
        "inputs": [
            {"name": "x", "shape": [1, 1], "datatype": "INT64", "data": [number],
             "parameters": {"content_type": "slow"}}
        ]
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> None:
    """A server starts its workers when it likes; its own fixture looks for what is left of it."""


@pytest.fixture(scope="module", params=[0, 1], ids=["alone", "pool"])
def server(request: pytest.FixtureRequest, server_python: Path) -> Iterator[Server]:
    """Serve two models; afterwards nothing of the server runs, and its ports are free."""
    with tempfile.TemporaryDirectory(prefix="mlserver-") as folder:
        ports = [free_port() for _ in range(3)]
        models, spool = Path(folder) / "models", str(Path(folder) / "spool")
        lay_out(models, ports, request.param)
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{models}",
            "STAGESCOPE_AGENT": "off",
            "STAGESCOPE_RAISE": "1",
            "STAGESCOPE_SPOOL": spool,
        }
        with subprocess.Popen(
            [server_python.with_name("mlserver"), "start", str(models)],
            env=environment, cwd=folder, stdout=subprocess.DEVNULL, start_new_session=True,
        ) as process:  # fmt: skip
            records = Spool(Path(spool))
            try:
                wait_until(lambda: is_ready(ports[0]), 60)
                yield Server(ports[0], request.param, records)
            finally:
                records.close()
                process.terminate()
                process.wait(30)
                end_processes_with("STAGESCOPE_SPOOL", spool)
        assert not processes_with("STAGESCOPE_SPOOL", spool)
        assert all(port_is_free(port) for port in ports)


def lay_out(models: Path, ports: list[int], workers: int) -> None:
    """Write the folder that MLServer serves: one model as it is, the same one batching."""
    settings = {
        "host": "127.0.0.1", "http_port": ports[0], "grpc_port": ports[1],
        "metrics_port": ports[2], "parallel_workers": workers,
    }  # fmt: skip
    for name, more in {
        "single": {},
        "batching": {"max_batch_size": 4, "max_batch_time": 0.1},
    }.items():
        (models / name).mkdir(parents=True)
        model = {"name": name, "implementation": "slow_models.Slow", **more}
        (models / name / "model-settings.json").write_text(json.dumps(model))
    (models / "settings.json").write_text(json.dumps(settings))
    shutil.copy(Path(__file__).with_name("models.py"), models / "slow_models.py")


def is_ready(port: int) -> bool:
    """Return whether both models answer: the server alone is ready before them."""
    try:
        return all(
            ask(port, f"/v2/models/{name}/infer", body(0))[0] == 200
            for name in ("single", "batching")
        )
    except OSError:
        return False


def traces(word: str, many: int) -> list[str]:
    """Return trace ids that say where they come from."""
    return [word.encode().hex().ljust(16, "0") + f"{number + 1:016x}" for number in range(many)]


def near(found_ms: float, wanted_ms: float) -> bool:
    """Return whether a stage took its sleep, and not much more."""
    return wanted_ms - 2 <= found_ms <= wanted_ms + SLACK_MS


def answer(reply: bytes) -> list[int]:
    """Return the numbers of an inference response."""
    numbers: list[int] = json.loads(reply)["outputs"][0]["data"]
    return numbers


def test_each_request_has_its_own_stages(server: Server) -> None:
    """Three at once, distinct traces: decoding, the model, the user's own stages, encoding."""
    numbers = {key: at for at, key in enumerate(traces("single", 3))}
    answers = server.ask_at_once("single", numbers)

    for key, number in numbers.items():
        assert answer(answers[key][1]) == [number]
        record = server.one(key)
        spent = stages_ms(record)
        assert near(spent["preprocess"], 20), spent
        assert near(spent["inference"], 50), spent
        assert near(spent["tidying"], 10), spent
        assert near(spent["preprocess.parse"], 10), spent
        assert near(spent["postprocess.serialize"], 10), spent
        assert ("queue" in spent) == (server.workers > 0)
        assert record.route == "/v2/models/{model_name}/infer"
        assert record.parent_span_id == key[:16]
        assert sum(record.self_ns().values()) == record.duration_ns


def test_members_of_batches_keep_their_own_stages(server: Server) -> None:
    """Six at once in batches of at most four: each has its answer, its stages, its batch's link."""
    numbers = {key: at for at, key in enumerate(traces("batching", 6))}
    answers = server.ask_at_once("batching", numbers)

    batches = server.spool.batches(*numbers)
    members = [member.trace_id for batch in batches for member in batch.members]
    assert sorted(members) == sorted(numbers)
    assert max(batch.size for batch in batches) > 1
    for key, number in numbers.items():
        assert answer(answers[key][1]) == [number]
        record = server.one(key)
        spent = stages_ms(record)
        assert near(spent["preprocess"], 20), spent
        assert near(spent["inference"], 50), spent
        assert near(spent["tidying"], 10), spent
        assert near(spent["preprocess.parse"], 10), spent
        assert spent.get("queue.batch", 0) + spent.get("batch.wait", 0) > 0, spent
        (batch,) = [one for one in batches if one.batch_id in record.batch_ids]
        assert key in {member.trace_id for member in batch.members}
    for batch in batches:
        assert batch.model == "batching"
        assert [span.stage for span in batch.stages][:3] == [
            "batch.wait", "batch.collate", "inference",
        ]  # fmt: skip


@pytest.mark.parametrize("model", ["single", "batching"])
def test_an_error_of_the_users_stays_the_users(server: Server, model: str) -> None:
    """The client gets MLServer's own 500, and the record names the stage that failed."""
    (key,) = traces(f"e{model[:6]}", 1)
    answers = server.ask_at_once(model, {key: -1})

    record = server.one(key)
    assert answers[key][0] == record.status == 500
    assert "inference" in [span.stage for span in record.stages if span.failed]


@pytest.mark.parametrize("server", [1], indirect=True, ids=["pool"])
def test_a_worker_killed_in_the_model(server: Server) -> None:
    """Its batch and all members are reported, with the stage in which it died."""
    keys = traces("killed", 2)
    answers = server.ask_at_once("batching", dict.fromkeys(keys, -2))

    assert {status for status, _ in answers.values()} == {500}
    for batch in server.spool.batches(*keys):
        assert batch.error == "WorkerStop"
        assert "inference" in [span.stage for span in batch.stages if span.open]
    for key in keys:
        record = server.one(key)
        assert "inference" in [span.stage for span in record.stages if span.open]
        assert record.status == 500
