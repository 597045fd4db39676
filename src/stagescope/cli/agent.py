"""Read what the served processes of a spool record, and hand it on: metrics, OTLP, load runs.

One agent a spool. It runs beside the server (sidecar), or once a host; a server's embedded agent
yields to it. It tails every recorder file, workers may come and go, and a restart neither loses
nor doubles a record.

  stagescope agent                                   this user's spool
  stagescope agent --spool /run/models --metrics-port 0.0.0.0:9464
  stagescope agent --otlp http://collector:4318      spans and metrics; or set the OTEL_* variables
  stagescope agent --listen 0.0.0.0:8900             load drivers on other hosts, with a token
  curl --unix-socket SPOOL/agent.sock http://agent/counters

Ctrl-C or SIGTERM: reads what is there, flushes, saves its place, exits with 0.
Exit code 3: another agent holds the spool; the message names it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "read what the servers record, and hand it on; beside a server or once a host"


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--spool", type=Path, metavar="DIR",
        help="folder of the recorder files (default: STAGESCOPE_SPOOL, else one per user)",
    )  # fmt: skip
    parser.add_argument(
        "--listen", metavar="HOST:PORT",
        help="serve the control API over TCP too, to clients with the token; port 0 picks one",
    )  # fmt: skip
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE",
        help="file with the bearer token of --listen (default: one is made, printed once and "
        "kept as agent.token in the spool)",
    )  # fmt: skip
    parser.add_argument(
        "--metrics-port", metavar="[HOST:]PORT",
        help="serve /metrics for Prometheus here; 0 picks a port, `off` serves none "
        "(default: OTEL_EXPORTER_PROMETHEUS_HOST and _PORT, else 127.0.0.1:9464 if it is free)",
    )  # fmt: skip
    parser.add_argument(
        "--otlp", metavar="URL",
        help="send spans and metrics there by OTLP, as OTEL_EXPORTER_OTLP_ENDPOINT does",
    )  # fmt: skip
    parser.add_argument(
        "--samplers", metavar="NAMES",
        help="what to sample, with commas between, or `off` (default: STAGESCOPE_SAMPLERS, else "
        "all that can be read here; `stagescope doctor` says which)",
    )  # fmt: skip
    parser.add_argument("--once", action="store_true", help="read what is there now, and end")
    parser.add_argument(
        "--quiet", action="store_true", help="print only what is wrong, not who comes and goes"
    )


def run(args: argparse.Namespace) -> int:
    """Run the agent until it is told to stop."""
    from stagescope.agent.process import Settings, run_agent

    return run_agent(
        Settings(
            spool=args.spool,
            listen=args.listen,
            token_file=args.token_file,
            metrics=args.metrics_port,
            otlp_url=args.otlp,
            samplers=args.samplers,
            once=args.once,
            quiet=args.quiet,
        )
    )
