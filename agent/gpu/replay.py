"""Recordings of what a probe gave, to replay where there is no GPU: for tests and demonstrations.

A recording is NDJSON. Its first line is `{"kind": "gpu-recording", "version": 1}`; each other line
is a device, a sample or an event with the fields of its dataclass and its `kind`; times are
nanoseconds since the recording began. A replay begins again at its end.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from stagescope.agent.gpu.probe import Device, DeviceEvent, GpuProbe, Tier
from stagescope.errors import UsageError
from stagescope.samples import Sample

HEAD: Final = {"kind": "gpu-recording", "version": 1}
WAIT_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Recording:
    """What was recorded; times in ns since it began."""

    devices: tuple[Device, ...]
    samples: tuple[Sample, ...]
    """By their ends."""
    events: tuple[DeviceEvent, ...]

    @property
    def length_ns(self) -> int:
        """How long it lasts; at least a second."""
        return max(1_000_000_000, *(sample.end_ns for sample in self.samples[-1:]),
                   *(event.at_ns for event in self.events[-1:]))  # fmt: skip


def read_recording(path: Path) -> Recording:
    """Read a recording. Raises UsageError, which names the file and the line."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"the GPU recording {path} cannot be read: {problem}") from problem
    devices: list[Device] = []
    samples: list[Sample] = []
    events: list[DeviceEvent] = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            kind = line.pop("kind")
            if number == 1:
                _check_head(kind, line)
            elif kind == "device":
                devices.append(replace(Device(**line), replay=True))
            elif kind == "sample":
                samples.append(Sample(**line))
            elif kind == "event":
                told = line.pop("event")
                events.append(DeviceEvent(kind=told, **line))
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise UsageError(f"{path}, line {number}: no line of a GPU recording ({problem})"
                             ) from problem  # fmt: skip
    if not lines:
        raise UsageError(f"the GPU recording {path} is empty")
    by_end = sorted(samples, key=lambda one: one.end_ns)
    return Recording(tuple(devices), tuple(by_end), tuple(sorted(events, key=lambda e: e.at_ns)))


def _check_head(kind: object, line: Mapping[str, Any]) -> None:
    if {"kind": kind, **line} != HEAD:
        raise ValueError(f"a recording of version {HEAD['version']} begins with {HEAD}")


class ReplayProbe:
    """Replays a recording's samples and events at their times, again and again."""

    name = "replay"

    def __init__(self, recording: Recording, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._recording = recording
        self._clock = clock
        self._begun_ns = self._given_ns = clock()
        self._stopped = threading.Event()

    def devices(self) -> Sequence[Device]:
        """Return the devices, marked as a replay's."""
        return self._recording.devices

    def poll(self, tier: Tier) -> list[Sample]:
        """Return what has come since the last poll; all of it is `fast`."""
        if tier == "slow":
            return []
        since_ns, self._given_ns = self._given_ns, self._clock()
        return [
            replace(one, start_ns=begun + one.start_ns, end_ns=begun + one.end_ns)
            for begun in self._rounds(since_ns, self._given_ns)
            for one in self._recording.samples
            if since_ns < begun + one.end_ns <= self._given_ns
        ]

    def events(self) -> Iterator[DeviceEvent]:
        """Yield events when their time has come."""
        since_ns = self._begun_ns
        while not self._stopped.wait(WAIT_S):
            now_ns = self._clock()
            for begun in self._rounds(since_ns, now_ns):
                for event in self._recording.events:
                    if since_ns < begun + event.at_ns <= now_ns:
                        yield replace(event, at_ns=begun + event.at_ns)
            since_ns = now_ns

    def stop(self) -> None:
        """Make `events` end."""
        self._stopped.set()

    def close(self) -> None:
        """Nothing is held."""

    def _rounds(self, since_ns: int, until_ns: int) -> range:
        """Return the beginnings of the rounds that touch a stretch of time."""
        length = self._recording.length_ns
        first = self._begun_ns + (since_ns - self._begun_ns) // length * length
        return range(first, until_ns + 1, length)


def begin_recording(path: Path, clock: Callable[[], int] = time.monotonic_ns) -> int:
    """Begin a new recording, and return when. Raises UsageError where it cannot be written."""
    try:
        path.write_text(json.dumps(HEAD) + "\n", "utf-8")
    except OSError as problem:
        raise UsageError(f"the GPU recording {path} cannot be written: {problem}") from problem
    return clock()


class RecordedProbe:
    """Another probe, with all that it gives written to a file as well."""

    def __init__(self, probe: GpuProbe, path: Path, begun_ns: int) -> None:
        """Go on with the recording at *path*, which began at *begun_ns*."""
        self._probe = probe
        self._begun_ns = begun_ns
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()
        self._known: set[Device] = set()
        self.name = probe.name

    def devices(self) -> Sequence[Device]:
        """Return the other's."""
        return self._probe.devices()

    def poll(self, tier: Tier) -> list[Sample]:
        """Poll the other, and write down what it gives."""
        samples = self._probe.poll(tier)
        new = [device for device in self._probe.devices() if device not in self._known]
        self._known.update(new)
        self._write([{"kind": "device"} | asdict(one) for one in new])
        self._write([self._relative(one) for one in samples])
        return samples

    def events(self) -> Iterator[DeviceEvent]:
        """Yield the other's, and write them down."""
        for event in self._probe.events():
            line = asdict(event) | {"at_ns": event.at_ns - self._begun_ns}
            self._write([{"kind": "event", "event": line.pop("kind")} | line])
            yield event

    def stop(self) -> None:
        """Stop the other."""
        self._probe.stop()

    def close(self) -> None:
        """Close the other and the file."""
        self._probe.close()
        self._file.close()

    def _relative(self, sample: Sample) -> Mapping[str, Any]:
        times = {
            "start_ns": sample.start_ns - self._begun_ns,
            "end_ns": sample.end_ns - self._begun_ns,
        }
        return {"kind": "sample"} | asdict(sample) | times

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        with self._lock:
            self._file.writelines(json.dumps(line) + "\n" for line in lines)
            self._file.flush()
