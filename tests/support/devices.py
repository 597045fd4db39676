"""A device that is none: streams, events and allocators as torch shows them, on a hand clock.

For what cannot be had where no accelerator is: work is queued on streams and takes the time that
it is said to take; events are come to in their turn, seen late, or never; a graph may be under
capture. What a real device does that this one does not: fail, share its units between streams,
take time for the events themselves. It has no way to synchronise, so code that tried would fail.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from stagescope.testing.clock import HandClock

UUID = "11111111-2222-3333-4444-55555555555{}"
NEVER_NS = 1 << 62


class Stream:
    """A queue of work, done one after the other."""

    def __init__(self, clock: HandClock, device_index: int, stream_id: int) -> None:
        self.clock = clock
        self.device_index = device_index
        self.stream_id = stream_id
        self.free_ns = 0
        """When all that is queued will be done."""
        self.busy_ns = 0
        """How long its work has taken, and will."""

    def launch(self, ns: int) -> None:
        """Queue work of *ns*."""
        self.free_ns = max(self.free_ns, self.clock()) + ns
        self.busy_ns += ns

    def hang(self) -> None:
        """Come to nothing that is queued from now on."""
        self.free_ns = NEVER_NS


class Event:
    """A mark on a stream; it can be recorded again, as CUDA's can."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._at_ns = 0
        self._seen_ns = NEVER_NS
        self._index: int | None = None

    def record(self, stream: Stream) -> None:
        """Put it behind what is queued on *stream*."""
        self._called("record")
        if self._index not in (None, stream.device_index):
            raise RuntimeError("Event device does not match recording stream's device")
        self._index = stream.device_index
        self._at_ns = max(stream.free_ns, self._device.clock())
        self._seen_ns = self._at_ns + self._device.seen_after_ns()

    def query(self) -> bool:
        """Return whether it has been come to, and that is seen."""
        self._called("query")
        return self._device.clock() >= self._seen_ns

    def elapsed_time(self, later: Event) -> float:
        """Return ms as a float32, as CUDA does."""
        for event in (self, later):
            if self._device.clock() < event._seen_ns:
                raise RuntimeError("Both events must be completed before calculating elapsed time.")
        (ms,) = struct.unpack("f", struct.pack("f", (later._at_ns - self._at_ns) / 1e6))
        return float(ms)

    def _called(self, what: str) -> None:
        """Count the call; raises where any part of it falls into a capture."""
        self._device.calls[what] += 1
        began = self._device.captures
        self._device.pause()
        if began or self._device.captures:
            raise RuntimeError("operation not permitted when stream is capturing")


class Device:
    """`torch.cuda` as far as stagescope uses it; one device with as many streams as are asked for."""

    def __init__(self, clock: HandClock) -> None:
        self.clock = clock
        self.initialized = True
        self.captures = 0
        self.calls = {"record": 0, "query": 0}
        self.seen_after_ns: Callable[[], int] = lambda: 0
        """How much later than it was come to an event is seen to be."""
        self.pause: Callable[[], None] = lambda: None
        """Called within each call of an event's: so that other threads may come between."""
        self.stats: dict[str, Any] = {}
        self.pinned: dict[str, Any] = {}
        self.history: dict[str, Any] = {}
        self.held: Mapping[str, Any] = {"segments": [], "device_traces": [[]]}
        self._streams: dict[tuple[int, int], Stream] = {}
        self._current: dict[int, Stream] = {}
        self.CUDAGraph = _graph_class(self)
        self.memory = SimpleNamespace(
            memory_stats_as_nested_dict=lambda index: self.stats if index == 0 else {},
            host_memory_stats_as_nested_dict=lambda: self.pinned,
            _snapshot=lambda: self.held,
            _record_memory_history=self.history.update,
        )

    def is_initialized(self) -> bool:
        """Return whether the process has begun to use it."""
        return self.initialized

    def device_count(self) -> int:
        """Count devices; the second one is never used."""
        return 2

    def get_device_properties(self, index: int) -> SimpleNamespace:
        """Return name and UUID, as torch writes it: without `GPU-`."""
        return SimpleNamespace(name="Simulated", uuid=UUID.format(index))

    def is_current_stream_capturing(self) -> bool:
        """Tell of a capture in this thread: none, they are told by `CUDAGraph`."""
        return False

    def Event(self, enable_timing: bool = False) -> Event:
        """Make an event."""
        assert enable_timing
        return Event(self)

    def stream(self, stream_id: int, device_index: int = 0) -> Stream:
        """Return the stream of that number, always the same."""
        key = device_index, stream_id
        return self._streams.setdefault(key, Stream(self.clock, device_index, stream_id))

    def current_stream(self) -> Stream:
        """Return this thread's stream."""
        return self._current.get(threading.get_ident()) or self.stream(0)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[Stream]:
        """Make *stream* this thread's, for the block."""
        thread = threading.get_ident()
        before, self._current[thread] = self._current.get(thread), stream
        try:
            yield stream
        finally:
            if before is None:
                del self._current[thread]
            else:
                self._current[thread] = before


def _graph_class(device: Device) -> type:
    class CUDAGraph:
        """A capture, which every event in the process spoils."""

        def capture_begin(self) -> None:
            """Begin it."""
            device.captures += 1

        def capture_end(self) -> None:
            """End it."""
            device.captures -= 1

    return CUDAGraph


class SimulatedTorch:
    """The module `torch` of a process that uses a `Device`; stands in `sys.modules` for it."""

    __version__ = "2.13.0+simulated"

    def __init__(self, device: Device) -> None:
        self.cuda = device
        self.version = SimpleNamespace(cuda="13.0", hip=None)
        self.oom_observers: list[Callable[[int, int, int, int], None]] = []
        self._C = SimpleNamespace(_cuda_attach_out_of_memory_observer=self.oom_observers.append)

    def run_out_of_memory(self) -> None:
        """Do what the allocator does where it has nothing left."""
        for told in self.oom_observers:
            told(0, 1 << 30, 2 << 30, 4096)


def allocator_stats(allocated: int, reserved: int, retries: int = 0) -> dict[str, Any]:
    """Return what `memory_stats_as_nested_dict` gives, shortened to what is read and some that is not."""

    def of_pools(value: int) -> dict[str, dict[str, int]]:
        pool = {"current": value, "peak": 2 * value, "allocated": 9 * value, "freed": 8 * value}
        return {"all": pool, "small_pool": pool, "large_pool": pool}

    return {
        "allocated_bytes": of_pools(allocated),
        "active_bytes": of_pools(allocated),
        "reserved_bytes": of_pools(reserved),
        "inactive_split_bytes": of_pools((reserved - allocated) // 2),
        "requested_bytes": of_pools(allocated - 100),
        "num_alloc_retries": retries,
        "num_ooms": 0,
        "num_sync_all_streams": 1,
        "num_device_alloc": 7,
        "num_device_free": 3,
        "max_split_size": -1,
    }


def pinned_stats(allocated: int) -> dict[str, Any]:
    """Return what `host_memory_stats_as_nested_dict` gives, likewise."""
    level = {"current": allocated, "peak": allocated, "allocated": allocated, "freed": 0}
    return {
        "allocated_bytes": level,
        "active_bytes": level,
        "num_host_alloc": 2,
        "num_host_free": 0,
        "host_alloc_time": {"total": 1500, "max": 900, "min": 600, "count": 2, "avg": 750},
    }
