"""Show what stagescope does on an example server: load at three rates, three tables.

Starts an image classifier behind FastAPI on loopback (ONNX Runtime, or torch where you have it),
measures how many requests a second this machine can serve, drives the server below, near and over
that rate, and prints side by side where the requests' time went.
It needs only the extra: pip install 'stagescope[demo]'.

example:
  stagescope demo --seconds 10 --out runs/first
  stagescope demo --server torch

Ctrl-C stops server and load; runs that were finished are kept and shown.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stagescope.cli.demo_server import ONNX_APP, TORCH_APP, ExampleServer, example_server
from stagescope.errors import EXIT_DONE, StagescopeError, UsageError, needs

if TYPE_CHECKING:
    import aiohttp


# How many requests a second the example server answers when it always has enough to do.
#
# A closed loop: *clients* that each send their next request when the last one is answered.
# That is the wrong way to measure latency (the load driver's open loop is the right one), but it
# finds the throughput in seconds and cannot bury the server.


SETTLE_S = 1.0
MEASURE_S = 3.0
CLIENTS = 32
"""Four full batches: one in the model, and more than one waiting."""


def measure_capacity(url: str, body: bytes, *, measure_s: float = MEASURE_S) -> float:
    """Post *body* to *url* for a few seconds and return the requests answered a second.

    Raises StagescopeError where an answer is not 200 or does not come.
    """
    return asyncio.run(_measure(url, body, SETTLE_S * min(1.0, measure_s), measure_s))


async def _measure(url: str, body: bytes, settle_s: float, measure_s: float) -> float:
    import aiohttp

    start = time.monotonic() + settle_s
    end = start + measure_s
    answered: list[float] = []
    try:
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CLIENTS)) as session,
            asyncio.TaskGroup() as clients,
        ):
            for _ in range(CLIENTS):
                clients.create_task(_client(session, url, body, end, answered))
    except* (aiohttp.ClientError, TimeoutError) as problems:
        first = problems.exceptions[0]
        raise StagescopeError(f"the probe of {url} failed: {first!r}") from first
    return sum(start <= at < end for at in answered) / measure_s


async def _client(
    session: aiohttp.ClientSession, url: str, body: bytes, end: float, answered: list[float]
) -> None:
    headers = {"Content-Type": "image/jpeg"}
    while time.monotonic() < end:
        async with session.post(url, data=body, headers=headers) as response:
            response.raise_for_status()
            await response.read()
        answered.append(time.monotonic())


LOW_SHARE, MIDDLE_SHARE, OVER_SHARE = 0.3, 0.7, 1.3


class Rates(NamedTuple):
    """Requests a second; the field names are what the demo calls its runs."""

    low: float
    middle: float
    over: float


def choose_rates(capacity_per_s: float) -> Rates:
    """Return a quiet, a busy and a too high rate for a server that answers *capacity_per_s*.

    Rounded to two digits, which moves none of them across the capacity.
    Raises StagescopeError where the capacity is no positive number.
    """
    if not (math.isfinite(capacity_per_s) and capacity_per_s > 0):
        raise StagescopeError(
            f"the probe found a capacity of {capacity_per_s} requests/s, so no rate can be chosen: "
            "look into the server's log"
        )
    return Rates(
        *(_two_digits(capacity_per_s * share) for share in (LOW_SHARE, MIDDLE_SHARE, OVER_SHARE))
    )


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")


WARMUP_S = 1.0
TIMEOUT_S = 60.0
"""Longer than the top rate's queue gets in a run of the default length."""


class Interrupted(Exception):
    """A run was ended by Ctrl-C; what it has is in its folder."""


def drive(url: str, image: bytes, rate: float, seconds: float, *, spool: Path, out: Path) -> None:
    """Drive one rate and leave the run folder *out*, joined with the server's side from *spool*.

    Raises Interrupted where Ctrl-C ended it early.
    """
    from stagescope.cli.load import progress
    from stagescope.load_run import LoadPlan, run_load

    plan = LoadPlan(
        headers=("Content-Type: image/jpeg",),
        body=image,
        rate_per_s=rate,
        duration_s=seconds,
        warmup_s=WARMUP_S,
        timeout_s=max(TIMEOUT_S, seconds),
        out=out,
        spool=spool,
    )
    with progress(quiet=False) as watch:
        folder = run_load(plan, url, watch)
    for note in folder.notes:
        print(f"demo: {note}", file=sys.stderr)
    if folder.run.interrupted:
        raise Interrupted(out)


def print_comparison(folders: Sequence[Path]) -> None:
    """Print the runs' verdicts, their tables side by side, and below them what grew from each to the next."""
    from rich.console import Console

    from stagescope.analysis.build import build_report
    from stagescope.analysis.screen import side_by_side

    Console().print(side_by_side([build_report(folder) for folder in folders]))


HELP = "example server, load at three rates, three tables: a tour in a minute"
EXIT_INTERRUPTED = 130
IMAGE = "image.jpg"
NEEDED = ("aiohttp", "fastapi", "ibis", "numpy", "onnxruntime", "PIL", "pyarrow", "rich", "uvicorn")
SERVERS = {"onnx": ONNX_APP, "torch": TORCH_APP}

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
    parser.add_argument(
        "--server",
        choices=sorted(SERVERS),
        default="onnx",
        help="what runs the model: ONNX Runtime, which the extra brings, or torch, which is yours "
        "to install (default: onnx)",
    )


def run(args: argparse.Namespace) -> int:
    """Do the tour."""
    if not 1 <= args.seconds <= 3600:
        raise UsageError(f"--seconds is {args.seconds:g}; it must be from 1 to 3600")
    with needs("demo"):
        for module in NEEDED:
            importlib.import_module(module)
    if args.server == "torch" and importlib.util.find_spec("torch") is None:
        raise UsageError("--server torch needs torch, which is not installed: pip install torch")
    return tour(_new_folder(args.out), args.seconds, _say, args.server)


def tour(out: Path, seconds: float, say: Say, server_name: str = "onnx") -> int:
    """Drive the example server at three rates and print the tables of the runs that finished."""
    finished: list[Path] = []
    code = EXIT_DONE
    try:
        with example_server(out / "server.log", SERVERS[server_name]) as server:
            image, rates = _prepare(server, out, say)
            _drive_all(server, image, rates, seconds, out, finished, say)
    except (KeyboardInterrupt, Interrupted):
        say("interrupted: the server is stopped, what was measured is kept")
        code = EXIT_INTERRUPTED
    finally:
        if finished:
            print_comparison(finished)
            print(_what_next(out, finished, server_name))
    return code


def _prepare(server: ExampleServer, out: Path, say: Say) -> tuple[bytes, Rates]:
    """Wait until *server* is ready and find out what it bears."""
    from stagescope.examples.image_server.images import sample_jpeg

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


def _what_next(out: Path, finished: Sequence[Path], server_name: str) -> str:
    last = finished[-1]
    package = SERVERS[server_name].partition(":")[0].rpartition(".")[0]
    return f"""
run folders: {" ".join(map(str, finished))}
next:
  one run: why, and what to do; --full has every table, --format json is for programs
    stagescope report {last}
  the same server on port 8000, to load as you like
    python -m {package} &
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
