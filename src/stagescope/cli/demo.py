"""The main job on an example: server, load at three rates, three tables.

Starts a PyTorch image classifier behind FastAPI on loopback, finds out how many requests a second
this machine bears, drives it below, near and over that, and prints side by side where the
requests' time went. Nothing is needed but the extra: pip install 'stagescope[demo]'.

example:
  stagescope demo --seconds 10 --out runs/first

Ctrl-C stops server and load; runs that were finished are kept and shown.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

from stagescope.cli.demo_probe import measure_capacity
from stagescope.cli.demo_rates import Rates, choose_rates
from stagescope.cli.demo_runs import Interrupted, drive, print_comparison
from stagescope.cli.demo_server import ExampleServer, example_server
from stagescope.cli.extras import needs
from stagescope.errors import EXIT_DONE, UsageError

HELP = "example server, load at three rates, three tables: a tour in a minute"
EXIT_INTERRUPTED = 130
NEEDED = ("aiohttp", "fastapi", "ibis", "numpy", "PIL", "pyarrow", "rich", "torch", "uvicorn")

Say = Callable[[str], None]


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the three run folders and the server's log; must be new or empty "
        "(default: runs/demo-DATE-TIME)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=12.0,
        metavar="N",
        help="how long each rate is driven (default: 12)",
    )


def run(args: argparse.Namespace) -> int:
    """Do the tour."""
    if not 1 <= args.seconds <= 3600:
        raise UsageError(f"--seconds is {args.seconds:g}; it must be from 1 to 3600")
    with needs("demo"):
        for module in NEEDED:
            importlib.import_module(module)
    return tour(_new_folder(args.out), args.seconds, _say)


def tour(out: Path, seconds: float, say: Say) -> int:
    """Drive the example server at three rates and print the tables of the runs that finished."""
    finished: list[Path] = []
    code = EXIT_DONE
    try:
        with example_server(out / "server.log") as server:
            _drive_all(server, out, seconds, finished, say)
    except (KeyboardInterrupt, Interrupted):
        say("interrupted: the server is stopped, finished runs are kept")
        code = EXIT_INTERRUPTED
    finally:
        if finished:
            print_comparison(finished)
    return code


def _drive_all(
    server: ExampleServer, out: Path, seconds: float, finished: list[Path], say: Say
) -> None:
    from stagescope.examples.torch_server.images import sample_jpeg

    began = time.monotonic()
    say(f"starting the example server: FastAPI, a dynamic batcher, a torch model ({server.log})")
    health = server.wait_ready()
    say(f"ready after {time.monotonic() - began:.1f} s: {server.url}, model on {health['device']}")
    image = sample_jpeg()
    say("probing how many requests a second it bears ...")
    rates = choose_rates(capacity := measure_capacity(server.url, image))
    say(f"about {capacity:.3g}; so {_words(rates)}, {seconds:g} s each")
    for step, (name, rate) in enumerate(rates._asdict().items(), 1):
        server.wait_drained()
        say(f"[{step}/{len(rates)}] {name}: {rate:g} requests/s")
        finished.append(drive(server, image, rate, seconds, out / name))
        server.check_alive()


def _words(rates: Rates) -> str:
    return ", ".join(f"{rate:g}/s ({name})" for name, rate in rates._asdict().items())


def _new_folder(asked: Path | None) -> Path:
    out = asked or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    try:
        out.mkdir(parents=True, exist_ok=True)
        used = any(out.iterdir())
    except OSError as problem:
        raise UsageError(f"--out {out}: {problem.strerror}") from None
    if used:
        raise UsageError(f"--out {out} is not empty: name a new folder, nothing is overwritten")
    return out


def _say(line: str) -> None:
    print(f"demo: {line}", file=sys.stderr, flush=True)
