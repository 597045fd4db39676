"""Asks a served process for a capture, and makes a trace and a kernel table of its files."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stagescope.agent.kernels.rows import Recorded
from stagescope.agent.kernels.table import KernelTable, kernel_table
from stagescope.agent.kernels.trace import LEDGER_NAME, TRACE_NAME, TorchCapture, read_capture
from stagescope.agent.probe import Conversation, probe_of
from stagescope.errors import HeldError, StagescopeError
from stagescope.exporters.perfetto import (
    Slice,
    batch_group,
    merged,
    request_group,
    thread_group,
    write_trace,
)
from stagescope.kernels import CaptureRequest
from stagescope.recorder.reader import RecorderReader
from stagescope.records import BatchRecord, Record, RequestRecord

FOLDER = "captures"
"""In the spool: where a served process puts what it captured."""
SILENCE_S = 120.0
"""How long a process may take for its next word: its first capture starts slowly on some GPUs."""
STALE_S = 3600.0
"""After which what nobody fetched is removed."""
KEPT = 8
"""Captures of triggers that stay in the spool, with their traces."""


@dataclass(frozen=True, slots=True)
class State:
    """How far a capture is."""

    name: str
    """`armed`, `warming`, `recording`, `stopping`, `exported`."""
    at_ns: int
    calls: int
    """Calls of the model that were seen so far."""


class Capture:
    """One capture of the process that writes *ring*; closed by `close` or the end of a `with`."""

    def __init__(self, ring: Path, request: CaptureRequest, *, capture_id: str = "") -> None:
        self.capture_id = capture_id or new_id()
        self.folder = ring.parent / FOLDER / self.capture_id
        """Where its files lie once it is exported; they are the asker's then."""
        self.facts: Mapping[str, Any] = {}
        """What the process reported at the end."""
        self._conversation = Conversation(
            probe_of(ring), "capture", timeout_s=SILENCE_S,
            **asdict(request) | {"capture_id": self.capture_id},
        )  # fmt: skip

    def states(self) -> Iterator[State]:
        """Run it; give each state as it is told, also when it has not changed.

        Raises HeldError where it is refused, StagescopeError where it fails: then nothing is left.
        """
        try:
            for answer in self._conversation.answers():
                _raise(answer)
                if answer.get("done"):
                    self.facts = answer
                at_ns = answer.get("at_ns") or answer["profiled_until_ns"]
                yield State(answer["state"], at_ns, answer.get("calls", answer.get("batches", 0)))
        finally:
            if not self.facts:
                self.discard()

    def enough(self) -> None:
        """Make it end now and write what it recorded; from anywhere, also a signal's handler."""
        self._conversation.nudge()

    def read(self) -> TorchCapture:
        """Read what was exported. Raises StagescopeError."""
        return read_capture(self.folder)

    def discard(self, *, but_kept: bool = False) -> None:
        """Remove its files from the spool; *but_kept*: leave what was made of them."""
        if not but_kept:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        for file in (self.folder / TRACE_NAME, self.folder / LEDGER_NAME):
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """End it, however far it is."""
        self._conversation.close()


def new_id(now_s: float | None = None) -> str:
    """Return an id that sorts by time."""
    moment = time.localtime(now_s)
    return f"{time.strftime('%Y%m%d-%H%M%S', moment)}-{secrets.token_hex(2)}"


def _raise(answer: Mapping[str, Any]) -> None:
    if answer.get("state") == "refused":
        raise HeldError(answer["why"])
    if answer.get("state") == "failed":
        raise StagescopeError(answer["why"])


def recorded(capture: TorchCapture) -> tuple[Recorded, KernelTable]:
    """Make the kernel table of *capture*, as an agent keeps it and with what is known about it."""
    table = kernel_table(capture)
    return Recorded(capture.facts, table.rows), table


def degraded_reason(capture: TorchCapture, table: KernelTable) -> str:
    """Return why a capture is degraded; empty where it saw everything.

    A capture that saw nothing, though the model was called, is never a success.
    """
    facts = capture.facts
    kinds = {row.kind for row in table.rows}
    if not facts.batches and not table.works:
        return "no batch came while it recorded: send it requests (`stagescope load URL`)"
    if facts.batches and facts.device and "kernel" not in kinds:
        return (
            f"the model was called {facts.batches} times and no kernel was seen: another tool may "
            "hold CUPTI in that process, or a profile taken before a CUDA graph was captured has "
            "left it blind; restart the server to capture again"
        )
    if facts.batches and not facts.device and "operator" not in kinds:
        return (
            f"the model was called {facts.batches} times and torch ran no operator: "
            "its model is not torch's"
        )
    return ""


def export(capture: TorchCapture, ring: Path, folder: Path) -> Path:
    """Write the trace that Perfetto opens into *folder*; returns the file. Raises OSError."""
    records = records_of(ring, capture.facts.profiled_since_ns, capture.facts.until_ns)
    by_thread: dict[str, list[Slice]] = {}
    for one in capture.openings:
        name = f"{capture.threads.get(one.thread_id, 'thread')} {one.thread_id}"
        args = {"trace_id": one.trace_id, "span_id": one.span_id, "of": one.kind}
        by_thread.setdefault(name, []).append(Slice(one.stage, one.start_ns, one.end_ns, args))
    groups = [request_group(records), batch_group(records), thread_group(by_thread)]
    return write_trace(folder, merged(capture.trace, groups, capture.wall_offset_ns))


def records_of(ring: Path, since_ns: int, until_ns: int) -> list[Record]:
    """Return the requests and batches in *ring* that overlap the time; none where it was deleted."""
    found: list[Record] = []
    with suppress(FileNotFoundError), RecorderReader(ring) as reader:
        while records := reader.poll():
            found += records
    return [
        one
        for one in found
        if isinstance(one, RequestRecord | BatchRecord)
        and one.start_ns < until_ns
        and one.start_ns + one.duration_ns > since_ns
    ]


def remove_stale(spool: Path, now_s: float) -> None:
    """Remove captures that nobody fetched, for their asker was killed, and all but the newest
    KEPT of those that an agent keeps with their trace."""
    with suppress(OSError):
        folders = sorted((spool / FOLDER).iterdir(), reverse=True)  # an id sorts by time
        kept = [folder for folder in folders if any(folder.glob("trace.json*"))]
        stale = [one for one in folders if now_s - one.stat().st_mtime > STALE_S]
        for folder in {*kept[KEPT:], *stale} - {*kept[:KEPT]}:
            shutil.rmtree(folder, ignore_errors=True)
