"""Print what holds a server back, and where the time of stored load runs went; or JSON.

Reads a run folder that `stagescope load` wrote (`run.json` and its Parquet tables), of this or
an older version, joins the client's records with the server's, and splits client latency into
client wait, connect, network, the server's stages, and what nothing explains.
Of one run it prints a first screen: the verdict, why, and what to do; with --full all tables.
Of several runs it prints each verdict, mean and p99 side by side, and which part grew.
With --client-file it makes the run folder first: it joins the requests that a client of your own
sent, and wrote down as docs/own-client.md says, with what the agent recorded of them.
With --live it reads no folder: it asks the agent what the last minute of requests looked like.

examples:
  stagescope report runs/20250101-120000
  stagescope report runs/20250101-120000 --full
  stagescope report runs/demo/low runs/demo/middle runs/demo/over
  stagescope report --client-file requests.jsonl --run 20250101-120000-0123456789abcdef
  stagescope report --live
  stagescope report runs/20250101-120000 --format json | jq '.stages[] | {stage, p99_ms}'

exit code: 0; 1 where --live found no request; 2 where a DIR is no readable run folder, a client's
file is not usable, or a run is INVALID (its report is printed all the same, and says why).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stagescope.agent.api.address import read_token
from stagescope.agent.api.client import AgentClient
from stagescope.agent.store.live import WINDOW_S, RouteSummary, to_json
from stagescope.cli.capture_table import aligned
from stagescope.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, UsageError, needs
from stagescope.load_run import join_client_file
from stagescope.recorder.spool import SOCKET_NAME, default_spool
from stagescope.stages import OTHER, STAGES

if TYPE_CHECKING:
    from stagescope.analysis.report import Report

HELP = "print the table of stored runs, or their JSON"
FORMATS = ("text", "json")


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("dirs", type=Path, metavar="DIR", nargs="*", help="a run folder")
    parser.add_argument(
        "--format", choices=FORMATS, default="text", help="text for people, json for machines"
    )
    add_full(parser)
    own = parser.add_argument_group("requests of a client of your own (docs/own-client.md)")
    own.add_argument(
        "--client-file", type=Path, metavar="FILE", help="its requests: .jsonl, .csv or .parquet"
    )
    own.add_argument("--run", metavar="ID", dest="run_id", help="the run that it named in baggage")
    own.add_argument("--url", default="", help="what it loaded: the port tells the server's spool")
    own.add_argument("--out", type=Path, metavar="DIR", help="run folder (runs/ID)")
    live = parser.add_argument_group("the last minute, without a load run")
    live.add_argument(
        "--live", action="store_true", help="ask the agent of this host, by service and route"
    )
    live.add_argument(
        "--seconds",
        type=int,
        default=WINDOW_S,
        metavar="N",
        help=f"of the last N (default, and at most: {WINDOW_S})",
    )
    add_agent_arguments(parser)


def add_full(parser: argparse.ArgumentParser) -> None:
    """Add the option that prints the long tables."""
    parser.add_argument(
        "--full", action="store_true", help="the long tables too: every part, stage and resource"
    )


def add_agent_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name an agent."""
    group = parser.add_argument_group("which agent to ask, where one is asked")
    group.add_argument("--spool", type=Path, metavar="DIR", help="spool of this host's agent")
    group.add_argument("--agent", default="", metavar="URL", help="elsewhere: http://HOST:PORT")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="token for --agent")


def run(args: argparse.Namespace) -> int:
    """Print the report; an INVALID run's exit code is 2, so that a script can't miss it."""
    if args.live:
        return _print_live(args)
    if args.client_file or args.run_id:
        folders: list[Path] = [_joined(args)]
    elif not (folders := args.dirs):
        raise UsageError("give a run folder, or --live for the last minute of a running server")
    reports = print_reports(folders, args.format, full=args.full)
    return EXIT_DONE if all(report.valid for report in reports) else EXIT_USAGE


