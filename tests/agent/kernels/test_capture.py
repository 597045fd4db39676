"""Captures of a real server under load, and of threads of this process."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stagescope.agent.kernels.capture import (
    FOLDER,
    Capture,
    State,
    degraded_reason,
    export,
    recorded,
    records_of,
)
from stagescope.agent.kernels.rows import by_stage
from stagescope.agent.probe import ask
from stagescope.errors import HeldError, StagescopeError
from stagescope.kernels import CaptureRequest
from stagescope.middleware.probe.server import Probe
from stagescope.middleware.stage import stage
from stagescope.middleware.torch.profiler import HOLDERS, holder
from stagescope.records import RequestRecord
from stagescope.testing import wait_until
from stagescope.testing.recording import Recording
from tests.support.torch_served import TorchServed, torch_served

QUICK = CaptureRequest(batches=2, seconds=20.0, force=True)
ENDLESS = CaptureRequest(batches=10_000, seconds=60.0, max_events=1_000_000, force=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServed]:
    """One real server for the tests of this module that leave it as it was."""
    with torch_served(tmp_path_factory.mktemp("served")) as server:
        yield server


def finished(ring: Path, wish: CaptureRequest = QUICK) -> Capture:
    """Run one capture to its end."""
    capture = Capture(ring, wish)
    with closing(capture):
        for _ in capture.states():
            pass
    return capture


def recording_states(capture: Capture) -> Iterator[State]:
    """Run *capture*; give the states in which a few calls of the model are recorded already."""
    at_start = 0
    for state in capture.states():
        if state.name == "recording":
            at_start = at_start or state.calls
            if state.calls > at_start + 2:
                yield state


def captures_in(spool: Path) -> list[str]:
    """Name the captures that lie in *spool*."""
    folder = spool / FOLDER
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_a_live_server_is_captured_by_stage(served: TorchServed, tmp_path: Path) -> None:
    """The states in order; convolutions in `inference` alone; a trace with our tracks in it."""
    with served.load(), closing(Capture(served.ring, QUICK)) as capture:
        states = list(capture.states())
        read = capture.read()
        records = records_of(served.ring, read.facts.since_ns, read.facts.until_ns)
        trace = json.loads(export(read, served.ring, tmp_path).read_bytes())
    capture.discard()
    kept, table = recorded(read)

    order = list(dict.fromkeys(state.name for state in states))
    assert order == ["armed", "warming", "recording", "stopping", "exported"]
    assert [state.at_ns for state in states] == sorted(state.at_ns for state in states)
    assert read.facts.batches >= 2
    assert read.facts.ended_by == "batches"
    assert degraded_reason(read, table) == ""
    of_convolution = {row.stage for row in kept.rows if "conv" in row.name}
    assert of_convolution == {"inference"}
    assert {"inference", "batch.collate"} <= {head.stage for head, _ in by_stage(kept.rows)}
    assert table.nowhere == table.ambiguous == 0
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert {"stagescope requests", "stagescope batches", "stagescope stages by thread"} <= names
    ours = [e for e in trace["traceEvents"] if e.get("cat") == "stagescope"]
    ids = {e["args"].get("trace_id") for e in ours}
    assert {r.trace_id for r in records if isinstance(r, RequestRecord)} <= ids
    theirs = [e for e in trace["traceEvents"] if e.get("cat") == "cpu_op"]
    first, last = min(e["ts"] for e in ours), max(e["ts"] + e["dur"] for e in ours)
    assert all(first <= e["ts"] <= last for e in theirs)


def test_operators_lie_within_the_stage_that_they_are_counted_for(served: TorchServed) -> None:
    """On one clock: the ledger's inference holds every convolution of torch's, to 0.1 ms."""
    with served.load():
        capture = finished(served.ring)
    read = capture.read()
    capture.discard()

    inference = [(o.start_ns, o.end_ns) for o in read.openings if o.stage == "inference"]
    since, until = read.facts.since_ns, read.facts.until_ns
    convolutions = [
        e for e in read.events if e.name == "aten::conv2d" and since <= e.start_ns < until
    ]
    assert convolutions
    for event in convolutions:
        assert any(
            start - 100_000 <= event.start_ns and event.end_ns <= end + 100_000
            for start, end in inference
        )


def test_requests_that_overlap_are_profiled_and_no_others(served: TorchServed) -> None:
    """From the profiler's start to its end; the server answers all the time."""
    served.answers.clear()
    with served.load():
        capture = finished(served.ring)
        since = len(served.answers)
        wait_until(lambda: len(served.answers) > since + 10)
    facts = capture.read().facts
    capture.discard()
    records = [one for one in records_of(served.ring, 0, 2**63) if isinstance(one, RequestRecord)]

    margin_ns = 1_000_000_000  # the collector may run in it, each twentieth time
    for record in records:
        end_ns = record.start_ns + record.duration_ns
        if end_ns > facts.profiled_since_ns and record.start_ns < facts.profiled_until_ns:
            assert record.profiled
        elif record.start_ns > facts.profiled_until_ns + margin_ns:
            assert not record.profiled
    assert set(served.answers) == {200}


