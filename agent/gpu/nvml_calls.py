"""Calls of NVML: each one timed, a slow one made rarer, errors sorted.

NVML takes a lock of the driver, which a kernel launch may wait for: so what a call takes is a cost
to the server, and a call whose median is over `SLOW_S` halves its own rate.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from stagescope.agent.log_once import LogOnce

SLOW_S: Final = 0.002
REMEMBERED: Final = 15
"""Calls of one function that its median is of."""
JUDGED: Final = 5
"""As few as that are enough to call it slow."""
RAREST: Final = 64

NOTHING_NOW: Final = frozenset({6, 7, 10, 19, 21, 27})
"""NVML_ERROR_: NOT_FOUND (idle), INSUFFICIENT_SIZE (it grew), TIMEOUT, IN_USE, NO_DATA, NOT_READY."""
NO_PERMISSION: Final = 4
NEVER: Final = frozenset({2, 3, NO_PERMISSION, 13, 22, 25, 26})
"""INVALID_ARGUMENT, NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND, VGPU_ECC_NOT_SUPPORTED,
ARGUMENT_VERSION_MISMATCH, DEPRECATED: not on this device with this driver."""
GONE: Final = frozenset({1, 9, 15, 16, 18, 28})
"""UNINITIALIZED, DRIVER_NOT_LOADED, GPU_IS_LOST, RESET_REQUIRED, LIB_RM_VERSION_MISMATCH,
GPU_NOT_FOUND: the device, or the driver, is no more."""


class Calls:
    """Calls functions of pynvml by name; one thread calls, any thread asks `under_way`."""

    def __init__(
        self,
        nvml: ModuleType,
        say: LogOnce,
        slow_s: float = SLOW_S,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """A call of *nvml* whose median is over *slow_s* is made rarer."""
        self.nvml = nvml
        self.say = say
        self.under_way: tuple[str, int] | None = None
        """Name and beginning of the call that is being made now."""
        self._slow_s = slow_s
        self._clock = clock
        self._times: dict[str, deque[float]] = {}
        self._medians: dict[str, float] = {}
        self._rarer: dict[str, int] = {}

    def __call__(self, name: str, *arguments: Any, as_: str = "") -> Any:
        """Call the function *name*, timed under *as_* or its own name. Raises NVMLError."""
        function = getattr(self.nvml, name, None)
        if function is None:  # an older binding
            raise self.nvml.NVMLError(self.nvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        begun_ns = self._clock()
        self.under_way = (name, begun_ns)
        try:
            return function(*arguments)
        finally:
            self.under_way = None
            self._note(as_ or name, (self._clock() - begun_ns) / 1e9)

    def rarer(self, name: str) -> int:
        """Return by what the rate of *name* is divided."""
        return self._rarer.get(name, 1)

    def medians(self) -> dict[str, float]:
        """Return the median time of each call, in seconds."""
        return dict(self._medians)

    def _note(self, name: str, took_s: float) -> None:
        times = self._times.setdefault(name, deque(maxlen=REMEMBERED))
        times.append(took_s)
        median = self._medians[name] = statistics.median(times)
        rarer = self.rarer(name)
        if len(times) >= JUDGED and median > self._slow_s and rarer < RAREST:
            self.say(
                f"{name} takes {median * 1000:.1f} ms in the driver, so it is called half as often, "
                "and half of that while it stays so",
                about=f"slow {name}",
            )
            self._rarer[name] = rarer * 2
            times.clear()
        elif len(times) == REMEMBERED and median < self._slow_s / 2 and rarer > 1:
            self._rarer[name] = rarer // 2
            times.clear()
