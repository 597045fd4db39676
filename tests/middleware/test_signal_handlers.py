"""A signal handler of the app's may open stages, whatever our code is at that it interrupts."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import signal, sys, time
from pathlib import Path
from stagescope import stage
from stagescope.testing.recording import Recording

handled = 0

def handle(number, frame):
    global handled
    handled += 1
    for index in range(40):  # More than a slot holds, and a name that is new each time.
        with stage(f"handler.{handled}" if index == 0 and handled < 150 else "inference"):
            pass

signal.signal(signal.SIGALRM, handle)
recording = Recording(Path(sys.argv[1]))
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
number = 0
deadline = time.monotonic() + 60
while handled < 400 and time.monotonic() < deadline:
    number += 1
    with recording.request():
        for index in range(70):
            with stage(f"main.{number}" if index == 0 and number < 150 else "preprocess"):
                pass
signal.setitimer(signal.ITIMER_REAL, 0, 0)
assert handled >= 400, handled
free = len(recording.recorder.take_slot.__self__)
assert free == len(recording.recorder._slots), free
print("handled")
"""

COLD = """
import os, signal, sys, time
if os.environ.get("STAGESCOPE_RUN"):
    import uvicorn  # So that a cold process opens its recorder by the way.
from stagescope import stage
from stagescope.middleware.runtime import cold_start

handled = 0

def handle(number, frame):
    global handled
    handled += 1
    with stage("load.more"):
        pass

signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
deadline = time.monotonic() + 60
while handled < 300 and time.monotonic() < deadline:
    cold_start._begin_anew_in_child()
    with stage("load"):
        pass
    cold_start.end()
signal.setitimer(signal.ITIMER_REAL, 0, 0)
assert handled >= 300, handled
print("handled")
"""


def run(program: str, *arguments: str, **variables: str) -> str:
    """Run *program* as a process of its own; one that hangs is ended."""
    source = Path(__file__).parents[2] / "src"
    ended = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": str(source)} | variables,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return ended.stdout or ended.stderr


def test_a_handler_may_open_stages_while_stages_are_opened(tmp_path: Path) -> None:
    """Long requests, new names, and a signal each half millisecond: nothing waits for itself."""
    assert run(PROGRAM, str(tmp_path)) == "handled\n"


def test_a_handler_may_open_stages_while_the_process_starts(tmp_path: Path) -> None:
    """A stage outside of requests belongs to the cold start, whose begin and end are short locks."""
    assert run(COLD) == "handled\n"


def test_a_handler_may_open_stages_while_a_recorder_is_opened(tmp_path: Path) -> None:
    """Under `stagescope run` a stage of a cold server opens the recorder, below a lock too."""
    variables = {"STAGESCOPE_RUN": "1", "STAGESCOPE_SPOOL": str(tmp_path / "spool")}
    assert run(COLD, **variables) == "handled\n"
    assert list((tmp_path / "spool").glob("*.ring"))
