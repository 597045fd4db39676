"""What torch's allocators say of themselves: device memory and pinned host memory.

Peaks are read and never reset, for others use them; counters only grow, and who asks takes their
difference. Keys are those of `torch.cuda.memory_stats` and `host_memory_stats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stagescope.middleware.hooks.torch_device_clock import device_name

LEVELS = {
    "allocated": "allocated_bytes",
    "active": "active_bytes",
    "reserved": "reserved_bytes",
    "inactive_split": "inactive_split_bytes",
    "requested": "requested_bytes",
}
"""Our word → torch's, all in bytes; each has a current and a peak value."""
EVENTS = (
    "num_alloc_retries",
    "num_ooms",
    "num_sync_all_streams",
    "num_device_alloc",
    "num_device_free",
)
HOST_LEVELS = {"allocated": "allocated_bytes", "active": "active_bytes"}
HOST_EVENTS = ("num_host_alloc", "num_host_free")
HOST_TIMES = {"alloc": "host_alloc_time", "free": "host_free_time"}
"""Time in the driver's calls, µs."""


def device_memory(kind: str, namespace: Any) -> list[dict[str, Any]]:
    """Give what the allocator of each device holds that has ever held anything."""
    found = []
    for index in range(namespace.device_count()):
        stats = namespace.memory.memory_stats_as_nested_dict(index)
        if _of(stats, "reserved_bytes", "peak"):
            name = device_name(kind, namespace, index)
            found.append({"device": name, **_device_reading(stats)})
    return found


def _device_reading(stats: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bytes": _levels(stats, LEVELS, "current"),
        "peak_bytes": _levels(stats, LEVELS, "peak"),
        "events": {name: stats[name] for name in EVENTS if name in stats},
    }


def pinned_memory(namespace: Any) -> dict[str, Any] | None:
    """Give what the allocator of pinned host memory holds; None where this torch does not tell."""
    read = getattr(namespace.memory, "host_memory_stats_as_nested_dict", None)
    stats = read() if read is not None else None
    if not stats:
        return None
    return {
        # Of pinned memory torch gives sums alone, of device memory by pool, `all` among them.
        "bytes": _levels(stats, HOST_LEVELS, "current"),
        "peak_bytes": _levels(stats, HOST_LEVELS, "peak"),
        "events": {name: stats[name] for name in HOST_EVENTS if name in stats},
        "time_us": {
            word: stats[key]["total"]
            for word, key in HOST_TIMES.items()
            if "total" in stats.get(key, ())
        },
    }


def _levels(stats: Mapping[str, Any], names: Mapping[str, str], which: str) -> dict[str, int]:
    found = {word: _of(stats, key, which) for word, key in names.items()}
    return {word: value for word, value in found.items() if value is not None}


def _of(stats: Mapping[str, Any], key: str, which: str) -> int | None:
    of_pools = stats.get(key)
    if not isinstance(of_pools, Mapping):
        return None
    value = of_pools.get("all", of_pools).get(which)
    return value if isinstance(value, int) else None
