"""Print where the time of stored load runs went: one table, or JSON.

Reads a run folder that `stagescope load` wrote (`run.json` and its Parquet tables), of this or
an older version, joins the client's records with the server's, and splits client latency into
client wait, connect, network, the server's stages, and what nothing explains.
Of several runs it prints mean and p99 side by side, and which part grew from each to the next.

examples:
  stagescope report runs/20250101-120000
  stagescope report runs/demo/low runs/demo/middle runs/demo/over
  stagescope report runs/20250101-120000 --format json | jq '.stages[] | {stage, p99_ms}'

exit code: 0; 2 where a DIR is no readable run folder, or a run is INVALID (its report is printed
all the same, and says why).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stagescope.errors import EXIT_DONE, EXIT_USAGE, needs

if TYPE_CHECKING:
    from stagescope.analysis.report import Report

HELP = "print the table of stored runs, or their JSON"
FORMATS = ("text", "json")


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("dirs", type=Path, metavar="DIR", nargs="+", help="a run folder")
    parser.add_argument(
        "--format", choices=FORMATS, default="text", help="text for people, json for machines"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; an INVALID run's exit code is 2, so that a script can't miss it."""
    reports = print_reports(args.dirs, args.format)
    return EXIT_DONE if all(report.valid for report in reports) else EXIT_USAGE


def print_reports(folders: Sequence[Path], fmt: str = "text") -> Sequence[Report]:
    """Print the report of the runs in *folders* as *fmt*, `text` or `json`, and return them.

    Several are a table side by side, or a JSON list. Raise UsageError where a folder cannot be
    read, or the `load` extra is missing.
    """
    with needs("load"):
        from rich.console import Console

        from stagescope.analysis.build import build_report
        from stagescope.analysis.table import render, side_by_side
    reports = [build_report(folder) for folder in folders]
    if fmt == "json":
        found = [report.to_json() for report in reports]
        print(json.dumps(found if len(found) > 1 else found[0], indent=2))
    else:
        Console().print(render(reports[0]) if len(reports) == 1 else side_by_side(reports))
    return reports
