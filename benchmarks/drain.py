"""How fast one core drains recorder files, step by step, and in how much memory.

    PYTHONPATH=src:. python benchmarks/drain.py [--records 32768] [--rings 4] [--json FILE]

Every record is a request with six stages. Each row adds a step to the one above it:
reading and decoding; the histograms that /metrics shows; the run store, for records of a load run.
CPU seconds of this process, the best of `--rounds`.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stagescope.agent.drain import FULL_BATCH, Drain
from stagescope.agent.loop import SHARED_BATCH
from stagescope.agent.pipeline import sinks_from_environment
from stagescope.agent.sinks import Sink
from stagescope.agent.store.runs import RunStore
from stagescope.records import Record
from tests.support.rings import write_ring


@dataclass(frozen=True, slots=True)
class Row:
    """One way of draining, measured."""

    what: str
    records_per_s: float
    us_per_record: float


def drain(spool: Path, sinks: Sequence[Sink], batch: int) -> tuple[int, float]:
    """Read all files of *spool* into *sinks*; returns records and CPU seconds."""

    def deliver(records: Sequence[Record]) -> None:
        for sink in sinks:
            sink.accept(records)

    reader = Drain(spool, {}, batch=batch)
    reader.discover()
    began = time.process_time()
    while reader.poll(deliver):
        pass
    spent = time.process_time() - began
    reader.close()
    return reader.records, spent


def measure(spool: Path, rounds: int) -> list[Row]:
    """Measure every way of draining."""
    best: dict[str, tuple[float, int]] = {}
    for _ in range(rounds):
        for what, steps, batch in (
            ("decode", (), FULL_BATCH),
            ("decode, in an embedded agent's batches", (), SHARED_BATCH),
            ("decode + metrics", ("metrics",), FULL_BATCH),
            ("decode + metrics + run store", ("metrics", "runs"), FULL_BATCH),
        ):
            with tempfile.TemporaryDirectory() as folder:
                made: dict[str, Sink] = {
                    "metrics": sinks_from_environment({}).sinks["metrics"],
                    "runs": RunStore(Path(folder) / "runs"),
                }
                records, spent = drain(spool, [made[step] for step in steps], batch)
            best[what] = min(best.get(what, (spent, records)), (spent, records))
    return [
        Row(what, round(records / spent), round(spent / records * 1e6, 2))
        for what, (spent, records) in best.items()
    ]


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--records", type=int, default=32768)
    parser.add_argument("--rings", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    each = args.records // args.rings
    with tempfile.TemporaryDirectory() as folder:
        spool = Path(folder)
        writers = [
            write_ring(spool / f"{number}.ring", each, run_id="bench", ring_slots=each)
            for number in range(args.rings)
        ]
        rows = measure(spool, args.rounds)
        for writer in writers:
            writer.close()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 10)
    mapped_mb = sum(1024 * each for _ in writers) / (1 << 20)
    print(f"{'':40} {'records/s':>10} {'µs/record':>10}")
    for row in rows:
        print(f"{row.what:40} {row.records_per_s:>10,.0f} {row.us_per_record:>10.2f}")
    print(f"peak memory {peak_mb:.0f} MB, of it at most {mapped_mb:.0f} MB recorder files "
          f"(shared with the server); Python {platform.python_version()}")  # fmt: skip
    if args.json:
        result = {"rows": [asdict(row) for row in rows], "peak_rss_mb": round(peak_mb, 1),
                  "python": platform.python_version(), "platform": sys.platform}  # fmt: skip
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
