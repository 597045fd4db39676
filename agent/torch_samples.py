"""Samples made of two answers of a process's probe to `torch`: levels, and what grew between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stagescope.samples import Sample

DEVICE_TIME = "model_server.stage.device_time"
DEVICE_TIMED = "model_server.stage.device_timed"
DEVICE_OPENED = "model_server.stage.device_opened"
DEVICE_MISSED = "model_server.stage.device_missed"
MEMORY = "model_server.torch.memory"
PINNED = "model_server.torch.pinned"
NANO, MICRO = 1e-9, 1e-6

Counts = dict[tuple[str, str, str], float]
"""What only grows, by name, device and detail."""


def samples_between(
    before: Mapping[str, Any] | None, now: Mapping[str, Any], pid: int
) -> list[Sample]:
    """Give the levels of *now*, and the growth since *before*; without a *before*, levels alone."""
    at_ns = int(now["at_ns"])
    levels = [
        Sample(name, at_ns, at_ns, value, pid, device, detail)
        for (name, device, detail), value in _levels(now)
    ]
    if before is None:
        return levels
    since_ns, counted = int(before["at_ns"]), counts(before)
    grown = [
        Sample(*key[:1], since_ns, at_ns, value - counted.get(key, 0.0), pid, *key[1:])
        for key, value in counts(now).items()
    ]
    # A count that went back began anew: a process that stopped and began to take device times.
    return levels + [sample for sample in grown if sample.value > 0]


def counts(answer: Mapping[str, Any]) -> Counts:
    """Give what only grows in the life of a process."""
    found: Counts = {}
    for key, value in (*_times(answer.get("times") or {}), *_events(answer)):
        found[key] = found.get(key, 0.0) + value
    return found


Reading = tuple[tuple[str, str, str], float]


def _times(times: Mapping[str, Any]) -> Iterator[Reading]:
    for one in times.get("stages", ()):
        device, stage = one["device"], one["stage"]
        yield (DEVICE_TIME, device, stage), one["ns"] * NANO
        yield (DEVICE_TIMED, device, stage), one["timed"]
        yield (DEVICE_OPENED, "", stage), one["opened"]
    for stage, count in times.get("untold", {}).items():
        yield (DEVICE_OPENED, "", stage), count
    for reason, count in times.get("missed", {}).items():
        yield (DEVICE_MISSED, "", reason), count


def _events(answer: Mapping[str, Any]) -> Iterator[Reading]:
    for memory in answer.get("memory", ()):
        for name, count in memory["events"].items():
            yield (f"{MEMORY}.events", memory["device"], name), count
    pinned = answer.get("pinned") or {}
    for name, count in pinned.get("events", {}).items():
        yield (f"{PINNED}.events", "", name), count
    for call, total_us in pinned.get("time_us", {}).items():
        yield (f"{PINNED}.driver_time", "", call), total_us * MICRO


def _levels(answer: Mapping[str, Any]) -> Iterator[Reading]:
    for memory in answer.get("memory", ()):
        device, held = memory["device"], memory["bytes"]
        for what, value in held.items():
            yield (f"{MEMORY}.{what}", device, ""), value
        for what, value in memory["peak_bytes"].items():
            yield (f"{MEMORY}.peak", device, what), value
        if held.get("reserved") and "inactive_split" in held:
            share = held["inactive_split"] / held["reserved"]
            yield (f"{MEMORY}.fragmentation", device, ""), share
        if held.get("requested"):  # A torch that does not count it says 0.
            yield (f"{MEMORY}.rounding", device, ""), held["allocated"] - held["requested"]
    pinned = answer.get("pinned") or {}
    for what, value in pinned.get("bytes", {}).items():
        yield (f"{PINNED}.{what}", "", ""), value
    for what, value in pinned.get("peak_bytes", {}).items():
        yield (f"{PINNED}.peak", "", what), value
