"""A served process whose torch says that it has accelerators, for tests without one.

Torch itself is real; what its back end answers is put in its place.
"""

import pathlib
import sys
from types import SimpleNamespace

import torch

from stagescope.middleware.process import process_recorder

GIB = 1 << 30


def memory_info(index: object = None) -> tuple[int, int]:
    """Return free and total bytes."""
    return 60 * GIB, 64 * GIB


def refused(index: int) -> str:
    """Answer as a back end does that lacks this."""
    raise NotImplementedError


def accelerate(initialised: bool) -> None:
    """Have torch tell of two devices of Intel's kind."""
    torch.accelerator.is_available = lambda: True
    torch.accelerator.current_accelerator = lambda check_available=False: torch.device("xpu")
    torch.accelerator.device_count = lambda: 2
    torch.accelerator.get_memory_info = memory_info
    torch.accelerator.memory_stats = lambda index: {"reserved_bytes.all.current": 3 * GIB}  # type: ignore[assignment, misc]
    torch.xpu = SimpleNamespace(  # type: ignore[assignment]
        is_initialized=lambda: initialised,
        get_device_name=lambda index: f"Accelerator {index}",
        get_device_properties=refused,
    )


def main() -> None:
    """Serve until the input ends."""
    spool, how = sys.argv[1:]
    if how != "plain":
        accelerate(initialised=how == "initialised")
    recorder = process_recorder(pathlib.Path(spool), "served")
    assert recorder is not None
    print(recorder.path, flush=True)
    sys.stdin.read()


main()
