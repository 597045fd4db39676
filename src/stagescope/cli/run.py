"""Start any Python model server with stages recorded and an agent beside it; no code changes.

In every Python process that CMD starts, hooks are installed when their framework is imported,
and an ASGI app that uvicorn, hypercorn, granian or gunicorn loads is wrapped in StageMiddleware.
Standard input and output are CMD's, signals are passed on to it, and the exit code is that of CMD
(128+N where signal N ended it).

  stagescope run -- uvicorn app:app --workers 4
  stagescope run --service resnet -- gunicorn -k uvicorn.workers.UvicornWorker app:app
  stagescope run --otlp http://collector:4318 -- python server.py
  STAGESCOPE_DISABLE=1 stagescope run -- uvicorn app:app     without stagescope

When CMD has ended, processes that it left behind are ended too: so run the server in the foreground.
"""

from __future__ import annotations

import argparse
import os
import sys
from math import inf
from pathlib import Path

from stagescope import settings
from stagescope.errors import UsageError

HELP = "start any server command with hooks and an agent, no code change"

GRACE_S = 5.0


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.usage = "stagescope run [options] -- CMD ..."
    parser.add_argument(
        "--service", metavar="NAME",
        help="the service's name in every record (default: OTEL_SERVICE_NAME, else model-server)",
    )  # fmt: skip
    parser.add_argument(
        "--spool", type=Path, metavar="DIR",
        help="folder of the recorder files (default: STAGESCOPE_SPOOL, else one per user)",
    )  # fmt: skip
    parser.add_argument(
        "--otlp", metavar="URL", help="the agent sends spans and metrics there by OTLP"
    )
    parser.add_argument(
        "--metrics-port", metavar="[HOST:]PORT",
        help="the agent serves /metrics for Prometheus here (default: nowhere, the server may want "
        "the port)",
    )  # fmt: skip
    parser.add_argument(
        "--samplers", metavar="NAMES",
        help="what the agent samples, as in `stagescope agent`: names with commas between, or `off`",
    )  # fmt: skip
    parser.add_argument(
        "--no-agent", action="store_true", help="only record: an agent elsewhere reads the spool"
    )
    parser.add_argument(
        "--grace", type=float, default=GRACE_S, metavar="SECONDS",
        help="what processes left behind by CMD get between SIGTERM and SIGKILL "
        f"(default: {GRACE_S:g})",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="the agent prints only what is wrong")
    parser.add_argument("server", nargs=argparse.REMAINDER, metavar="CMD ...")


def run(args: argparse.Namespace) -> int:
    """Run the server until it ends, and return its exit code."""
    from stagescope.cli.run_supervisor import Settings, find_command, supervise

    if not 0 <= args.grace < inf:
        raise UsageError(f"--grace {args.grace}: give seconds, 0 or more")
    words: list[str] = args.server[1:] if args.server[:1] == ["--"] else args.server
    program = find_command(words)
    if settings.DISABLE.on():
        sys.stdout.flush()
        os.execv(program, words)
    return supervise(
        program,
        Settings(
            words=tuple(words),
            service=args.service,
            spool=args.spool,
            otlp=args.otlp,
            metrics=args.metrics_port,
            samplers=args.samplers,
            agent=not args.no_agent,
            quiet=args.quiet,
            grace_s=args.grace,
        ),
    )
