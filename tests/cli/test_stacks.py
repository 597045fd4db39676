"""`stagescope stacks` on run folders."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stagescope.cli import main
from stagescope.runfolder.parquet import TableFile
from stagescope.runfolder.schema import SERVER, STACKS
from stagescope.stacks import Frame, StackSpan, frame_text

MS = 1_000_000
HOT = StackSpan(
    7, 7, "MainThread", 0, 20 * MS, 1, "preprocess", "marker", True,
    (Frame("main", "/app/m.py", 3), Frame("hot", "/app/m.py", 9)), "window", "py-spy",
)  # fmt: skip


def _folder(folder: Path, spans: list[StackSpan]) -> Path:
    with TableFile(folder, STACKS) as file:
        for span in spans:
            row = {name: getattr(span, name) for name in StackSpan.__slots__}
            file.append(row | {"frames": [frame_text(frame) for frame in span.frames]})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with one hot function, one that waits, one dump, and a hundred requests."""
    rare = replace(HOT, frames=(*HOT.frames[:1], Frame("rare", "/app/m.py", 12)))
    spans = [replace(HOT, start_ns=n * 100 * MS, end_ns=(n * 100 + 20) * MS) for n in range(99)]
    spans += [replace(rare, start_ns=9900 * MS, end_ns=9990 * MS, samples=40)]
    spans += [replace(HOT, running=False, stage="inference"), replace(HOT, reason="loop_lag")]
    with TableFile(tmp_path, SERVER) as file:
        for n in range(100):
            duration = (90 if n == 99 else 30) * MS
            stages = [{"stage": "preprocess", "start_ns": 0, "end_ns": duration,
                       "self_ns": duration, "failed": False}]  # fmt: skip
            empty = {column.name: _empty(column.type) for column in SERVER.columns}
            file.append(
                empty | {"pid": 7, "start_ns": n * 100 * MS, "duration_ns": duration,
                         "stages": stages}
            )  # fmt: skip
    return _folder(tmp_path, spans)


def _empty(kind: str) -> object:
    return {"string": "", "bool": False}.get(kind, [] if kind.startswith("list") else 0)


def test_the_top_of_each_stage_is_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What waits is left out unless asked for; dumps are."""
    assert main(["stacks", str(run)]) == 0
    out = capsys.readouterr().out
    assert "preprocess  2.07 s" in out
    assert "hot (app/m.py)" in out
    assert "inference" not in out
    assert main(["stacks", str(run), "--waiting"]) == 0
    assert "inference  0.02 s" in capsys.readouterr().out


def test_every_format_is_written(run: Path, tmp_path: Path) -> None:
    """To a file, whole."""
    heads = {"collapsed": b"preprocess;main", "speedscope": b'{"$schema"', "pprof": b"\x1f\x8b",
             "html": b"<!doctype html>"}  # fmt: skip
    for name, head in heads.items():
        out = tmp_path / f"out.{name}"
        assert main(["stacks", str(run), "--format", name, "--out", str(out)]) == 0
        assert out.read_bytes().startswith(head)
    assert json.loads((tmp_path / "out.speedscope").read_text())["profiles"]


def test_pprof_is_never_written_to_a_terminal(run: Path) -> None:
    """Binary would garble it: one sentence says what to do."""
    ours, its = os.openpty()
    try:
        words = [sys.executable, "-m", "stagescope", "stacks", str(run), "--format", "pprof"]
        done = subprocess.run(words, stdout=its, stderr=subprocess.PIPE, timeout=60, check=False)
        os.write(its, b"end")
        assert os.read(ours, 100) == b"end"
    finally:
        os.close(ours)
        os.close(its)
    assert done.returncode == 2
    assert b"give --out FILE, or pipe it on" in done.stderr


def test_slow_names_what_the_median_lacks(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a table and as a page."""
    assert main(["stacks", str(run), "--slow"]) == 0
    out = capsys.readouterr().out
    assert "1 requests from 90.0 ms on" in out
    assert "+100  preprocess: rare (app/m.py)" in out
    page = tmp_path / "diff.html"
    assert main(["stacks", str(run), "--slow", "--format", "html", "--out", str(page)]) == 0
    assert '"diff": true' in page.read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--stage", "respond"], "has no stacks of stage respond in which something ran; it has "),
        (["--slow", "--format", "pprof"], "--slow is printed as text or html, not as pprof"),
        (["--out", "/nowhere/x"], "/nowhere/x cannot be written: No such file"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    run: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its exit code."""
    assert main(["stacks", str(run), *words]) == (1 if "--out" in words else 2)
    assert sentence in capsys.readouterr().err


def test_a_folder_without_stacks_or_with_broken_ones_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence names the file."""
    assert main(["stacks", str(tmp_path)]) == 2
    assert f"{tmp_path} has no stacks.parquet: no agent sampled" in capsys.readouterr().err
    (tmp_path / "stacks.parquet").write_bytes(b"PAR1 no")
    assert main(["stacks", str(tmp_path)]) == 2
    assert "stacks.parquet cannot be read" in capsys.readouterr().err
