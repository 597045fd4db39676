"""torch.profiler for a whole process: switched on and off by one thread, recording all of them.

torch is never imported here: what the server has not loaded is not there to be profiled.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stagescope.kernels import CaptureRequest
from stagescope.middleware.probe.server import Refused
from stagescope.middleware.torch.device_events import watch_captures

TEARDOWN_VARIABLE = "TEARDOWN_CUPTI"
TEARDOWN_FROM = (12, 6)
"""CUDA from which Kineto may take CUPTI down after a capture beside CUDA graphs: before it that
crashed (pytorch PR 112507, 150957). Left in place CUPTI costs the server 10-20 % (PR 146604)."""

ENABLED = "_is_profiler_enabled"
"""Of torch.autograd.profiler: whoever profiles in this process sets it, and clears it at the end."""

HOLDERS = {
    "NSYS_PROFILING_SESSION_ID": "Nsight Systems (nsys)",
    "CUDA_INJECTION64_PATH": "the tool injected by CUDA_INJECTION64_PATH",
    "KINETO_USE_DAEMON": "dynolog (KINETO_USE_DAEMON; ask it: `dyno gputrace`)",
}
"""Variables of a server's environment that tell who holds CUPTI: it has one subscriber."""


class Unfit(Exception):
    """There is nothing here that could record; says in a sentence why."""


def loaded_torch() -> Any:
    """Return the server's torch. Raises Unfit where it has none, or one that is too old."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "profiler"):
        raise Unfit(
            f"process {os.getpid()} has not loaded torch, so there is nothing that a capture "
            "could record"
        )
    return torch


def on_device(torch: Any) -> bool:
    """Return whether this process works on a CUDA device."""
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())


def graph_under_way(torch: Any) -> bool:
    """Return whether a CUDA graph is being captured, by torch in any thread, else in this one.

    A profiler must not start then. Of other threads those are known that began after this was
    asked for the first time.
    """
    return bool(watch_captures(torch.cuda).now or torch.cuda.is_current_stream_capturing())


def holder(torch: Any, *, device: bool, environment: Mapping[str, str] = os.environ) -> str:
    """Return who profiles this process already; empty where nobody does."""
    if getattr(torch.autograd.profiler, ENABLED, False):
        return "a torch profiler that the server itself has started"
    if device:
        for variable, name in HOLDERS.items():
            if environment.get(variable, "0") not in ("", "0"):
                detail = environment[variable] if variable.endswith("PATH") else ""
                return f"{name} {detail}".strip()
    return ""


class Session:
    """One recording; `prepare`, `start`, `stop`, `save`, in any thread."""

    def __init__(self, torch: Any, *, cpu: bool, device: bool) -> None:
        """Raises Unfit where this torch cannot record threads that exist already."""
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CPU] * cpu + [activity.CUDA] * device
        try:
            config = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        except (AttributeError, TypeError):
            raise Unfit(
                f"torch {torch.__version__} cannot profile threads that it did not start; "
                "a capture needs torch 2.7 or newer"
            ) from None
        self._torch = torch
        self._profile = torch.profiler.profile(activities=activities, experimental_config=config)
        self._prepared = self._running = False
        self.taken = False
        """True where the server has started a profiler of its own meanwhile, which ended this."""
        _quiet(torch)

    def prepare(self) -> None:
        """Get ready; the first time in a process this takes a second or more."""
        self._prepared = True
        self._profile.prepare_trace()

    def start(self) -> None:
        """Record from now on."""
        self._profile.start_trace()
        self._running = True

    def stop(self) -> None:
        """Record no more. All threads of the process are stopped for some µs an event."""
        if self._prepared and not self._running:
            self.start()  # what preparing has switched on (CUPTI) goes off with a stop alone
        if self._running:
            self._prepared = self._running = False
            self.taken = not getattr(self._torch.autograd.profiler, ENABLED, True)
            self._profile.stop_trace()

    def events(self) -> int:
        """Count what was recorded."""
        return len(self._profile.profiler.kineto_results.events())

    def save(self, file: Path) -> None:
        """Write Chrome's trace format. Raises OSError where the file did not come out whole."""
        self._profile.export_chrome_trace(str(file))
        with file.open("rb") as written:
            written.seek(max(0, file.stat().st_size - 64))
            if not written.read().rstrip().endswith(b"}"):  # torch does not look
                raise OSError(28, "the disk is full, or a limit was met", str(file))


def _quiet(torch: Any) -> None:
    """Keep two lines a capture out of the server's log; what it has set itself stays."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if _cuda_version(torch) >= TEARDOWN_FROM:
        os.environ.setdefault(TEARDOWN_VARIABLE, "1")


def _cuda_version(torch: Any) -> tuple[int, ...]:
    text = getattr(torch.version, "cuda", None) or "0"
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


FOLDER = "captures"
TRACE_NAME = "torch.json"
LEDGER_NAME = "ledger.json"
_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
BYTES_AN_EVENT = 320
"""Of torch's JSON, about."""


def read_request(question: Mapping[str, Any]) -> CaptureRequest:
    """Take *question* apart. Raises Refused where a value is not usable."""
    names = CaptureRequest.__dataclass_fields__
    request = CaptureRequest(**{name: question[name] for name in names if name in question})
    given: Any = request.capture_id  # It came as JSON: a number is possible.
    if not isinstance(given, str) or not _ID.fullmatch(given):
        raise Refused(f"a capture's id has letters, digits and dashes, not {request.capture_id!r}")
    for name, most in (("batches", 10_000), ("seconds", 600), ("max_events", 1_000_000)):
        value = getattr(request, name)
        if not isinstance(value, int | float) or not 0 < value <= most:
            raise Refused(f"{name} of a capture is a number above 0, at most {most}: {value!r}")
    return request


class Folder:
    """Where a capture's files come to lie: `captures/ID` in the spool of the process."""

    def __init__(self, spool: Path, asked: CaptureRequest) -> None:
        """Make it. Raises OSError where it cannot be, or the disk has no room for the trace."""
        self.path = spool / FOLDER / asked.capture_id
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.part = self.path / f"{TRACE_NAME}.part"
        room = os.statvfs(self.path)
        need, free = asked.max_events * BYTES_AN_EVENT, room.f_bavail * room.f_frsize
        if free < need:
            self.remove()
            raise OSError(
                28, f"the trace may need {need / 1e6:.0f} MB and {free / 1e6:.0f} MB are free",
                str(spool),
            )  # fmt: skip

    def finish(self, ledger: Mapping[str, Any]) -> None:
        """Write the ledger, and give the trace its name. Raises OSError."""
        (self.path / LEDGER_NAME).write_text(json.dumps(ledger), "utf-8")
        self.part.rename(self.path / TRACE_NAME)

    def remove(self) -> None:
        """Leave nothing of ours; who asked may have put something there already."""
        for file in (self.part, self.path / TRACE_NAME, self.path / LEDGER_NAME):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()


@contextmanager
def folder_of(spool: Path, asked: CaptureRequest) -> Iterator[Folder]:
    """Yield the folder; it goes again with whatever is raised inside."""
    folder = Folder(spool, asked)
    try:
        yield folder
    except BaseException:
        folder.remove()
        raise
