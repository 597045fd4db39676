"""Record what a live server's model does in its next batches: kernels, copies, operators, by stage.

The server goes on serving. It needs torch in the server (2.7 or newer), and stagescope's
middleware; on a CPU it records operators, on a CUDA device kernels, with --deep both. The capture
waits for traffic, throws a first batch away, records a few, and writes a trace file that
https://ui.perfetto.dev opens, with the stages, requests and batches as tracks above torch's own.

  stagescope capture --service resnet                 the busiest process of a service
  stagescope capture --pid 4242 --batches 5 --deep
  stagescope capture --pid 4242 --format json | jq '.rows[] | select(.kind == "stage")'
  stagescope load http://127.0.0.1:8000/predict --rate 20     where there is no traffic

Requests that overlap a capture are slower for it: they are marked, and left out of histograms and
reports. Ctrl-C ends the recording and keeps what it has; a second one gives up.

exit code: 0 captured; 1 failed, or nothing was seen (degraded); 2 usage; 3 somebody else profiles
that process, or did a moment ago.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagescope.errors import EXIT_DONE, EXIT_FAILED, StagescopeError, UsageError
from stagescope.spool import default_spool

if TYPE_CHECKING:
    from stagescope.agent.capture import Capture
    from stagescope.agent.kernel_table import KernelTable
    from stagescope.agent.torch_trace import TorchCapture
    from stagescope.cli.capture_target import Target

HELP = "which kernels or operators a live server ran, by stage; a trace for Perfetto"
FORMATS = ("text", "json")

SAYS = {
    "armed": "armed: waiting for traffic",
    "warming": "warming: a first batch, thrown away",
    "recording": "recording",
    "stopping": "stopping, and writing the trace",
}


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    whom = parser.add_mutually_exclusive_group()
    whom.add_argument("--pid", type=int, metavar="PID", help="the served process")
    whom.add_argument(
        "--service", metavar="NAME",
        help="its busiest process (default: of the only service there is)",
    )  # fmt: skip
    parser.add_argument(
        "--batches", type=int, default=3, metavar="N",
        help="model calls to record (default: 3)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=10.0, metavar="S",
        help="how long to wait for traffic, and to record, at most each (default: 10)",
    )  # fmt: skip
    parser.add_argument(
        "--max-events", type=int, default=20_000, metavar="N",
        help="about how many events to record at most: to stop holds the server for some "
        "microseconds an event (default: 20,000)",
    )  # fmt: skip
    parser.add_argument(
        "--deep", action="store_true",
        help="operators too where there is a device: more to see, and slower while it lasts",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the trace goes (default: captures/ID)"
    )
    parser.add_argument(
        "--spool", type=Path, metavar="DIR",
        help="folder of the recorder files (default: STAGESCOPE_SPOOL, else one per user)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true", help="also within a minute of the last capture"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="text", help="text for people, json for machines"
    )


def run(args: argparse.Namespace) -> int:
    """Capture, write the trace, print the table; 1 where nothing was seen."""
    from stagescope.agent.capture import Capture, Wish, blind, new_id, recorded, remove_stale
    from stagescope.cli.capture_target import find_target

    for name, most in (("batches", 10_000), ("seconds", 600), ("max_events", 1_000_000)):
        if not 0 < (value := getattr(args, name)) <= most:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: above 0, at most {most:,}")
    spool: Path = args.spool or default_spool()
    target = find_target(spool, args.pid, args.service)
    remove_stale(spool, time.time())
    capture_id = new_id()
    out = _folder(args.out or Path("captures") / capture_id)
    wish = Wish(args.batches, args.seconds, args.deep, args.max_events, args.force)
    try:
        with closing(Capture(target.ring, wish, capture_id=capture_id)) as capture:
            _watch(capture, target, args.batches)
        read = capture.read()
        kept, table = recorded(read)
        trace = _export(read, target, out)
    except BaseException:
        _remove_empty(out)
        raise
    _hand_over(capture, kept)
    why = blind(read, table)
    if args.format == "json":
        print(json.dumps(_told(read, table, trace, why), indent=2))
    else:
        _print(target, read, table, trace)
    if why:
        print(f"stagescope capture: degraded: {why}", file=sys.stderr)
    return EXIT_FAILED if why else EXIT_DONE


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as problem:
        raise UsageError(f"--out {out} cannot be written: {problem.strerror}") from None
    return out


def _remove_empty(out: Path) -> None:
    if not any(out.iterdir()):
        out.rmdir()


def _watch(capture: Capture, target: Target, batches: int) -> None:
    """Run *capture*, and tell on standard error how it stands."""
    process = target.process
    print(f"process {process.pid} of {process.service}", file=sys.stderr)
    told, at_start = "", 0
    with _interrupted_by(capture):
        for state in capture.states():
            says = SAYS.get(state.name, "")
            if state.name != told and state.name == "recording":
                at_start = state.calls
                says += f": {batches} batches"
            elif state.name == told == "recording":
                says += f": {state.calls - at_start} of {batches} batches"
            elif state.name == told:
                continue
            told = state.name
            if says:
                print(f"  {says}", file=sys.stderr, flush=True)


@contextmanager
def _interrupted_by(capture: Capture) -> Iterator[None]:
    """Let the first Ctrl-C end the recording, and a second one do what it always does."""

    def enough(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        print("  enough: keeping what there is", file=sys.stderr, flush=True)
        capture.enough()

    before = signal.signal(signal.SIGINT, enough)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _export(read: TorchCapture, target: Target, out: Path) -> Path:
    from stagescope.agent.capture import export

    try:
        return export(read, target.ring, out)
    except OSError as problem:
        raise StagescopeError(
            f"{out} cannot be written: {problem.strerror}; torch's own trace is still in "
            f"{target.ring.parent / 'captures' / read.facts.capture_id}"
        ) from None


def _hand_over(capture: Capture, kept: Any) -> None:
    """Leave the rows for an agent that works in this spool; the rest goes."""
    from stagescope.agent.kernel_rows import write_rows

    try:
        capture.discard(but_kept=True)
        write_rows(capture.folder, kept)
    except OSError as problem:
        capture.discard()
        print(f"the agent is not told of it: {problem.strerror}", file=sys.stderr)


def _told(read: TorchCapture, table: KernelTable, trace: Path, why: str) -> dict[str, Any]:
    return {
        "state": "degraded" if why else "exported",
        "why": why,
        **asdict(read.facts),
        "trace": str(trace),
        "works": table.works,
        "by_time": table.by_time,
        "ambiguous": table.ambiguous,
        "nowhere": table.nowhere,
        "openings_dropped": read.openings_dropped,
        "rows": [asdict(row) for row in table.rows],
    }


def _print(target: Target, read: TorchCapture, table: KernelTable, trace: Path) -> None:
    from stagescope.agent.capture import records_of
    from stagescope.cli.capture_table import lines_of
    from stagescope.records import RequestRecord

    facts = read.facts
    records = records_of(target.ring, facts.profiled_since_ns, facts.profiled_until_ns)
    profiled = sum([isinstance(record, RequestRecord) for record in records])
    window_ms = (facts.until_ns - facts.since_ns) / 1e6
    print(
        f"{facts.batches} batches in {window_ms:,.1f} ms; to stop held the process for "
        f"{facts.stop_s * 1e3:,.0f} ms, to write {facts.save_s * 1e3:,.0f} ms; "
        f"{profiled} requests are marked profiled"
    )
    if facts.ended_by == "events":
        print("ended early: enough events (--max-events)")
    if facts.ended_by == "seconds":
        print("ended by --seconds, before there were enough batches")
    print()
    print("\n".join(lines_of(facts, table)))
    print()
    print(f"{trace}: open it at https://ui.perfetto.dev")
