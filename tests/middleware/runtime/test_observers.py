"""Watching stages open and close."""

from pathlib import Path

import pytest

from stagescope.middleware.batch import batch
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline
from stagescope.middleware.runtime.observers import leave, observe
from stagescope.middleware.stage import stage
from stagescope.testing.recording import Recording


class Seen:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def opened(self, timeline: Timeline, index: int, code: int) -> None:
        """Keep an opening."""
        self.told.append(("opened", code))

    def closed(self, timeline: Timeline, index: int, code: int) -> None:
        """Keep a closing."""
        self.told.append(("closed", code))


def test_stages_and_phases_are_told_while_somebody_watches(tmp_path: Path) -> None:
    """Every stage and phase that begins meanwhile, once; nothing before, nothing after."""
    recording, seen = Recording(tmp_path), Seen()
    before = stage.__enter__, batch._end
    with recording.request():
        with stage("preprocess"):
            observe(seen)
        with stage("postprocess"):
            pass
        ticket = batch.enqueue()
        with batch() as b:
            b.add(ticket)
            with b.inference():
                pass
        leave(seen)
        with stage("preprocess"):
            pass
    named = {code: name for name, code in CODES.items()}
    assert [(what, named[code]) for what, code in seen.told] == [
        ("opened", "postprocess"), ("closed", "postprocess"),
        ("closed", "batch.wait"), ("opened", "inference"), ("closed", "inference"),
    ]  # fmt: skip
    assert (stage.__enter__, batch._end) == before
    recording.close()


def test_an_observer_that_fails_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fault is counted as ours; the stage is timed."""
    monkeypatch.delenv("STAGESCOPE_RAISE", raising=False)

    class Broken(Seen):
        def opened(self, timeline: Timeline, index: int, code: int) -> None:
            raise RuntimeError("planted")

    recording, broken = Recording(tmp_path), Broken()
    observe(broken)
    try:
        with recording.request(), stage("preprocess"):
            pass
    finally:
        leave(broken)
    (record,) = recording.requests
    assert "preprocess" in record.self_ns()
    assert recording.reader.counters()["faults"] == 1
    recording.close()
