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
from collections.abc import Callable, Sequence
from pathlib import Path

from stagescope.cli.demo_probe import measure_capacity
from stagescope.cli.demo_rates import Rates, choose_rates
from stagescope.cli.demo_runs import Interrupted, drive, print_comparison
from stagescope.cli.demo_server import ExampleServer, example_server
from stagescope.cli.extras import needs
from stagescope.errors import EXIT_DONE, StagescopeError, UsageError

HELP = "example server, load at three rates, three tables: a tour in a minute"
EXIT_INTERRUPTED = 130
IMAGE = "image.jpg"
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
            image, rates = _prepare(server, out, say)
            _drive_all(server, image, rates, seconds, out, finished, say)
    except (KeyboardInterrupt, Interrupted):
        say("interrupted: the server is stopped, what was measured is kept")
        code = EXIT_INTERRUPTED
    finally:
        if finished:
            print_comparison(finished)
            print(_what_next(out, finished))
    return code


def _prepare(server: ExampleServer, out: Path, say: Say) -> tuple[bytes, Rates]:
    """Wait until *server* is ready and find out what it bears."""
    from stagescope.examples.torch_server.images import sample_jpeg

    say(f"starting the example server (log: {server.log})")
    began = time.monotonic()
    health = server.wait_ready()
    say(f"ready after {time.monotonic() - began:.1f} s, its model on {health['device']}")
    image = sample_jpeg()
    (out / IMAGE).write_bytes(image)
    say("probing how many requests a second this machine bears ...")
    try:
        capacity = measure_capacity(server.url, image)
    except StagescopeError:
        server.check_alive()  # that it died says more than that it did not answer
        raise
    rates = choose_rates(capacity)
    say(f"about {capacity:.3g}, so the rates are {_words(rates)}")
    return image, rates


def _drive_all(
    server: ExampleServer,
    image: bytes,
    rates: Rates,
    seconds: float,
    out: Path,
    finished: list[Path],
    say: Say,
) -> None:
    """Drive each rate from rest; *finished* gets the run folders, so that an end keeps them."""
    for step, (name, rate) in enumerate(rates._asdict().items(), 1):
        server.wait_drained()
        say(f"run {step} of {len(rates)}, {name}: {rate:g} requests/s for {seconds:g} s")
        folder = out / name
        drive(server.url, image, rate, seconds, spool=server.spool, out=folder)
        finished.append(folder)
        server.check_alive()


def _what_next(out: Path, finished: Sequence[Path]) -> str:
    last = finished[-1]
    return f"""
run folders: {" ".join(map(str, finished))}
next:
  one run in full, with sub-stages and batches; for programs, add --format json
    stagescope report {last}
  the same server on port 8000, to load as you like
    python -m stagescope.examples.torch_server &
    stagescope load http://127.0.0.1:8000/predict --rate 20 --body {out / IMAGE}"""


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
