"""A hook of another package: installed by pip, found by its entry point, switched off where it raises."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "third_party_hook"
TRY = """
import logging, sys
logging.basicConfig()
from stagescope.middleware.hooks import autoload
autoload.begin()
import asyncio, sparrow
from pathlib import Path
from contextlib import closing
from stagescope.testing.recording import Recording
model = sparrow.Model()
with closing(Recording(Path(sys.argv[1]))) as recording:
    with recording.request():
        assert model.answer("one two") == "two"
    for stage, spent in recording.requests[-1].self_ns().items():
        print(stage, spent)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example by pip, into a folder of its own."""
    source = tmp_path_factory.mktemp("source") / "sparrow"
    shutil.copytree(EXAMPLE, source)  # building writes beside the sources
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--target", str(folder), str(source)],
        check=True, timeout=120,
    )  # fmt: skip
    return folder


def shown(installed: Path, spool: Path, **environ: str) -> tuple[dict[str, int], str]:
    """Return the nanoseconds of each stage of one request, and the log."""
    done = subprocess.run(
        [sys.executable, "-c", TRY, str(spool)],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{installed}"} | environ,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (line.split() for line in done.stdout.splitlines())
    return {stage: int(spent) for stage, spent in lines}, done.stderr


def test_a_package_of_its_own_is_recognised(installed: Path, tmp_path: Path) -> None:
    """Its library's calls are stages, and the part within has its own time."""
    stages, log = shown(installed, tmp_path)
    assert stages["inference"] >= 20_000_000, log
    assert stages["preprocess.tokenize"] >= 10_000_000


def test_it_can_be_switched_off(installed: Path, tmp_path: Path) -> None:
    """`STAGESCOPE_HOOKS=-sparrow` leaves the library alone."""
    stages, _ = shown(installed, tmp_path, STAGESCOPE_HOOKS="-sparrow")
    assert set(stages) == {"other"}


def test_one_that_raises_is_switched_off_and_named(installed: Path, tmp_path: Path) -> None:
    """The app answers as without it, and the log says once which hook it was."""
    broken = tmp_path / "broken"
    shutil.copytree(installed, broken)
    hook = broken / "stagescope_sparrow.py"
    hook.write_text(hook.read_text().replace("    from sparrow import Model\n", "    1 / 0\n"))
    stages, log = shown(broken, tmp_path)
    assert set(stages) == {"other"}
    assert log.count("hook sparrow (stagescope_sparrow) is switched off") == 1
