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
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagescope.errors import EXIT_DONE, EXIT_FAILED, RecorderFileError, StagescopeError, UsageError
from stagescope.kernels import CaptureRequest
from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import SPOOL_VARIABLE, default_spool, ring_files
from stagescope.records import Process

if TYPE_CHECKING:
    from stagescope.agent.kernels.capture import Capture
    from stagescope.agent.kernels.table import KernelTable
    from stagescope.agent.kernels.trace import TorchCapture


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
        help="about how many events to record at most: stopping pauses the server for some "
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
    from stagescope.agent.kernels.capture import (
        Capture,
        degraded_reason,
        new_id,
        recorded,
        remove_stale,
    )

    for name, most in (("batches", 10_000), ("seconds", 600), ("max_events", 1_000_000)):
        if not 0 < (value := getattr(args, name)) <= most:
            raise UsageError(f"--{name.replace('_', '-')} {value:g}: above 0, at most {most:,}")
    spool: Path = args.spool or default_spool()
    target = find_target(spool, args.pid, args.service)
    remove_stale(spool, time.time())
    capture_id = new_id()
    out = _folder(args.out or Path("captures") / capture_id)
    request = CaptureRequest(args.batches, args.seconds, args.deep, args.max_events, args.force)
    try:
        with closing(Capture(target.ring, request, capture_id=capture_id)) as capture:
            _watch(capture, target, args.batches)
        read = capture.read()
        kept, table = recorded(read)
        trace = _export(read, target, out)
    except BaseException:
        _remove_empty(out)
        raise
    _hand_over(capture, kept)
    why = degraded_reason(read, table)
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
        with suppress(OSError):  # Not by `print`: a signal may come within another one.
            os.write(2, b"  enough: keeping what there is\n")
        capture.enough()

    before = signal.signal(signal.SIGINT, enough)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _export(read: TorchCapture, target: Target, out: Path) -> Path:
    from stagescope.agent.kernels.capture import export

    try:
        return export(read, target.ring, out)
    except OSError as problem:
        raise StagescopeError(
            f"{out} cannot be written: {problem.strerror}; torch's own trace is still in "
            f"{target.ring.parent / 'captures' / read.facts.capture_id}"
        ) from None


def _hand_over(capture: Capture, kept: Any) -> None:
    """Leave the rows for an agent that works in this spool; the rest goes."""
    from stagescope.agent.kernels.rows import write_rows

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
    from stagescope.agent.kernels.capture import records_of
    from stagescope.cli.capture_table import lines_of
    from stagescope.records import RequestRecord

    facts = read.facts
    records = records_of(target.ring, facts.profiled_since_ns, facts.profiled_until_ns)
    profiled = sum([isinstance(record, RequestRecord) for record in records])
    window_ms = (facts.until_ns - facts.since_ns) / 1e6
    print(
        f"{facts.batches} batches in {window_ms:,.1f} ms; stopping paused the process for "
        f"{facts.stop_s * 1e3:,.0f} ms, writing took {facts.save_s * 1e3:,.0f} ms; "
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


@dataclass(frozen=True, slots=True)
class Target:
    """A live served process."""

    ring: Path
    process: Process
    in_flight: int
    """Requests that it is serving now."""


def find_target(spool: Path, pid: int | None, service: str | None) -> Target:
    """Return the process *pid*, or the busiest one of *service*, or of the only service there is.

    Raises UsageError, which says why there is none and what to do.
    """
    alive = list(_alive(spool))
    if pid is not None:
        return _of_pid(spool, alive, pid)
    services = sorted({one.process.service for one in alive})
    if service is None and len(services) > 1:
        raise UsageError(f"name one of {', '.join(services)} with --service, or a --pid")
    wanted = [one for one in alive if service in (None, one.process.service)]
    if not wanted:
        what = f"of service {service} " if service else ""
        others = f"; there is: {', '.join(services)}" if services else ""
        raise UsageError(
            f"no live process {what}records in {spool}{others}: "
            "is the server up and wrapped, and is this its spool (--spool)?"
        )
    return max(wanted, key=lambda one: (one.in_flight, one.process.pid))


def _alive(spool: Path) -> Iterator[Target]:
    for ring in ring_files(spool):
        with suppress(FileNotFoundError, RecorderFileError), RecorderReader(ring) as reader:
            if reader.writer_alive():
                yield Target(ring, reader.process, reader.requests_in_flight())


def _of_pid(spool: Path, alive: list[Target], pid: int) -> Target:
    from stagescope.agent.host.proc import namespace_pids

    inside = (namespace_pids("/proc", pid) or [pid])[-1]  # what its recorder file says
    for one in alive:
        if one.process.pid == inside:
            return one
    raise UsageError(_why_not(spool, pid, inside))


def _why_not(spool: Path, pid: int, inside: int) -> str:
    import psutil

    try:
        process = psutil.Process(pid)
        user, owner, name = process.username(), process.uids().effective, process.name()
    except (psutil.Error, ValueError):
        return f"there is no process {pid} here: it has ended, or has another pid in this container"
    if owner != os.getuid() and os.getuid() != 0:
        return (
            f"process {pid} belongs to {user}, not to you: run this as that user, "
            f"or name its spool with --spool if you may read it"
        )
    if not _runs_python(pid):
        return f"process {pid} ({name}) is no Python process"
    if inside != pid:
        return (
            f"process {pid} runs in another pid namespace (it is {inside} there) and records "
            f"nothing in {spool}: name its spool, as it is seen from here, with --spool"
        )
    with suppress(psutil.Error):
        if (own := process.environ().get(SPOOL_VARIABLE)) and Path(own) != spool:
            return f"process {pid} records in {own}, not in {spool}: name that with --spool"
    return (
        f"process {pid} records nothing in {spool}: its app is not wrapped in StageMiddleware, "
        "or no worker of it is up yet; the workers of a server have pids of their own (--service)"
    )


def _runs_python(pid: int) -> bool:
    try:
        return "python" in Path(f"/proc/{pid}/maps").read_text("utf-8", "replace")
    except OSError:
        return True  # it cannot be told; then it is not what is wrong
