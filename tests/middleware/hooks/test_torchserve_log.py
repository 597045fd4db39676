"""TorchServe's log: each request's waiting is found, whatever stands between and however it comes."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.middleware.hooks.torchserve.queue_waits import (
    FollowedLog,
    Waited,
    WaitLines,
    find_log,
)

SEEN = b"""\
2026-11-23T21:21:02,446 [INFO ] W-9000-m_1.0 org.pytorch.serve.wlm.WorkerThread - Looping backend
2026-11-23T21:21:02,446 [INFO ] W-9000-m_1.0 org.pytorch.serve.wlm.BatchAggregator - Sending response for jobId aa-1
2026-11-23T21:21:02,446 [INFO ] W-9000-m_1.0 org.pytorch.serve.wlm.BatchAggregator - Sending response for jobId aa-1
2026-11-23T21:21:02,447 [INFO ] W-9001-m_1.0 org.pytorch.serve.wlm.BatchAggregator - Sending response for jobId bb-1
2026-11-23T21:21:02,447 [INFO ] W-9000-m_1.0 ACCESS_LOG - /127.0.0.1:1 "POST /predictions/m HTTP/1.1" 200 190
2026-11-23T21:21:02,448 [DEBUG] W-9000-m_1.0 org.pytorch.serve.job.RestJob - Waiting time ns: 1234, Backend time ns: 99
2026-11-23T21:21:02,448 [DEBUG] W-9000-m_1.0 org.pytorch.serve.job.RestJob - Waiting time ns: 1234, Backend time ns: 99
2026-11-23T21:21:02,448 [DEBUG] W-9001-m_1.0 org.pytorch.serve.job.RestJob - Waiting time ns: 77, Backend time ns: 99
2026-11-23T21:21:02,449 [INFO ] W-9000-m_1.0-stdout MODEL_LOG - says Waiting time ns: nothing
2026-11-23T21:21:03,484 [DEBUG] W-9000-m_1.0 org.pytorch.serve.job.RestJob - Waiting time ns: 500, Inference time ns: 900
2026-11-23T21:21:03,484 [DEBUG] W-9000-m_1.0 org.pytorch.serve.job.RestJob - Waiting time ns: 500, Inference time ns: 900
2026-11-23T21:21:03,485 [DEBUG] W-9000-m_1.0 org.pytorch.serve.job.RestJob - Waiting time ns: 400, Inference time ns: 800
2026-11-23T21:21:04,485 [WARN ] W-9000-m_1.0 org.pytorch.serve.wlm.BatchAggregator - Drop response for inference request aa-2 due to client timeout
"""  # fmt: skip

FOUND = [Waited("aa-1", 1234), Waited("", 500), Waited("", 400), Waited("aa-2", None)]


@given(cuts=st.lists(st.integers(0, len(SEEN)), max_size=8))
def test_one_thread_s_lines_in_whatever_pieces(cuts: list[int]) -> None:
    """Other workers' lines and the doubles are left out, wherever the log is cut into pieces."""
    places = [0, *sorted(cuts), len(SEEN)]
    lines = WaitLines("W-9000")
    found = [waited for begin, end in pairwise(places) for waited in lines.feed(SEEN[begin:end])]
    assert found == FOUND


def test_other_worker_s_thread() -> None:
    """The worker on port 9001 finds its own line, and W-900 is no one's prefix."""
    assert list(WaitLines("W-9001").feed(SEEN)) == [Waited("bb-1", 77)]
    assert list(WaitLines("W-900").feed(SEEN)) == []


def test_a_rolled_log_is_followed(tmp_path: Path) -> None:
    """What was written before the log was rolled, and after, comes once and in order."""
    path = tmp_path / "ts_log.log"
    path.write_bytes(b"old\n")
    log = FollowedLog(path)
    log.skip_to_end()
    with path.open("ab") as out:
        out.write(b"last\n")
    path.rename(tmp_path / "ts_log.1.log")
    assert log.read() == b"last\n"
    path.write_bytes(b"first\n")
    assert log.read() == b"first\n"
    assert log.read() == b""
    log.close()


def test_the_log_is_the_one_an_ancestor_holds_open(tmp_path: Path) -> None:
    """A worker's child of the front end finds the file that the front end writes, by its name."""
    path = tmp_path / "somewhere" / "ts_log.log"
    path.parent.mkdir()
    ask = (
        "from stagescope.middleware.hooks.torchserve.queue_waits import find_log; print(find_log())"
    )
    front_end = f"""
import subprocess, sys
with open({str(path)!r}, "a"):
    subprocess.run([sys.executable, "-c", {ask!r}], check=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", front_end], capture_output=True, text=True, check=True, timeout=60,
        cwd=tmp_path, env=os.environ | {"LOG_LOCATION": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.strip() == str(path)


def test_a_named_log_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STAGESCOPE_TORCHSERVE_LOG names the log; where no file is there, there is none."""
    monkeypatch.setenv("STAGESCOPE_TORCHSERVE_LOG", str(tmp_path / "mine.log"))
    assert find_log() is None
    (tmp_path / "mine.log").touch()
    assert find_log() == tmp_path / "mine.log"
