"""What stagescope costs a server, beside the other instruments, in one run.

Two questions, two tables. In the process: the app is awaited directly, without a network, in
blocks of requests that alternate between all variants; the figure is CPU time of the process.
Under load: the same app in a real uvicorn at a steady rate; the figure is the CPU time of the
whole server process, agent thread or exporter included.

  python benchmarks/overhead.py                      both tables, about three minutes
  python benchmarks/overhead.py --quick              a look, ten seconds; figures are rough
  python benchmarks/overhead.py --markdown           the tables of docs/performance.md
  python benchmarks/overhead.py --json figures.json  for machines

docs/performance.md says what each variant is and how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))  # measures this checkout

import overhead_in_process as in_process
import overhead_under_load as under_load
from overhead_in_process import InProcess, Spread
from overhead_under_load import UnderLoad
from rich.console import Console
from rich.table import Table

from stagescope.recorder.spool import default_spool

BLOCK = 200
FAMILIES = {"fastapi": "FastAPI: ", "apart": "FastAPI, a process each: "}
LIBRARIES = ("fastapi", "starlette", "uvicorn", "opentelemetry-sdk",
             "opentelemetry-instrumentation-asgi", "starlette-exporter")  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Describe the options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="few short rounds")
    made.add_argument("--rounds", type=int, default=60, metavar="N",
                      help="rounds in the process, each a block of every variant (default 60)")  # fmt: skip
    made.add_argument("--turns", type=int, default=5, metavar="N",
                      help="turns of each server under load (default 5)")  # fmt: skip
    made.add_argument("--seconds", type=float, default=3.0, metavar="S",
                      help="length of one turn under load (default 3)")  # fmt: skip
    made.add_argument("--rate", type=float, default=400.0, metavar="R",
                      help="requests a second under load (default 400)")  # fmt: skip
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    made.add_argument("--markdown", action="store_true", help="print Markdown")
    return made


def main() -> None:
    """Measure, print, write."""
    options = parser().parse_args()
    if options.quick:
        options.rounds, options.turns, options.seconds = 3, 2, 0.2
    if min(options.rounds, options.turns) < 2 or options.rate <= 0 or options.seconds <= 0:
        parser().error("--rounds and --turns need 2 at least, --rate and --seconds more than 0")
    figures = measure(options)
    if options.json:
        options.json.write_text(json.dumps(as_json(figures, options), indent=1) + "\n")
    for table in (table_in_process(figures[0]), table_under_load(figures[1])):
        print_markdown(table) if options.markdown else screen().print(table)


Figures = tuple[list[InProcess], list[UnderLoad]]


def measure(options: argparse.Namespace) -> Figures:
    """Run both parts on recorder files where the default spool would be."""
    progress = Console(stderr=True)
    spools = Path(tempfile.mkdtemp(prefix="stagescope-overhead-", dir=spool_parent()))
    try:
        with progress.status("in the process") as status:
            first = in_process.measure(
                spools / "in-process", options.rounds, BLOCK,
                lambda done: status.update(f"in the process: round {done} of {options.rounds}"),
            )  # fmt: skip
            status.update("under load: servers start")
            second = under_load.measure(
                spools, options.turns, options.rate, options.seconds,
                0.3 if options.quick else under_load.SETTLE_S,
                lambda done: status.update(f"under load: turn {done} of {options.turns}"),
            )  # fmt: skip
    finally:
        shutil.rmtree(spools)
    return first, second


def spool_parent() -> Path:
    """Return the file system of the default spool: memory, where there is such."""
    parent = default_spool().parent
    return parent if os.access(parent, os.W_OK) else Path(tempfile.gettempdir())


def as_json(figures: Figures, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures with what they were measured on; times in µs a request."""
    return {
        "machine": {
            "cores": os.cpu_count(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "libraries": {name: version(name) for name in LIBRARIES},
        },
        "plan": {
            "rounds": options.rounds, "block": BLOCK, "turns": options.turns,
            "seconds": options.seconds, "rate": options.rate,
        },
        "in_process": [asdict(line) for line in figures[0]],
        "under_load": [asdict(line) for line in figures[1]],
    }  # fmt: skip


def spread(value: Spread | None) -> str:
    """Show a median with its quartiles."""
    if value is None:
        return "-"
    return f"{value.median_us:.1f} ({value.q1_us:.1f}…{value.q3_us:.1f})"


def table_in_process(lines: list[InProcess]) -> Table:
    """Lay out the first table."""
    table = Table(title="In the process: µs CPU a request, median (quartiles)")
    for column in ("variant", "a request", "over bare", "times stagescope", "spans"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    ours = {line.bare: line.over_bare for line in lines if line.variant.endswith("stagescope-6")}
    for line in lines:
        own = ours.get(line.bare)
        times = "-"
        if own and line.over_bare and "stagescope" not in line.variant:
            times = f"{line.over_bare.median_us / own.median_us:.0f}"
        family = FAMILIES.get(line.variant.partition("-")[0], "ASGI: ")
        table.add_row(family + line.what, spread(line.cost), spread(line.over_bare), times,
                      f"{line.spans_per_request:.0f}" if line.spans_per_request else "-")  # fmt: skip
    return table


def table_under_load(lines: list[UnderLoad]) -> Table:
    """Lay out the second table."""
    table = Table(title="Under load: µs CPU of the server process a request, median (quartiles)")
    for column in ("variant", "a request", "over bare", "agent's process"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for line in lines:
        cost = line.absent or spread(line.cost)
        table.add_row(line.what, cost, spread(line.over_bare), spread(line.beside))
    return table


def screen() -> Console:
    """Return the screen; a pipe is taken as wide enough for one line a variant."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def print_markdown(table: Table) -> None:
    """Print *table* as Markdown, with its title and, above, the machine."""
    print(f"\n**{table.title}** ({os.cpu_count()} cores, Python {platform.python_version()})\n")
    print("| " + " | ".join(str(column.header) for column in table.columns) + " |")
    print("| --- " + "| ---: " * (len(table.columns) - 1) + "|")
    for row in zip(*(column.cells for column in table.columns), strict=True):
        print("| " + " | ".join(str(cell) for cell in row) + " |")


if __name__ == "__main__":
    main()
