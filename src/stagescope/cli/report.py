"""Print where the time of a stored load run went: one table, or JSON.

Reads a run folder that `stagescope load` wrote (`run.json` and its Parquet tables), of this or
an older version, joins the client's records with the server's, and splits client latency into
client wait, connect, network, the server's stages, and what nothing explains.

examples:
  stagescope report runs/20250101-120000
  stagescope report runs/20250101-120000 --format json | jq '.stages[] | {stage, p99_ms}'

exit code: 0; 2 where DIR is no readable run folder, or the run is INVALID (its report is printed
all the same, and says why).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from stagescope.errors import EXIT_DONE, EXIT_USAGE, needs

if TYPE_CHECKING:
    from stagescope.analysis.report import Report

HELP = "print the table of a stored run, or its JSON"
FORMATS = ("text", "json")


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="the run folder")
    parser.add_argument(
        "--format", choices=FORMATS, default="text", help="text for people, json for machines"
    )


def run(args: argparse.Namespace) -> int:
    """Print the report; an INVALID run's exit code is 2, so that a script can't miss it."""
    return EXIT_DONE if print_report(args.dir, args.format).valid else EXIT_USAGE


def print_report(folder: Path, fmt: str = "text") -> Report:
    """Print the report of the run in *folder* as *fmt*, `text` or `json`, and give it.

    Raises UsageError where the folder cannot be read, or the `load` extra is missing.
    """
    with needs("load"):
        from rich.console import Console

        from stagescope.analysis.build import build_report
        from stagescope.analysis.table import render
    report = build_report(folder)
    if fmt == "json":
        print(json.dumps(report.to_json(), indent=2))
    else:
        Console().print(render(report))
    return report
