"""Load a server at a fixed rate and print what holds it back, and where the time went.

Requests are sent by the clock, whatever the server does (open loop), and latency counts from
the moment that the plan meant, so a server that stalls cannot hide it.
What was measured goes into a run folder; `stagescope report` reads it again.

example:
  stagescope load http://127.0.0.1:8000/predict --rate 50 --duration 30 --body cat.jpg

Ctrl-C ends the run and reports what it has; a second Ctrl-C does not wait for open requests.
Exit code: 0 done, 1 nothing answers, 2 wrong usage or an INVALID run (the driver was too slow).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stagescope.agent.api.address import read_token
from stagescope.cli.report import add_full, print_reports
from stagescope.errors import EXIT_DONE, EXIT_USAGE
from stagescope.load_run import LoadPlan, run_load
from stagescope.loadgen.progress import Progress, Watch

HELP = "load a server at a fixed rate and print what holds it back"


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add what to send, how fast, and where to keep and to find things."""
    parser.add_argument("url", metavar="URL", help="what to load: http://HOST:PORT/PATH")
    _pace(parser)
    _request(parser)
    _places(parser)


def _pace(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pace")
    group.add_argument("--rate", type=float, default=10.0, metavar="R", help="requests/s (10)")
    group.add_argument(
        "--duration", type=float, default=30.0, metavar="S", help="seconds measured (30)"
    )
    group.add_argument(
        "--warmup", type=float, default=2.0, metavar="S", help="seconds before, not counted (2)"
    )
    group.add_argument(
        "--arrivals",
        default="poisson",
        metavar="HOW",
        help="poisson: random, as many independent users send (default); constant: evenly spaced",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="same seed, same arrivals (0)"
    )


def _request(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("request")
    group.add_argument("--method", default="", help="default: POST with a body, else GET")
    group.add_argument(
        "--header", action="append", default=[], metavar="'K: V'", help="may be given repeatedly"
    )
    group.add_argument("--body", type=Path, metavar="FILE", help="sent as it is")
    group.add_argument("--json", metavar="TEXT", help="sent as application/json")
    group.add_argument(
        "--cacert",
        type=Path,
        metavar="FILE",
        help="trust these certificates (PEM) too; SSL_CERT_FILE is read as well",
    )
    group.add_argument(
        "--insecure", action="store_true", help="leave the server's certificate unchecked"
    )
    group.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="for each request (30)"
    )


def _places(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("places and output")
    group.add_argument("--out", type=Path, metavar="DIR", help="run folder (runs/RUN-ID)")
    group.add_argument("--spool", type=Path, metavar="DIR", help="spool of this host's agent")
    group.add_argument("--agent", default="", metavar="URL", help="agent of the server's host")
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="holds the bearer token for --agent"
    )
    group.add_argument(
        "--otlp-listen", action="append", default=[], metavar="URL",
        help="take the model server's own spans here while it is loaded (vLLM, SGLang, Triton): "
        "grpc://127.0.0.1:4317 or http://127.0.0.1:4318; used where no agent has records",
    )  # fmt: skip
    group.add_argument(
        "--otlp", default="", metavar="URL",
        help="send the driver's own spans there, after the load (or set the OTEL_* variables): "
        "then traces begin with the client",
    )  # fmt: skip
    group.add_argument("--format", choices=("text", "json"), default="text")
    add_full(parser)
    group.add_argument("--quiet", action="store_true", help="no progress on standard error")


def run(args: argparse.Namespace) -> int:
    """Run it, print the table, and say where the folder is."""
    with progress(args.quiet) as watch:
        folder = run_load(_plan(args), args.url, watch)
    for note in folder.notes:
        print(f"stagescope load: {note}", file=sys.stderr)
    if not args.quiet:
        print(f"run folder: {folder.path}", file=sys.stderr)
    (report,) = print_reports([folder.path], args.format, full=args.full)
    return EXIT_DONE if report.valid else EXIT_USAGE


def _plan(args: argparse.Namespace) -> LoadPlan:
    return LoadPlan(
        rate_per_s=args.rate,
        duration_s=args.duration,
        warmup_s=args.warmup,
        arrivals=args.arrivals,
        seed=args.seed,
        timeout_s=args.timeout,
        method=args.method,
        headers=tuple(args.header),
        body=args.body,
        json_text=args.json,
        cacert=args.cacert,
        insecure=args.insecure,
        out=args.out,
        spool=args.spool,
        agent_url=args.agent,
        token=read_token(args.token_file) if args.token_file else "",
        otlp_listen=tuple(args.otlp_listen),
        otlp=args.otlp,
    )


BAR_EVERY_S = 0.5
"""Drawing takes a millisecond or two of the driver's thread: not more often."""
LINE_EVERY_S = 5.0


@contextmanager
def progress(quiet: bool) -> Iterator[Watch | None]:
    """Yield a watch that writes to standard error; None where nothing is to be shown."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar() as watch:
            yield watch
    else:
        yield Watch(lambda now: print(_line(now), file=sys.stderr, flush=True), LINE_EVERY_S)


@contextmanager
def _bar() -> Iterator[Watch]:
    from rich import progress as bars
    from rich.console import Console

    columns = (bars.BarColumn(bar_width=24), bars.TextColumn("{task.description}"))
    with bars.Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("connecting", total=1.0)

        def look(now: Progress) -> None:
            done = min(now.elapsed_s, now.whole_s)
            bar.update(task, total=now.whole_s, completed=done, description=_line(now))
            bar.refresh()

        yield Watch(look, BAR_EVERY_S)


def _line(now: Progress) -> str:
    elapsed_s = min(now.elapsed_s, now.whole_s)
    return (
        f"{elapsed_s:.0f}/{now.whole_s:.0f} s  sent {now.sent:,}/{now.planned:,}  "
        f"in flight {now.in_flight:,}  errors {now.failed:,}  "
        f"{now.rate_per_s:,.1f}/s  p50 {now.p50_ms:,.1f} ms"
    )
