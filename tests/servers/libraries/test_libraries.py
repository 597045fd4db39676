"""Real model libraries in a FastAPI app without a mark: the table names the model's time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.testing import wait_until
from stagescope.testing.spool import Spool
from tests.support.server_processes import ask, free_port, stages_ms

pytestmark = pytest.mark.server

APP = Path(__file__).parent / "app.py"
MODELS = ("sklearn", "sklearn_proba", "xgboost", "xgboost_booster", "lightgbm",
          "lightgbm_booster", "catboost")  # fmt: skip
TIMES = 2


@pytest.fixture
def port(server_python: Path, server_environment: dict[str, str]) -> Iterator[int]:
    """Serve the app."""
    port = free_port()
    output = Path(server_environment["STAGESCOPE_SPOOL"]).parent / "output.txt"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [str(server_python), str(APP), str(port)],
            env=server_environment | {"STAGESCOPE_AGENT": "off"}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_until(lambda: _answers(port) or process.poll() is not None, 120)
        assert process.poll() is None, output.read_text()
        yield port
    finally:
        process.terminate()
        process.wait()
    assert "stagescope: a fault" not in output.read_text(), output.read_text()


def _answers(port: int) -> bool:
    try:
        return ask(port, "/pipeline", {})[0] == 200
    except OSError:
        return False


def test_each_library_names_the_models_time(port: int, server_environment: dict[str, str]) -> None:
    """`inference` is what the app measured, to 15 % or 1 ms; steps and marks have their own."""
    asked = [f"/model/{name}" for name in MODELS] * TIMES + ["/pipeline", "/marked"]
    measured: dict[str, tuple[str, dict[str, float]]] = {}
    for number, path in enumerate(asked, 1):
        trace = f"{number:016x}" * 2
        status, body = ask(port, path, {}, trace)
        assert status == 200, body
        measured[trace] = path, json.loads(body)
    spool = Spool(Path(server_environment["STAGESCOPE_SPOOL"]))
    try:
        records = spool.requests(*measured)
    finally:
        spool.close()
    for trace, (path, own) in measured.items():
        stages = stages_ms(records[trace][0])
        if path == "/pipeline":
            assert 20 <= stages["preprocess"] <= own["whole"]
            total = stages["preprocess"] + stages["inference"]
            assert total == pytest.approx(own["whole"], rel=0.15, abs=1)
        elif path == "/marked":
            assert stages["rerank"] == pytest.approx(own["rerank"], rel=0.15, abs=1)
            assert "inference" not in stages
        else:
            assert stages["inference"] == pytest.approx(own["inference"], rel=0.15, abs=1), path
