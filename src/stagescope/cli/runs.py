"""Open a run for a client of your own (a script, k6, Locust), and close one that is given up.

`open` prints the run's id. The client sends it with each request, and a trace id of the request's
own, and writes down when each was sent and answered; `stagescope report --client-file` joins that
with the agent's records, and closes the run. docs/own-client.md has the headers and the format.

example:
  RUN=$(stagescope runs open --url http://127.0.0.1:8000/)
  my-client --header "baggage: stagescope.run=$RUN" > requests.jsonl
  stagescope report --client-file requests.jsonl --run "$RUN"

exit code: 0; 1 where no agent answers; 2 where an id is not usable.
"""

from __future__ import annotations

import argparse

from stagescope.agent.api.address import read_token
from stagescope.cli.report import add_agent_arguments
from stagescope.errors import EXIT_DONE, StagescopeError, UsageError, needs
from stagescope.identity import check_run_id

HELP = "open a run for a client of your own"


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add what to do, and where the agent is."""
    parser.add_argument("action", choices=("open", "close"), metavar="open|close")
    parser.add_argument("run_id", metavar="ID", nargs="?", help="of `open`: a name of your own")
    parser.add_argument("--url", default="", help="what is loaded: its port tells the spool")
    add_agent_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Do it at the agent; print the id of a run that was opened."""
    with needs("load"):
        from stagescope.load_run.locate import AgentLocation, locate
        from stagescope.load_run.run import fresh_run_id
        from stagescope.loadgen.target import target
    if args.run_id:
        check_run_id(args.run_id)
    elif args.action == "close":
        raise UsageError("give the id of the run to close")
    token = read_token(args.token_file) if args.token_file else ""
    named = AgentLocation(args.spool, args.agent, token)
    place = locate(named, target(args.url) if args.url else None)
    client = place.client()
    if client is None:
        raise StagescopeError(place.reason)
    if args.action == "close":
        client.close_run(args.run_id)
        return EXIT_DONE
    run_id = args.run_id or fresh_run_id()
    if not client.open_run(run_id):
        raise StagescopeError(f"the agent at {client.address} is older than this stagescope")
    print(run_id)
    return EXIT_DONE
