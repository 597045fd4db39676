"""Chooses what the GPU sampler reads: NVIDIA's library, torch in the served processes, a recording."""

from __future__ import annotations

import ctypes
import glob
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from stagescope import settings
from stagescope.agent.collectors import Collector
from stagescope.agent.context import AgentContext
from stagescope.agent.gpu.probe import GpuProbe
from stagescope.agent.gpu.sampler import GpuSampler
from stagescope.agent.host.proc import named
from stagescope.agent.log_once import LogOnce

COUNTERS_VARIABLE: Final = settings.GPM.name
"""`on`: read them beside DCGM too; `off`: never; unset: unless DCGM runs here."""
DCGM: Final = frozenset({"dcgm-exporter", "nv-hostengine"})
LOOK_S: Final = 60.0

_log = logging.getLogger("stagescope")


def counters_allowed(
    environment: Mapping[str, str] = os.environ,
    governor: Callable[[], bool] = lambda: True,
    *,
    proc: Path = Path("/proc"),
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[], bool]:
    """Return a function that says whether the counters may be read now; so does *governor*."""
    asked = settings.GPM.choice(environment)
    if asked:
        return lambda: asked == "on" and governor()
    look_s, found = 0.0, ""

    def allowed() -> bool:
        nonlocal look_s, found
        if clock() >= look_s:
            look_s, before, found = (
                clock() + LOOK_S,
                found,
                next((name for _, name in named(proc, DCGM)), ""),
            )
            if found and not before:
                _log.info("gpu: %s reads the hardware counters here, so they are left to it; "
                          "%s=on reads them too", found, COUNTERS_VARIABLE)  # fmt: skip
        return not found and governor()

    return allowed


OTHER_DEVICES: Final = ("/dev/kfd", "/dev/dri/renderD*", "/dev/accel*")
"""What AMD's, Intel's and other accelerators are on Linux."""


def make(agent: AgentContext, environment: Mapping[str, str] = os.environ) -> Sequence[Collector]:
    """Return the sampler, or none where there is nothing to read, which is logged.

    Raises UsageError for a recording that cannot be read.
    """
    if settings.GPU.text(environment) == "off":
        return ()
    open_probe = _chosen(agent, environment)
    if open_probe is None:
        _log.info("no GPU here: neither NVIDIA's libnvidia-ml.so.1 nor another's device file")
        return ()
    return (GpuSampler(open_probe, agent.evidence, agent.notices.put),)


def _chosen(agent: AgentContext, environment: Mapping[str, str]) -> Callable[[], GpuProbe] | None:
    if replayed := settings.GPU_REPLAY.text(environment):
        return _replay(Path(replayed))
    asked = settings.GPU.choice(environment)
    opener: Callable[[], GpuProbe] | None = None
    if asked == "nvml" or (not asked and _has_nvml()):
        opener = _nvml(agent, environment)
    elif asked == "torch" or any(glob.glob(pattern) for pattern in OTHER_DEVICES):
        opener = _torch(agent)
    if opener is not None and (recorded := settings.GPU_RECORD.text(environment)):
        return _recorded(opener, Path(recorded))
    return opener


def _has_nvml() -> bool:
    """Return whether NVIDIA's library can be loaded; it does not touch the driver."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    return True


def _nvml(agent: AgentContext, environment: Mapping[str, str]) -> Callable[[], GpuProbe]:
    may = partial(agent.permissions.allowed, "gpm")
    allowed, say = counters_allowed(environment, may), LogOnce("gpu: ")

    def open_probe() -> GpuProbe:
        from stagescope.agent.gpu.nvml import NvmlProbe

        return NvmlProbe(lambda: {process.pid for _, process in agent.alive()}, allowed, say=say)

    return open_probe


def _torch(agent: AgentContext) -> Callable[[], GpuProbe]:
    def open_probe() -> GpuProbe:
        from stagescope.agent.gpu.torch import TorchProbe

        return TorchProbe(agent.alive)

    return open_probe


def _replay(path: Path) -> Callable[[], GpuProbe]:
    from stagescope.agent.gpu.replay import ReplayProbe, read_recording

    recording = read_recording(path)
    return lambda: ReplayProbe(recording)


def _recorded(open_probe: Callable[[], GpuProbe], path: Path) -> Callable[[], GpuProbe]:
    from stagescope.agent.gpu.replay import RecordedProbe, begin_recording

    begun_ns = begin_recording(path)
    return lambda: RecordedProbe(open_probe(), path, begun_ns)
