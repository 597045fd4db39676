"""Whatever function of ours raises, the app answers as it does without us, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest

from tests.middleware.raising_functions import EXEMPT, NOT_REACHED, ROOT
from tests.support.planted_faults import targets

pytestmark = pytest.mark.timeout(900)  # Hundreds of servers' lives in the first one's fixture.

KINDS = ("apps", "models") if find_spec("torch") else ("apps",)
"""The models are torch's: on the Pythons where that is not installed the apps are tried alone."""
STAYS_OPEN = {"middleware/runtime/cold_start.py:end": 1}
"""Slots that are in use still: a process whose cold start cannot end is cold."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Let each function raise in a process of its own: at every call, then at the second alone."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.middleware.raising_functions",
             tmp_path_factory.mktemp(kind), kind],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for kind in KINDS
    ]  # fmt: skip
    try:
        with ThreadPoolExecutor() as readers:
            said = list(readers.map(lambda one: one.communicate(timeout=900), running))
    finally:
        for one in running:
            one.kill()
            one.wait()
    assert {one.returncode for one in running} == {0}, "".join(log[-4000:] for _, log in said)
    return [
        json.loads(line) for output, _ in said for line in output.splitlines() if line[0] == "{"
    ]


def test_unplanted_apps_answer_as_without_us(rows: list[dict[str, Any]]) -> None:
    """Plain, in a load run, beside the app's OpenTelemetry, with models, behind a real uvicorn."""
    plain = [row for row in rows if row.get("name") == ""]
    assert [row["mode"] for row in plain] == ["plain", "run", "spans", "served", *KINDS[1:]]
    assert {(row["differs"], row["lost"]) for row in plain} == {("", 0)}


def test_no_function_that_raises_reaches_the_app(rows: list[dict[str, Any]]) -> None:
    """Answers are the same byte for byte, for each shape of app."""
    raised = [row for row in rows if row.get("hits")]
    assert len({row["name"] for row in raised}) > 150
    assert [row for row in raised if row["differs"]] == []


def test_no_slot_is_lost_and_every_fault_is_counted(rows: list[dict[str, Any]]) -> None:
    """The recorder counts it; where there is no recorder yet, the log names it."""
    raised = [row for row in rows if row.get("hits")]
    lost = [row for row in raised if not 0 <= row["lost"] <= STAYS_OPEN.get(row["name"], 0)]
    assert lost == []
    assert [row for row in raised if not row["counted"] and not row["logged"]] == []


def test_what_is_exempt_exists() -> None:
    """No exemption outlives its function."""
    ours = [*(ROOT / "middleware").rglob("*.py"), *(ROOT / "src" / "stagescope").glob("*.py")]
    names = {target.name for target in targets(ROOT, ours)}
    assert sorted(EXEMPT.keys() - names) == []


def test_every_file_of_the_middleware_is_tried(rows: list[dict[str, Any]]) -> None:
    """Or it is left out by name, with a reason."""
    tried = {row["name"].partition(":")[0] for row in rows if row.get("hits")}
    tried |= {name.partition(":")[0] for name in EXEMPT}
    files = {
        target.name.partition(":")[0]
        for target in targets(ROOT, sorted((ROOT / "middleware").rglob("*.py")))
    }
    left = {file for file in files - tried if not file.startswith(tuple(NOT_REACHED))}
    assert left == set()
    assert [part for part in NOT_REACHED if not any(file.startswith(part) for file in files)] == []