@pytest.mark.parametrize("until", ["armed", "warming", "recording"])
def test_an_asker_that_goes_ends_the_capture(served: TorchServed, until: str) -> None:
    """Wherever it stands: no profiler stays on, nothing is left, and the next one works."""
    with served.load():
        with closing(Capture(served.ring, ENDLESS)) as capture:
            for state in capture.states():
                if state.name == until:
                    break
        wait_until(lambda: captures_in(served.spool) == [])
        wait_until(lambda: _next_works(served), 20)
    assert set(served.answers) == {200}


def _next_works(served: TorchServed) -> bool:
    try:
        capture = finished(served.ring)
    except HeldError:  # the one before is on its way out
        return False
    capture.discard()
    return True


def test_enough_exports_what_was_recorded(served: TorchServed) -> None:
    """A word in the midst of a long recording ends it, and it is whole."""
    with served.load(), closing(Capture(served.ring, ENDLESS)) as capture:
        for _ in recording_states(capture):
            capture.enough()
        read = capture.read()
    capture.discard()

    assert read.facts.ended_by == "asked"
    assert recorded(read)[1].works > 0


def test_events_bound_a_recording(served: TorchServed) -> None:
    """However many batches were asked for: the warming tells how many events a batch makes."""
    wish = CaptureRequest(batches=10_000, seconds=60.0, max_events=3_000, force=True)
    with served.load():
        capture = finished(served.ring, wish)
    read = capture.read()
    capture.discard()

    assert read.facts.ended_by == "events"
    assert len(read.events) < 3 * 3_000


def test_a_disk_that_is_full_fails_it_and_leaves_nothing(served: TorchServed) -> None:
    """A sentence with the file and the cause; the server goes on, and the next one works."""
    pid, limit = served.process.pid, resource.RLIMIT_FSIZE
    before = resource.prlimit(pid, limit)
    with served.load():
        resource.prlimit(pid, limit, (4096, before[1]))
        try:
            with pytest.raises(StagescopeError, match=r"torch\.json\.part cannot be written: .+"):
                finished(served.ring)
        finally:
            resource.prlimit(pid, limit, before)
        assert captures_in(served.spool) == []
        finished(served.ring).discard()


def test_twenty_captures_leave_nothing(served: TorchServed) -> None:
    """No thread, descriptor or file is more in the server than after the first one."""
    with served.load():
        finished(served.ring).discard()

        def held() -> tuple[int, int]:
            own = Path(f"/proc/{served.process.pid}")
            return len(os.listdir(own / "task")), len(os.listdir(own / "fd"))

    at_rest = wait_until(lambda: _steady(held), 20)
    with served.load():
        for _ in range(20):
            finished(served.ring).discard()
    assert captures_in(served.spool) == []
    wait_until(lambda: held() <= at_rest, 20)


def _steady(held: object) -> tuple[int, int]:
    assert callable(held)
    seen = {held() for _ in range(200)}
    return seen.pop() if len(seen) == 1 else ()  # type: ignore[return-value]


def test_a_server_that_is_killed_ends_it_with_a_sentence(tmp_path: Path) -> None:
    """SIGKILL in the midst of recording: said, and no part file stays."""
    with torch_served(tmp_path) as server, server.load():
        with (
            closing(Capture(server.ring, ENDLESS)) as capture,
            pytest.raises(StagescopeError, match="ended in the midst"),
        ):
            for state in capture.states():
                if state.name == "recording":
                    server.process.send_signal(signal.SIGKILL)
        assert captures_in(server.spool) == []


