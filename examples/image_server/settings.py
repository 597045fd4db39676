"""What can be set from outside, by `IMAGE_SERVER_...` variables."""

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

    model: str = ""
    """An ONNX file; the one beside the code where it is empty. Only for ONNX Runtime."""
    width: int = 40
    """Channels of the first layer; time grows with its square. Only for torch."""
    image_side: int = 224
    """Pixels of the square that an image is resized to."""
    decode_threads: int = 1
    limits: BatchLimits = field(default_factory=BatchLimits)


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings; one core is left to the model, the others decode."""
    default, limits = Settings(), BatchLimits()
    get = environment.get
    return Settings(
        model=get("IMAGE_SERVER_MODEL", default.model),
        width=int(get("IMAGE_SERVER_WIDTH", default.width)),
        image_side=int(get("IMAGE_SERVER_IMAGE_SIDE", default.image_side)),
        decode_threads=int(get("IMAGE_SERVER_DECODE_THREADS", min(8, max(1, cores() - 1)))),
        limits=BatchLimits(
            max_size=int(get("IMAGE_SERVER_MAX_BATCH", limits.max_size)),
            max_delay_s=float(get("IMAGE_SERVER_MAX_DELAY_S", limits.max_delay_s)),
            max_waiting=int(get("IMAGE_SERVER_MAX_WAITING", limits.max_waiting)),
        ),
    )
