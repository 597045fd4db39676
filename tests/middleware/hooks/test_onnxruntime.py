"""ONNX Runtime under its hook: every way to run a session, concurrent requests, failures."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from stagescope.middleware.hooks.hook import install
from stagescope.middleware.stage import stage
from stagescope.records import RequestRecord
from stagescope.testing.recording import Recording

ROWS = np.ones((2, 4), np.float32)


@pytest.fixture(autouse=True)
def _our_faults_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our guard would swallow fails the test."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """A small recorder file."""
    with closing(Recording(tmp_path)) as found:
        yield found


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    """A session of a model that multiplies a loop of matrices; its input says how many times."""
    assert install("onnxruntime")
    return onnxruntime.InferenceSession(model(), providers=["CPUExecutionProvider"])


def model() -> bytes:
    """Make `y = x @ w` applied n times, in an ONNX Loop."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], np.eye(4, dtype=np.float32).ravel())
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "w"], ["next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["rows", 4]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["rows", 4]),
        ],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)],
        "turns",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4]),
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 4])],
        [weight],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    serialized: bytes = made.SerializeToString()
    return serialized


def feed(turns: int = 10) -> dict[str, Any]:
    """Return the session's inputs."""
    return {"x": ROWS, "n": np.array(turns, np.int64)}


def stages(record: RequestRecord) -> list[tuple[str, bool]]:
    """Return name and failure of each opening."""
    return [(span.stage, span.failed) for span in record.stages]


def run_with_iobinding(session: onnxruntime.InferenceSession) -> None:
    """Run with inputs and outputs bound beforehand."""
    binding = session.io_binding()
    for name, value in feed().items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("y")
    session.run_with_iobinding(binding)


def run_with_ort_values(session: onnxruntime.InferenceSession) -> None:
    """Run on the runtime's own values."""
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in feed().items()
    }
    session.run_with_ort_values(["y"], values)


@pytest.mark.parametrize(
    "run",
    [lambda session: session.run(None, feed()), run_with_iobinding, run_with_ort_values],
    ids=["run", "run_with_iobinding", "run_with_ort_values"],
)
def test_each_run_is_one_inference(
    recording: Recording, session: onnxruntime.InferenceSession, run: Any
) -> None:
    """Whichever way the session is run, the request has one `inference`."""
    with recording.request():
        run(session)

    assert stages(recording.requests[0]) == [("inference", False)]


def test_concurrent_requests_have_each_their_own_time(
    recording: Recording, session: onnxruntime.InferenceSession
) -> None:
    """A long and a short run beside each other are not mixed up: the long one is charged more."""

    def request(turns: int) -> tuple[str, int]:
        with recording.request() as timeline:
            with stage("preprocess"):
                inputs = feed(turns)
            session.run(None, inputs)
        return timeline.trace_id.hex(), turns

    with ThreadPoolExecutor(2) as pool:
        sent = dict(pool.map(request, [20_000, 10] * 6))
    records = {record.trace_id: record for record in recording.requests}

    assert records.keys() == sent.keys()
    spent: dict[int, list[int]] = {10: [], 20_000: []}
    for trace_id, record in records.items():
        assert stages(record) == [("preprocess", False), ("inference", False)]
        spent[sent[trace_id]].append(record.self_ns()["inference"])
    assert min(spent[20_000]) > sorted(spent[10])[3]


def test_an_asynchronous_run_lasts_until_it_is_called_back(
    recording: Recording, session: onnxruntime.InferenceSession
) -> None:
    """The stage ends in the runtime's own thread, and the callback's stages are the request's."""
    done = threading.Event()
    got: list[Any] = []

    def callback(results: Any, user_data: Any, error: str) -> None:
        with stage("postprocess"):
            got.append((results[0].tolist(), user_data, error, threading.current_thread()))
        done.set()

    with recording.request():
        session.run_async(None, feed(2000), callback, "mine")
        assert done.wait(10)

    (record,) = recording.requests
    assert stages(record) == [("inference", False), ("postprocess", False)]
    assert got[0][:3] == (ROWS.tolist(), "mine", "")
    assert got[0][3] is not threading.current_thread()


def test_a_run_that_fails_is_the_users_error(
    recording: Recording, session: onnxruntime.InferenceSession
) -> None:
    """Bad input raises what it raised before, and the stage says that it failed."""
    bad = feed() | {"x": np.ones((2, 5), np.float32)}
    with recording.request():
        with pytest.raises(Exception, match="invalid dimensions"):
            session.run(None, bad)
        with pytest.raises(Exception, match="missing"):
            session.run_async(None, {}, print, None)

    assert stages(recording.requests[0]) == [("inference", True), ("inference", True)]


def test_outside_a_request_the_session_is_as_it_was(
    recording: Recording, session: onnxruntime.InferenceSession
) -> None:
    """Results come, nothing is recorded, and installing again wraps nothing twice."""
    wrapped = onnxruntime.InferenceSession.run
    assert install("onnxruntime")
    assert onnxruntime.InferenceSession.run is wrapped
    assert session.run(None, feed())[0].tolist() == ROWS.tolist()
    assert recording.read() == []
