"""XID and ECC faults as the driver reports them: `nvmlEventSetWait_v2` on a thread of its own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any, Final

from stagescope.agent.gpu.nvml_calls import GONE, NEVER
from stagescope.agent.gpu.probe import ECC, XID, DeviceEvent
from stagescope.agent.log_once import LogOnce

WAIT_S: Final = 0.5
"""How long one wait in the driver lasts; so long may the end of the thread take."""
DOUBLE_BIT_ECC: Final = 0x2
XID_CRITICAL: Final = 0x8
TIMEOUT: Final = 10

Handles = Mapping[str, object]
"""Handles of whole devices by UUID."""


class Events:
    """Yields what the driver reports, and what was found out otherwise (`put`), until `stop`."""

    def __init__(
        self,
        nvml: ModuleType,
        handles: Callable[[], Handles],
        say: LogOnce,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """*handles* gives the same object again as long as the devices are the same."""
        self._nvml = nvml
        self._handles = handles
        self._say = say
        self._clock = clock
        self._found: queue.SimpleQueue[DeviceEvent] = queue.SimpleQueue()
        self._stopped = threading.Event()

    def put(self, event: DeviceEvent) -> None:
        """Add *event* to the others; from any thread."""
        self._found.put(event)

    def stop(self) -> None:
        """Make the iteration end within `WAIT_S`."""
        self._stopped.set()

    def __iter__(self) -> Iterator[DeviceEvent]:
        """Wait for events; one thread iterates."""
        while not self._stopped.is_set():
            handles = self._handles()
            event_set = self._register(handles)
            try:
                yield from self._told(handles, event_set)
            finally:
                self._free(event_set)

    def _free(self, event_set: Any | None) -> None:
        with suppress(self._nvml.NVMLError):  # a driver that was unloaded has freed it
            if event_set is not None:
                self._nvml.nvmlEventSetFree(event_set)

    def _register(self, handles: Handles) -> Any | None:
        """Make a set of the devices that report events; None where none does."""
        try:
            event_set = self._nvml.nvmlEventSetCreate()
        except self._nvml.NVMLError as error:
            self._say(f"the driver reports no faults: {error}")
            return None
        telling = [self._registered(uuid, handle, event_set) for uuid, handle in handles.items()]
        if any(telling):
            return event_set
        self._free(event_set)
        return None

    def _registered(self, uuid: str, handle: object, event_set: Any) -> bool:
        for kinds in (XID_CRITICAL | DOUBLE_BIT_ECC, XID_CRITICAL):  # not all have ECC
            try:
                self._nvml.nvmlDeviceRegisterEvents(handle, kinds, event_set)
            except self._nvml.NVMLError as error:
                refused = error
            else:
                return True
        if refused.value not in NEVER | GONE:
            self._say(f"faults of {uuid} are not reported: {refused}")
        return False

    def _told(self, handles: Handles, event_set: Any | None) -> Iterator[DeviceEvent]:
        """Yield events of one set, until the devices are others."""
        while not self._stopped.is_set() and self._handles() is handles:
            if event_set is None:
                self._stopped.wait(WAIT_S)
            elif (event := self._wait(event_set)) is not None:
                yield event
            while not self._found.empty():
                yield self._found.get_nowait()

    def _wait(self, event_set: Any) -> DeviceEvent | None:
        try:
            data = self._nvml.nvmlEventSetWait_v2(event_set, int(WAIT_S * 1000))
            uuid = str(self._nvml.nvmlDeviceGetUUID(data.device))
        except self._nvml.NVMLError as error:
            if error.value != TIMEOUT:
                self._say(f"waiting for faults failed: {error}; tried again",
                          about=f"events {error.value}")  # fmt: skip
                self._stopped.wait(WAIT_S)  # or it would come back at once
            return None
        if data.eventType == XID_CRITICAL:
            return DeviceEvent(self._clock(), uuid, XID, str(data.eventData))
        return DeviceEvent(self._clock(), uuid, ECC, "uncorrected")
