"""docs/report-schema.md and the JSON say the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stagescope.analysis.build import build_report
from tests.support.planted_run import planted_run

DOC = Path(__file__).parents[2] / "docs" / "report-schema.md"
FREE = ("run", "errors", "status", "stalls_s", "known_by")
"""Objects whose keys are data, or are described elsewhere."""


def keys(value: Any) -> Iterator[str]:
    """Yield every key at any depth, less those inside FREE."""
    for each in value if isinstance(value, list) else []:
        yield from keys(each)
    for key, each in value.items() if isinstance(value, dict) else []:
        yield key
        by_cause = key == "waits" and isinstance(each, dict)
        if key not in FREE and not by_cause:
            yield from keys(each)


def test_every_key_is_documented(tmp_path: Path) -> None:
    """The keys of a report are the keys of the page, no more and no fewer."""
    report = json.loads(json.dumps(build_report(planted_run(tmp_path)).to_json()))
    documented = set(re.findall(r"^\| `(\w+)` \|", DOC.read_text("utf-8"), re.MULTILINE))

    assert set(keys(report)) == documented
