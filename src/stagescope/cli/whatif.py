"""Predict what a stored load run would have measured with one thing changed.

The server that was measured is simulated: the run's own arrivals, each request's own time in each
stage, and what it queued for: the event loop, a pool of threads, a batcher. First the run is
simulated as it was; where that does not show what was measured, no prediction is to be believed,
and this says so. docs/whatif.md says what is simulated and what is not.

changes, each predicted by itself; `,` joins several into one:
  'inference -20%'   the stage takes a fifth less of its own time; also 'preprocess +3ms'
  threads=8          so many worker threads; threads.preprocess=8: of the pool of that stage
  batch.delay=5ms    a batch waits at most so long for further members
  batch.size=16      members of a batch at most
  workers=2          so many server processes
  rate=80            requests/s, as `stagescope load --rate 80` would send them

examples:
  stagescope load http://127.0.0.1:8000/predict --rate 40 --body cat.jpg --out runs/now
  stagescope whatif runs/now 'inference -20%' threads=8 batch.delay=5ms
  stagescope whatif runs/now 'rate=80,workers=2'
  stagescope whatif runs/now rate=80 --format json | jq '.predictions[0].p99_ms'

exit code: 0; 1 where the simulation does not agree with the run, so that nothing is predicted with
confidence; 2 where a change is not usable, or the run cannot be simulated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stagescope.errors import EXIT_DONE, EXIT_FAILED, needs
from stagescope.runfolder.run import read_run

if TYPE_CHECKING:
    from stagescope.analysis.whatif.predict import Estimate, WhatIf

HELP = "predict a stored run with one thing changed"


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the run, the changes and the format."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="a run folder of `stagescope load`")
    parser.add_argument(
        "changes", nargs="+", metavar="CHANGE", help="what to change: see the list above"
    )
    parser.add_argument(
        "--format",
        choices=("text", "json"),
        default="text",
        help="text for people, json for machines",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="same seed, same prediction (0)"
    )


def run(args: argparse.Namespace) -> int:
    """Predict and print; the exit code is 1 where the prediction is not to be believed."""
    with needs("load"):
        from stagescope.analysis.whatif.predict import predict
    found = predict(args.dir, args.changes, planned(args.dir), args.seed)
    if args.format == "json":
        print(json.dumps(found.to_json(), indent=2))
    else:
        print("\n".join(lines(found)))
    return EXIT_DONE if found.agrees else EXIT_FAILED


def planned(folder: Path) -> Callable[[float], Sequence[tuple[float, bool]]] | None:
    """Return the load driver's arrivals of the run in *folder* by rate; None: it planned none."""
    from stagescope.loadgen.arrivals import schedule

    plan = read_run(folder).plan
    if plan.rate_per_s is None or plan.duration_s is None or not plan.arrivals:
        return None
    how, duration_s, warmup_s, seed = plan.arrivals, plan.duration_s, plan.warmup_s, plan.seed

    def arrivals(rate: float) -> Sequence[tuple[float, bool]]:
        made = schedule(how, rate, duration_s, warmup_s or 0.0, seed or 0)
        return [(at / 1e6, at >= made.measure_from_ns) for at in made.offsets_ns]

    return arrivals


def lines(found: WhatIf) -> Iterator[str]:
    """Yield the table for people."""
    width = max(9, *(len(one.change) for one in found.predictions))
    yield f"{found.folder}: {found.requests:,} requests simulated"
    yield ""
    yield f"{'':{width}}  {'p50 ms':>22}  {'p99 ms':>22}  {'answered/s':>22}"
    for name, figures in (("measured", found.measured), ("simulated", found.simulated)):
        numbers = (figures.p50_ms, figures.p99_ms, figures.throughput_per_s)
        yield f"{name:{width}}  " + "  ".join(f"{number:>22,.1f}" for number in numbers)
    for one in found.predictions:
        cells = (_cell(each) for each in (one.p50_ms, one.p99_ms, one.throughput_per_s))
        yield f"{one.change:{width}}  " + "  ".join(f"{cell:>22}" for cell in cells)
    yield ""
    if found.agrees:
        yield "In brackets: where nine of ten runs with the change are to lie."
    else:
        yield (
            f"No confidence: the unchanged run is not simulated as it was measured "
            f"({'; '.join(found.disagrees)}). Something that is not simulated holds this server: "
            "see docs/whatif.md."
        )
    yield from (f"Note: {note}." for note in found.notes)


def _cell(one: Estimate) -> str:
    if one.low is None or one.high is None:
        return f"{one.value:,.1f} (?)"
    return f"{one.value:,.1f} ({one.low:,.1f} to {one.high:,.1f})"