def _joined(args: argparse.Namespace) -> Path:
    """Join a client's file with the agent's records, and return the run folder."""
    if args.dirs or not (args.client_file and args.run_id):
        raise UsageError("give --client-file FILE and --run ID together, and no DIR")
    folder = join_client_file(
        args.client_file,
        args.run_id,
        url=args.url,
        out=args.out,
        spool=args.spool,
        agent_url=args.agent,
        token=read_token(args.token_file) if args.token_file else "",
    )
    for note in folder.notes:
        print(f"stagescope report: {note}", file=sys.stderr)
    print(f"run folder: {folder.path}", file=sys.stderr)
    return folder.path


def _print_live(args: argparse.Namespace) -> int:
    """Print what the agent saw in the last seconds; return 1 where no request ended."""
    if args.dirs:
        raise UsageError("--live reads no run folder: leave out DIR, or --live")
    if not 1 <= args.seconds <= WINDOW_S:
        raise UsageError(f"--seconds {args.seconds}: give a whole number from 1 to {WINDOW_S}")
    if args.agent:
        client = AgentClient(args.agent, read_token(args.token_file) if args.token_file else None)
    else:
        client = AgentClient((args.spool or default_spool()) / SOCKET_NAME)
    found = client.live(args.seconds)
    if args.format == "json":
        print(json.dumps(to_json(found, args.seconds), indent=2))
    elif found:
        print("\n".join(_live_lines(found, args.seconds)))
    else:
        print(f"no request ended in the last {args.seconds} s", file=sys.stderr)
    return EXIT_DONE if found else EXIT_FAILED


def _live_lines(found: Sequence[RouteSummary], seconds: int) -> Iterator[str]:
    """Yield two tables a service: rates and latency of each route, and where its mean went."""
    for service in dict.fromkeys(one.service for one in found):
        routes = [one for one in found if one.service == service]
        count, errors = sum(one.requests for one in routes), sum(one.errors for one in routes)
        yield f"{service}: {count / seconds:,.1f} requests/s, {errors:,} errors, last {seconds} s"
        yield ""
        yield from aligned(
            [
                ("route", "per s", "errors", "mean ms", "p50", "p95", "p99"),
                *(
                    (
                        one.route or "(no route)",
                        f"{one.requests / seconds:,.1f}",
                        f"{one.errors:,}",
                        *(
                            _ms(value)
                            for value in (one.mean_ms, one.p50_ms, one.p95_ms, one.p99_ms)
                        ),
                    )
                    for one in routes
                ),
            ]
        )
        yield ""
        recorded = {stage for one in routes for stage in one.stages_ms}
        custom = sorted(recorded - {*STAGES, OTHER})
        stages = [stage for stage in (*STAGES, *custom, OTHER) if stage in recorded]
        yield from aligned(
            [
                ("mean ms by stage", *stages),
                *(
                    (one.route or "(no route)", *(_ms(one.stages_ms.get(name)) for name in stages))
                    for one in routes
                ),
            ]
        )
        yield ""
    yield "Percentiles are at most 6 % too high; – is a stage not recorded, or too few requests."


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"


def print_reports(
    folders: Sequence[Path], fmt: str = "text", *, full: bool = False
) -> Sequence[Report]:
    """Print the report of the runs in *folders* as *fmt*, `text` or `json`, and return them.

    One is its first screen, and where *full* the long tables below; several are a table side by
    side, or a JSON list. Raise UsageError where a folder cannot be
    read, or the `load` extra is missing.
    """
    with needs("load"):
        from rich.console import Console

        from stagescope.analysis.build import build_report
        from stagescope.analysis.screen import FirstScreen, side_by_side, slowest
        from stagescope.analysis.table import render
    reports = [build_report(folder) for folder in folders]
    if fmt == "json":
        found = [report.to_json() for report in reports]
        print(json.dumps(found if len(found) > 1 else found[0], indent=2))
    else:
        console = Console()
        console.print(FirstScreen(reports[0]) if len(reports) == 1 else side_by_side(reports))
        for report in reports if full else ():
            console.print("", render(report))
            if report.tail:
                console.print("", slowest(report.tail))
    return reports