class Model:
    """A process that serves: this one, with a thread that calls a model again and again."""

    def __init__(self, spool: Path) -> None:
        self.recording = Recording(spool, ring_slots=8192)
        self.ring = self.recording.path
        self.probe = Probe(self.ring.with_suffix(".probe"), self.recording.recorder)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="model")

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve while the block lasts."""
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()

    def _serve(self) -> None:
        while not self._stop.is_set():
            with self.recording.request(), stage("inference"):
                torch.ones(16, 16) @ torch.ones(16, 16)
            self._stop.wait(0.002)

    def close(self) -> None:
        """Let go of everything."""
        self.probe.stop()
        self.recording.close()


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    """This process, to be captured."""
    made = Model(tmp_path)
    yield made
    made.close()


def test_stages_of_requests_count_as_batches_where_there_is_no_batcher(model: Model) -> None:
    """Two calls of the model were asked for, two or little more are recorded."""
    with model.serving():
        capture = finished(model.ring)

    _, table = recorded(capture.read())
    assert {row.stage for row in table.rows} == {"inference"}
    assert "aten::mm" in {row.name for row in table.rows}


def test_another_profiler_in_the_process_is_named(model: Model) -> None:
    """The server's own profiler goes on, and the capture is refused."""
    own = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with model.serving(), own:
        with pytest.raises(HeldError, match="torch profiler that the server itself has started"):
            finished(model.ring)
        torch.ones(3) + 1
    assert any(event.key == "aten::add" for event in own.key_averages())
    assert captures_in(model.ring.parent) == []


def test_a_profiler_that_the_server_starts_meanwhile_has_its_way(model: Model) -> None:
    """It records; the capture fails with a sentence, and the one after it works."""
    own = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with model.serving():
        with closing(Capture(model.ring, ENDLESS)) as capture:
            states = recording_states(capture)
            next(states)
            with own:
                torch.ones(3) + 1
            capture.enough()
            with pytest.raises(StagescopeError, match="a torch profiler of its own meanwhile"):
                list(states)
        finished(model.ring)
    assert any(event.key == "aten::add" for event in own.key_averages())


@pytest.mark.parametrize("variable", HOLDERS)
def test_a_tool_that_holds_the_device_is_named(variable: str) -> None:
    """By the environment that it started the server in; without a device it holds nothing."""
    environment = {variable: "/opt/tool.so" if variable.endswith("PATH") else "1"}
    assert holder(torch, device=True, environment=environment).startswith(HOLDERS[variable])
    assert holder(torch, device=False, environment=environment) == ""
    assert holder(torch, device=True, environment={variable: "0"}) == ""


def test_one_at_a_time_and_not_at_once_again(model: Model) -> None:
    """A second capture is refused while one is under way, and for a minute after unless forced."""
    with model.serving():
        with closing(Capture(model.ring, ENDLESS)) as first:
            for _ in recording_states(first):
                with pytest.raises(HeldError, match=r"another capture .* is under way"):
                    finished(model.ring)
                first.enough()
        with pytest.raises(HeldError, match=r"a moment ago; wait .* or use --force"):
            finished(model.ring, CaptureRequest(batches=1))
        finished(model.ring, CaptureRequest(batches=1, background=True))
        finished(model.ring)


def test_no_traffic_is_said(model: Model) -> None:
    """Armed, no profiler is on; when nothing came, the sentence says what to do."""
    with pytest.raises(StagescopeError, match=r"no batch came within 0\.2 s: send it requests"):
        finished(model.ring, CaptureRequest(seconds=0.2, force=True))
    assert captures_in(model.ring.parent) == []
    assert not model.recording.reader.poll()


def test_without_torch_or_device_there_is_a_sentence(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for is not to be had here."""
    with pytest.raises(StagescopeError, match="works on no CUDA device"):
        finished(model.ring, CaptureRequest(device_only=True))
    monkeypatch.setitem(__import__("sys").modules, "torch", SimpleNamespace())
    with pytest.raises(StagescopeError, match="has not loaded torch"):
        finished(model.ring)


def test_a_folder_that_cannot_be_made_is_named(model: Model) -> None:
    """A file lies where the captures would: nothing is started."""
    (model.ring.parent / FOLDER).write_text("in the way")
    with model.serving(), pytest.raises(StagescopeError, match=r"captures.* cannot be written"):
        finished(model.ring)


@pytest.mark.parametrize(
    ("question", "sentence"),
    [({"capture_id": "../x"}, "a capture's id has"), ({"batches": 0}, "batches of a capture is")],
)
def test_nonsense_is_refused(model: Model, question: dict[str, Any], sentence: str) -> None:
    """Whoever asks: an id is no path, and a number is one."""
    asked = {"capture_id": "x"} | question
    with pytest.raises(StagescopeError, match=sentence):
        ask(model.probe.path, "capture", **asked)
