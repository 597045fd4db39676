"""Print or write the Python stacks of a stored load run, by stage.

Reads `stacks.parquet` of a run folder, which is there where an agent sampled stacks (by default
while a load run is under way). With nothing more it prints the top of each stage; --format writes
a file for other tools, or a flame graph as one HTML page that needs no network. --slow shows what
the slowest 1 % of the requests ran that the median ones did not.

examples:
  stagescope stacks runs/20250101-120000
  stagescope stacks runs/20250101-120000 --stage preprocess --format html --out preprocess.html
  stagescope stacks runs/20250101-120000 --slow
  stagescope stacks runs/20250101-120000 --format speedscope | gzip > stacks.speedscope.json.gz

exit code: 0; 2 where DIR is no readable run folder, or has no stacks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stagescope.errors import EXIT_DONE, StagescopeError, UsageError, needs
from stagescope.stacks import StackSpan

if TYPE_CHECKING:
    from stagescope.analysis.stacks import SlowDiff

HELP = "Python stacks of a stored run by stage: top, flame graph, slow against median"
FORMATS = ("text", "collapsed", "speedscope", "pprof", "html")
MOST_LINES = 12


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="the run folder")
    parser.add_argument("--stage", metavar="NAME", help="this stage and its sub-stages only")
    parser.add_argument(
        "--format", choices=FORMATS, default="text", help="text for people, the others for tools"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there; default: print")
    parser.add_argument(
        "--slow",
        action="store_true",
        help="slowest 1 %% of the requests against those from p25 to p75 (text or html)",
    )
    parser.add_argument(
        "--waiting", action="store_true", help="count threads that wait inside a stage, too"
    )


def run(args: argparse.Namespace) -> int:
    """Read, choose, write."""
    if args.slow and args.format not in ("text", "html"):
        raise UsageError(f"--slow is printed as text or html, not as {args.format}")
    if args.format == "pprof" and args.out is None and sys.stdout.isatty():
        raise UsageError("pprof is binary, nothing for a terminal: give --out FILE, or pipe it on")
    with needs("load"):
        from stagescope.analysis.stacks import read_stacks
    every = read_stacks(args.dir)
    spans = [span for span in every if _wanted(span, args.stage, waiting=args.waiting)]
    if not spans:
        raise UsageError(_nothing(args.dir, every, args.stage))
    _write(_slow(args, spans) if args.slow else _whole(args, spans), args.out)
    return EXIT_DONE


def _wanted(span: StackSpan, stage: str | None, *, waiting: bool) -> bool:
    # Dumps are of one moment, taken for a reason: they would not tell of the whole.
    in_stage = stage is None or span.stage == stage or span.stage.startswith(f"{stage}.")
    return span.reason == "window" and in_stage and (span.running or waiting)


def _nothing(folder: Path, every: Sequence[StackSpan], stage: str | None) -> str:
    stages = sorted({span.stage for span in every if span.running and span.stage})
    where = f" of stage {stage}" if stage else ""
    return (
        f"{folder} has no stacks{where} in which something ran"
        f"; it has some of: {', '.join(stages) or 'no stage'}"
        " (--waiting shows threads that wait, too)"
    )


def _whole(args: argparse.Namespace, spans: Sequence[StackSpan]) -> str | bytes:
    from stagescope.exporters.flame_graph import flame_graph, seconds, tree
    from stagescope.exporters.stack_formats import collapsed, pprof, speedscope

    match args.format:
        case "collapsed":
            return collapsed(spans)
        case "speedscope":
            return json.dumps(speedscope(spans, args.dir.name)) + "\n"
        case "pprof":
            return pprof(spans)
        case "html":
            return flame_graph(
                tree(seconds(spans)), f"Stacks by stage: {args.dir.name}", _about(spans)
            )
        case _:
            from stagescope.analysis.stacks import top_text

            return top_text(spans, _about(spans), MOST_LINES)


def _slow(args: argparse.Namespace, spans: Sequence[StackSpan]) -> str:
    from stagescope.analysis.stacks import diff_text, read_requests, slow_diff
    from stagescope.exporters.flame_graph import diff_tree, flame_graph

    diff = slow_diff(spans, read_requests(args.dir))
    if not diff.slow or not diff.median:
        raise UsageError(
            f"{args.dir} has too few stacks that lie over its requests: {len(diff.slow)} of slow, "
            f"{len(diff.median)} of median ones; a longer run has more"
        )
    if args.format == "text":
        return diff_text(diff, _about_diff(diff), MOST_LINES)
    root = diff_tree(diff.slow, diff.median)
    title = f"Slow against median: {args.dir.name}"
    return flame_graph(root, title, _about_diff(diff), unit="share", diff=True)


def _about(spans: Sequence[StackSpan]) -> str:
    samples = sum(span.samples for span in spans)
    how = ", ".join(sorted({span.how for span in spans}))
    pids = len({span.pid for span in spans})
    processes = "1 process" if pids == 1 else f"{pids} processes"
    return f"{samples} samples of {processes}, by {how}"


def _about_diff(diff: SlowDiff) -> str:
    return (
        f"{diff.slow_requests} requests from {diff.slow_from_ns / 1e6:.1f} ms on (slowest 1 %) "
        f"against {diff.median_requests} from p25 to p75; {len(diff.slow)} and "
        f"{len(diff.median)} stacks, {diff.unmatched} over no request of this run"
    )


def _write(text: str | bytes, out: Path | None) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    if out is None:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
        return
    try:
        out.write_bytes(data)
    except OSError as problem:
        raise StagescopeError(f"{out} cannot be written: {problem.strerror}") from None
    print(f"{out}: {len(data):,} bytes", file=sys.stderr)
