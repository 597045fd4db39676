"""The GPU sampler: reads a probe on threads of its own, for a driver's lock can hold ten seconds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from stagescope.agent.events import THROTTLE as THROTTLE_NOTICE
from stagescope.agent.events import XID as XID_NOTICE
from stagescope.agent.events import Notice
from stagescope.agent.gpu.probe import THROTTLE_BEGAN, XID, DeviceEvent, GpuProbe, NoGpu
from stagescope.agent.log_once import LogOnce
from stagescope.agent.store.telemetry import TelemetryBuffer
from stagescope.samples import Sample

FAST_S: Final = 1.0
SLOW_EVERY: Final = 10
"""Of fast polls."""
RETRY_S: Final = 60.0
STUCK_S: Final = 5.0
END_S: Final = 1.0

HEAT_AND_POWER: Final = frozenset(
    {"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"}
)
"""Reasons that are worth a notice; at its power cap a busy GPU lives."""

_log = logging.getLogger("stagescope")


class GpuSampler:
    """Polls a probe and keeps what it gives; the loop only looks after the threads."""

    name = "gpu"
    period_s = 1.0

    def __init__(
        self,
        open_probe: Callable[[], GpuProbe],
        evidence: TelemetryBuffer,
        notice: Callable[[Notice], None] = lambda notice: None,
        *,
        fast_s: float = FAST_S,
        retry_s: float = RETRY_S,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """*open_probe* may block, and raises NoGpu where there is nothing; it is tried again."""
        self._open_probe = open_probe
        self._evidence = evidence
        self._notice = notice
        self._fast_s = fast_s
        self._retry_s = retry_s
        self._clock = clock
        self._closed = threading.Event()
        self._probe: GpuProbe | None = None
        self._threads: list[threading.Thread] = []
        self._faults: list[Exception] = []
        self._cpu_s: dict[int, float] = {}
        """By the thread's number in the system."""
        self._polled_ns = clock()
        self._say = LogOnce("gpu: ")

    def collect(self) -> None:
        """Begin at the first call; then see that the threads are well."""
        if not self._threads:
            self._start("poll", self._live)
        if self._faults:
            raise self._faults.pop()
        if self._clock() - self._polled_ns > STUCK_S * 1e9 and self._probe is not None:
            self._say(f"the driver has not answered for {STUCK_S:g} s; samples are missing "
                      f"until it does{self._where()}")  # fmt: skip

    def close(self) -> None:
        """End the threads within a second; one that the driver blocks is logged and left."""
        self._closed.set()
        if (probe := self._probe) is not None:
            probe.stop()
        last_ns = self._clock() + int(END_S * 1e9)
        threads = tuple(self._threads)
        for thread in threads:
            thread.join(max(0.0, (last_ns - self._clock()) / 1e9))
        if any(thread.is_alive() for thread in threads):
            self._say(f"the driver blocks a call; its thread ends with the agent{self._where()}")

    def children_cpu_s(self) -> float:
        """Return the CPU seconds of its threads."""
        return sum(self._cpu_s.values())

    def _start(self, word: str, target: Callable[[], None]) -> threading.Thread:
        def live() -> None:
            try:
                target()
            except Exception as fault:  # noqa: BLE001 - a thread has no caller: `collect` raises it
                self._faults.append(fault)

        thread = threading.Thread(target=live, name=f"stagescope-gpu-{word}", daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _live(self) -> None:
        while not self._closed.is_set():
            try:
                self._probe = self._open_probe()
            except NoGpu as why:
                self._say(f"no GPU is read: {why}; tried again every {self._retry_s:g} s")
            else:
                self._serve(self._probe)
            self._closed.wait(self._retry_s)

    def _serve(self, probe: GpuProbe) -> None:
        """Poll until the end, or until the driver is unloaded."""
        if self._closed.is_set():
            probe.stop()
        events = self._start("events", lambda: self._listen(probe))
        try:
            self._poll(probe)
        except NoGpu as why:
            self._say(f"{why}; tried again every {self._retry_s:g} s")
        finally:
            probe.stop()
            events.join()
            self._threads.remove(events)
            self._probe = None
            probe.close()

    def _poll(self, probe: GpuProbe) -> None:
        turn, due_ns = 0, self._clock()
        while not self._closed.is_set():
            samples = probe.poll("fast")
            if turn % SLOW_EVERY == 0:
                samples += probe.poll("slow")
            for device in probe.devices():
                if device.id not in self._evidence.devices:
                    _log.info("gpu: reads %s %s by %s", device.name, device.id, probe.name)
                self._evidence.devices[device.id] = device
            self._evidence.samples.add(samples)
            self._note_cpu()
            turn, self._polled_ns = turn + 1, self._clock()
            due_ns = max(due_ns + int(self._fast_s * 1e9), self._polled_ns)
            self._closed.wait((due_ns - self._polled_ns) / 1e9)

    def _listen(self, probe: GpuProbe) -> None:
        for event in probe.events():
            self._evidence.count("device_events_added")
            if event.kind == XID:
                self._evidence.samples.add([_xid(event)])
            self._tell(event)
            self._note_cpu()

    def _tell(self, event: DeviceEvent) -> None:
        device = self._evidence.devices.get(event.device)
        of = f"{device.name} {event.device}" if device else event.device
        if event.kind == XID:
            sentence = f"the driver reported XID {event.detail} on {of}"
            self._say(f"{sentence}; logged once, counted each time")
            self._notice(Notice(XID_NOTICE, 0, event.device, event.at_ns, sentence))
        elif event.kind == THROTTLE_BEGAN and event.detail in HEAT_AND_POWER:
            sentence = f"{of} is throttled: {event.detail}"
            self._notice(Notice(THROTTLE_NOTICE, 0, event.device, event.at_ns, sentence))

    def _note_cpu(self) -> None:
        self._cpu_s[threading.get_native_id()] = time.thread_time()

    def _where(self) -> str:
        under_way = getattr(self._probe, "under_way", lambda: None)()
        return f" (in {under_way[0]})" if under_way else ""


def _xid(event: DeviceEvent) -> Sample:
    return Sample(
        "model_server.gpu.xid", event.at_ns, event.at_ns, 1.0,
        device=event.device, detail=event.detail,
    )  # fmt: skip
