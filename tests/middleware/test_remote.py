"""A timeline lent to another process: one record, written from both sides."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stagescope import stage
from stagescope.middleware.remote import attached, extract, inject
from stagescope.recorder import format as fmt
from stagescope.records import last_stage
from stagescope.testing.recording import Recording

WORKER = """
import sys
from pathlib import Path
from stagescope import batch, stage
from stagescope.middleware.remote import attached
from stagescope.testing.recording import Recording

own = Recording(Path(sys.argv[1]))
with attached(sys.argv[2], own.recorder) as timeline:
    ticket = batch.enqueue()
    with stage("preprocess"):
        pass
    with batch(model="m") as formed:
        formed.add(ticket)
        with formed.inference():
            if "die" in sys.argv:
                import os, signal
                os.kill(os.getpid(), signal.SIGKILL)
assert own.batches[0].size == 1
own.close()
"""


def work(spool: Path, carrier: str, *more: str) -> int:
    """Run the worker in a process of its own."""
    command = [sys.executable, "-c", WORKER, str(spool), carrier, *more]
    return subprocess.run(command, timeout=60, check=False).returncode


def test_a_worker_process_writes_its_stages_into_the_request(tmp_path: Path) -> None:
    """The owner's record holds both sides' stages, in order, and sums to its wall time."""
    recording = Recording(tmp_path)
    with recording.request():
        carrier = inject()
        assert carrier
        assert work(tmp_path, carrier) == 0
        with stage("postprocess"):
            pass

    (record,) = recording.requests
    names = [span.stage for span in record.stages]
    assert names == ["queue.batch", "preprocess", "batch.wait", "inference", "postprocess"]
    assert len(record.batch_ids) == 1
    assert sum(record.self_ns().values()) == record.duration_ns
    recording.close()


def test_a_worker_killed_in_the_model_leaves_its_stage_open(tmp_path: Path) -> None:
    """The request goes on in its owner, with the stage in which the worker died."""
    recording = Recording(tmp_path)
    with recording.request():
        carrier = inject()
        assert carrier
        assert work(tmp_path, carrier, "die") == -9

    (record,) = recording.requests
    assert last_stage(record) == "inference"
    recording.close()


NAMING = """
import sys
from pathlib import Path
from stagescope import stage
from stagescope.middleware.remote import attached
from stagescope.testing.recording import Recording

own = Recording(Path(sys.argv[1]))
with stage("mine"): pass
with attached(sys.argv[2], own.recorder) as timeline:
    for name in ("theirs", "shared", "theirs"):
        with stage(name): pass
own.close()
"""


def test_a_workers_own_stage_names_are_its_own(tmp_path: Path) -> None:
    """A name has a code for each process: the worker's are found again in the owner's file."""
    recording = Recording(tmp_path)
    with recording.request():
        with stage("shared"):
            pass
        for _ in range(2):
            command = [sys.executable, "-c", NAMING, str(tmp_path), inject() or ""]
            assert subprocess.run(command, timeout=60, check=False).returncode == 0

    (record,) = recording.requests
    names = [span.stage for span in record.stages]
    assert names == ["shared", *["theirs", "shared", "theirs"] * 2]
    recording.close()


STREAMING = """
import asyncio, sys, time
from pathlib import Path
from starlette.responses import StreamingResponse
from stagescope import install, stage
from stagescope.middleware.remote import attached
from stagescope.testing.recording import Recording

install("starlette")
own = Recording(Path(sys.argv[1]))
sent = []

async def body():
    time.sleep(0.01)
    yield b"a"
    with stage("theirs"):
        time.sleep(0.01)
    yield b"b"

async def send(message):
    sent.append(message.get("body"))

scope = {"type": "http", "method": "GET", "path": "/", "asgi": {"spec_version": "2.4"}}
with attached(sys.argv[2], own.recorder):
    asyncio.run(StreamingResponse(body())(scope, None, send))
assert sent == [None, b"a", b"b", b""], sent
own.close()
"""


def test_a_worker_that_streams_writes_what_its_generator_did(tmp_path: Path) -> None:
    """A response of Starlette in another process is timed as in the one that owns the record."""
    recording = Recording(tmp_path)
    with recording.request():
        command = [sys.executable, "-c", STREAMING, str(tmp_path), inject() or ""]
        environment = os.environ | {"STAGESCOPE_RAISE": "1"}
        assert subprocess.run(command, timeout=60, check=False, env=environment).returncode == 0

    (record,) = recording.requests
    spent = record.self_ns()
    assert spent["endpoint"] >= 10_000_000
    assert spent["theirs"] >= 10_000_000
    assert {"respond.first_byte", "respond.stream"} <= spent.keys()
    recording.close()


def test_a_late_or_foreign_carrier_is_nothing(tmp_path: Path) -> None:
    """After its slot went to another request, or where text is no carrier, nothing is written."""
    recording = Recording(tmp_path, in_flight_slots=2)
    with recording.request():
        late = inject()
    for _ in range(4):
        with recording.request():
            pass
    foreign = f"{'0' * 32};{'0' * 16};1;1;{fmt.DATA_AT};;/etc/passwd"

    assert extract(late, recording.recorder) is None
    for text in (None, "", "x", "a;b;c;d;e;f;g", foreign):
        with attached(text, recording.recorder) as timeline:
            assert timeline is None
    recording.close()
