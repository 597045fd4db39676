"""What device time is read from: events on a stream, as torch makes them for its accelerators.

torch is never imported here, it is given: the server's own, or a stand-in
(tests/support/devices.py). Nothing here makes torch begin to use a device, and nothing waits
for one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, Protocol

from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.guard import guarded

KINDS = ("cuda", "xpu")
"""Modules of torch that have streams with timed events (ROCm's is `cuda` too)."""


class DeviceEvent(Protocol):
    """A mark on a stream (`torch.cuda.Event(enable_timing=True)`)."""

    def record(self, stream: Any) -> None:
        """Put it behind the work that is on *stream* now."""

    def query(self) -> bool:
        """Return whether the device has come to it; never waits."""
        ...

    def elapsed_time(self, later: Any) -> float:
        """Return milliseconds from it to *later*, a float32 in CUDA; both have been come to."""
        ...


class DeviceClock(Protocol):
    """The streams of one process; each method may raise RuntimeError where the device fails."""

    def capturing(self) -> bool:
        """Return whether a graph is being captured: then no event may be recorded or asked."""
        ...

    def on_capture(self, quiet: Callable[[], None]) -> None:
        """Call *quiet* before each capture, when `capturing` is true already.

        When it returns, nobody is recording or asking any more who began before.
        """

    def stream(self) -> Any:
        """Return the stream on which this thread's work goes now."""
        ...

    def key(self, stream: Any) -> Hashable:
        """Return what tells *stream* from all others of the process."""
        ...

    def event(self) -> DeviceEvent:
        """Make an event; it belongs to the device of the first stream that it is recorded on."""
        ...

    def device(self, stream: Any) -> str:
        """Return the UUID of the device of *stream*, or its kind and number where it has none."""
        ...


class TorchClock:
    """The streams of `torch.cuda` or `torch.xpu`, which is in use already."""

    def __init__(self, kind: str, namespace: Any) -> None:
        """*namespace* is the module of that *kind*."""
        self._kind = kind
        self._namespace = namespace
        self._captures = watch_captures(namespace)
        self._on_this_stream = getattr(namespace, "is_current_stream_capturing", _never)
        self.stream: Callable[[], Any] = namespace.current_stream

    def capturing(self) -> bool:
        """Return whether this thread captures, or any other that says so to torch."""
        return self._captures.now > 0 or self._on_this_stream()

    def on_capture(self, quiet: Callable[[], None]) -> None:
        """Call *quiet* before each capture that goes by torch."""
        self._captures.quiet.append(quiet)

    def key(self, stream: Any) -> Hashable:
        """Return device and stream."""
        return stream.device_index, stream.stream_id

    def event(self) -> DeviceEvent:
        """Make an event that takes the time."""
        made: DeviceEvent = self._namespace.Event(enable_timing=True)
        return made

    def device(self, stream: Any) -> str:
        """Name the device of *stream*."""
        return device_name(self._kind, self._namespace, stream.device_index)


def in_use(torch: Any) -> tuple[str, Any] | None:
    """Return kind and module of the accelerator that this process uses by now, if any."""
    for kind in KINDS:
        namespace = getattr(torch, kind, None)  # None, and more of it, while torch is imported
        if getattr(namespace, "is_initialized", _never)():
            return kind, namespace
    return None


def possible(torch: Any) -> bool:
    """Return whether this build of torch has a device to time at all; asks no driver."""
    version = torch.version
    return any(getattr(version, name, None) for name in ("cuda", "hip", "xpu"))


def device_name(kind: str, namespace: Any, index: int) -> str:
    """Return the device's UUID as NVML writes it (`GPU-…`, `MIG-…`); else `cuda:0`."""
    properties = namespace.get_device_properties(index)
    uuid = getattr(properties, "uuid", None)
    if not uuid:
        return f"{kind}:{index}"
    prefix = "MIG" if " MIG " in getattr(properties, "name", "") else "GPU"
    return str(uuid) if str(uuid).startswith(prefix) else f"{prefix}-{uuid}"


class Captures:
    """How many graphs are being captured in this process."""

    def __init__(self) -> None:
        self.now = 0
        self.quiet: list[Callable[[], None]] = []
        self._lock = Lock()

    def begin(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Count a capture from before it begins; not one that could not begin."""

        def capture_begin(*args: Any, **kwargs: Any) -> Any:
            self._add(1)
            with guarded():
                for quiet in self.quiet:
                    quiet()
            try:
                return inner(*args, **kwargs)
            except BaseException:
                self._add(-1)
                raise

        return capture_begin

    def end(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """Count it no more once it has ended, however it ended."""

        def capture_end(*args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            finally:
                self._add(-1)

        return capture_end

    def _add(self, number: int) -> None:
        with self._lock:
            self.now = max(0, self.now + number)


_watched: list[tuple[object, Captures]] = []


def watch_captures(namespace: Any) -> Captures:
    """Count captures of `CUDAGraph` from now on.

    In CUDA's default mode asking an event in one thread spoils a capture in another, and each
    thread can ask about its own only. Captures that do not go by torch are not seen.
    """
    for known, captures in _watched:
        if known is namespace:
            return captures
    captures = Captures()
    _watched.append((namespace, captures))
    graph = getattr(namespace, "CUDAGraph", None)
    if hasattr(graph, "capture_begin") and hasattr(graph, "capture_end"):
        wrap(graph, "capture_begin", captures.begin)
        wrap(graph, "capture_end", captures.end)
    return captures


def _never() -> bool:
    return False
