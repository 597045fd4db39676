"""The `Server-Timing` header of a load run's requests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stagescope import stage
from stagescope.middleware.remote import inject
from stagescope.middleware.server_timing import header_value
from stagescope.testing.clock import HandClock
from stagescope.testing.recording import Recording

WORKER = """
import sys
from pathlib import Path
from stagescope import stage
from stagescope.middleware.remote import attached
from stagescope.testing.recording import Recording

own = Recording(Path(sys.argv[1]))
with attached(sys.argv[2], own.recorder), stage("inference.only_the_worker_knows"):
    pass
own.close()
"""


def test_a_stage_that_only_a_worker_process_knows_counts(tmp_path: Path) -> None:
    """A name that another process put into our table of names belongs to its stage."""
    recording = Recording(tmp_path)
    with recording.request() as timeline:
        carrier = inject()
        assert carrier
        command = [sys.executable, "-c", WORKER, str(tmp_path), carrier]
        subprocess.run(command, timeout=60, check=True)
        value = header_value(timeline, recording.recorder.clock())
    assert value.startswith(b"inference;dur=")
    recording.close()


def test_a_sub_stage_named_late_counts_for_its_stage(tmp_path: Path) -> None:
    """A name that the app used first long after the start belongs to its stage like any other."""
    clock = HandClock()
    recording = Recording(tmp_path, clock=clock)
    with recording.request() as timeline:
        header_value(timeline, clock())
        with stage("preprocess.named_late"):
            clock.tick(2_000_000)
        clock.tick(1_000_000)

        value = header_value(timeline, clock())

    assert value == b"preprocess;dur=2.000000, total;dur=3.000000"
    recording.close()
