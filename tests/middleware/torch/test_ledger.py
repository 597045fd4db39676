"""The ledger of a capture: who was in which stage when, and how often the model was called."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stagescope.middleware.batch import batch
from stagescope.middleware.runtime.observers import leave, observe
from stagescope.middleware.stage import stage
from stagescope.middleware.torch.ledger import BATCH, REQUEST, Gate, Ledger
from stagescope.testing import wait_until
from stagescope.testing.recording import Recording


@contextmanager
def watched(folder: Path, **options: int) -> Iterator[tuple[Recording, Ledger]]:
    """A recorder, and a ledger that is told of its stages."""
    recording = Recording(folder)
    ledger = Ledger(recording.recorder.clock, **options)
    observe(ledger)
    try:
        yield recording, ledger
    finally:
        leave(ledger)
        recording.close()


def test_an_opening_has_its_thread_its_times_and_whose_it_is(tmp_path: Path) -> None:
    """As the analysis finds it again: names of stages and threads beside the rows."""
    with watched(tmp_path) as (recording, ledger):
        with recording.request() as timeline, stage("preprocess"):
            open_now = ledger.to_json()["openings"]
        told = ledger.to_json()

    code, thread_id, start_ns, end_ns, trace_id, span_id, kind = told["openings"][0]
    assert told["stages"][code] == "preprocess"
    assert thread_id == threading.get_native_id()
    assert told["threads"][thread_id] == {"name": "MainThread", "ident": threading.get_ident()}
    assert timeline.start_ns <= start_ns < end_ns
    assert (trace_id, span_id, kind) == (timeline.trace_id.hex(), timeline.span_id.hex(), REQUEST)
    assert open_now[0][:4] == [code, thread_id, start_ns, 0]


def test_calls_of_the_model_are_counted_once(tmp_path: Path) -> None:
    """A stage within `inference` is part of the call; other stages are none."""
    with watched(tmp_path) as (recording, ledger):
        with recording.request():
            with stage("preprocess"):
                pass
            assert not ledger.begun.is_set()
            with stage("inference"):
                assert ledger.busy
                with stage("inference.forward"):
                    pass
                assert ledger.calls == 0
        assert (ledger.calls, ledger.closings, ledger.busy) == (1, 3, False)


def test_where_there_is_a_batcher_its_batches_are_the_calls(tmp_path: Path) -> None:
    """However many requests are in one, and whatever they open themselves."""
    with watched(tmp_path) as (recording, ledger):
        with recording.request():
            ticket = batch.enqueue()
            with batch() as formed:
                formed.add(ticket)
                with formed.inference(), stage("inference.forward"):
                    pass
        kinds = {row[-1] for row in ledger.to_json()["openings"]}
        assert ledger.calls == 1
    assert kinds == {BATCH, REQUEST}


def test_it_is_bounded(tmp_path: Path) -> None:
    """What finds no room is counted, and calls are counted all the same."""
    with watched(tmp_path, most=2) as (recording, ledger):
        for _ in range(5):
            with recording.request(), stage("inference"):
                pass
        assert (len(ledger.openings()), ledger.dropped, ledger.calls) == (2, 3, 5)


def test_a_gate_holds_the_first_thread_that_has_ended_a_call(tmp_path: Path) -> None:
    """Until it is opened; where it may not hold, and afterwards, it holds nobody."""
    passed: list[int] = []
    with watched(tmp_path) as (recording, ledger):

        def call() -> None:
            with recording.request(), stage("inference"):
                pass
            passed.append(ledger.calls)

        ledger.gate, ledger.may_hold = Gate(), lambda: False
        call()
        assert not ledger.gate.reached.is_set()
        ledger.may_hold = lambda: True
        thread = threading.Thread(target=call)
        thread.start()
        wait_until(ledger.gate.reached.is_set)
        call()  # another one goes on
        assert passed == [1, 3]
        ledger.gate.open()
        thread.join(10)
        call()
    assert sorted(passed) == [1, 3, 3, 4]
