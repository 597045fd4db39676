"""What can be set from outside, by `TORCH_SERVER_...` variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How a batch forms, and how many requests may wait for one."""

    max_size: int = 8
    max_delay_s: float = 0.005
    max_waiting: int = 10_000
    """Beyond this a request gets 503. Large on purpose: the demo shows what a queue does."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The server's size."""

    width: int = 40
    """Channels of the model's first layer; time grows with its square."""
    image_side: int = 224
    """Pixels of the square that an image is resized to."""
    decode_threads: int = 1
    limits: BatchLimits = field(default_factory=BatchLimits)


def cores() -> int:
    """Give the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings; one core is left to the model, the others decode."""
    default, limits = Settings(), BatchLimits()
    get = environment.get
    return Settings(
        width=int(get("TORCH_SERVER_WIDTH", default.width)),
        image_side=int(get("TORCH_SERVER_IMAGE_SIDE", default.image_side)),
        decode_threads=int(get("TORCH_SERVER_DECODE_THREADS", min(8, max(1, cores() - 1)))),
        limits=BatchLimits(
            max_size=int(get("TORCH_SERVER_MAX_BATCH", limits.max_size)),
            max_delay_s=float(get("TORCH_SERVER_MAX_DELAY_S", limits.max_delay_s)),
            max_waiting=int(get("TORCH_SERVER_MAX_WAITING", limits.max_waiting)),
        ),
    )
