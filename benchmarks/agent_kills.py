"""Kills an agent again and again under load: what is missing at the back end, and what came twice.

python benchmarks/agent_kills.py
python benchmarks/agent_kills.py --kills 20 --shortest 0 --longest 2.5
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # server, load and back end are the tests'

from stagescope.testing.spool import short_spool
from tests.support.agent_kills import kill_agents
from tests.support.otlp import OtlpReceiver


def main() -> None:
    """Kill, count, print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--rate", type=float, default=300.0, help="requests a second")
    parser.add_argument("--shortest", type=float, default=1.0, help="seconds between two kills")
    parser.add_argument("--longest", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=11)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    lives = [
        partial(time.sleep, rng.uniform(args.shortest, args.longest)) for _ in range(args.kills)
    ]
    with short_spool() as spool, OtlpReceiver() as receiver:
        found = kill_agents(spool, receiver, args.rate, lives)
    spans = len({span.span_id for span in found.spans})
    print(
        f"{args.kills} kills, {args.shortest:g} to {args.longest:g} s apart: "
        f"{len(found.finished)} requests answered, {len(found.missing)} missing at the back end, "
        f"{found.counted_as_lost} counted as lost; "
        f"{spans} span ids in {len(found.sizes)} deliveries, "
        f"{len(found.doubled)} ({len(found.doubled) / spans:.2%}) of them twice"
    )


if __name__ == "__main__":
    main()
