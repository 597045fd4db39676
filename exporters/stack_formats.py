"""Stacks as files of other tools: collapsed lines, and speedscope's JSON.

Collapsed: `a;b;c N`, one line a stack, for https://github.com/brendangregg/FlameGraph and its kin;
N is samples. speedscope: https://www.speedscope.app/file-format-schema.json, one profile a stage.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from stagescope.exporters.flame_graph import path_of, stage_of
from stagescope.stacks import Frame, StackSpan

SPEEDSCOPE_SCHEMA = "https://www.speedscope.app/file-format-schema.json"


def collapsed(spans: Sequence[StackSpan]) -> str:
    """Return collapsed lines, the stage first, the most frequent stack first."""
    counts: Counter[str] = Counter()
    for span in spans:
        names = [name.replace(";", ":").replace("\n", " ") for name in path_of(span)]
        counts[";".join(names)] += span.samples
    return "".join(f"{stack} {count}\n" for stack, count in counts.most_common())


def speedscope(spans: Sequence[StackSpan], name: str) -> dict[str, Any]:
    """Return speedscope's document; weights are ns, profiles are stages."""
    frames: dict[Frame, int] = {}
    by_stage: dict[str, list[StackSpan]] = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        by_stage.setdefault(stage_of(span), []).append(span)
    profiles = [_profile(stage, of_stage, frames) for stage, of_stage in sorted(by_stage.items())]
    return {
        "$schema": SPEEDSCOPE_SCHEMA,
        "name": name,
        "exporter": "stagescope",
        "shared": {
            "frames": [
                {"name": frame.function, "file": frame.file, "line": frame.line} for frame in frames
            ]
        },
        "profiles": profiles,
    }


def _profile(stage: str, spans: Sequence[StackSpan], frames: dict[Frame, int]) -> dict[str, Any]:
    samples = [[frames.setdefault(frame, len(frames)) for frame in span.frames] for span in spans]
    weights = [span.end_ns - span.start_ns for span in spans]
    return {
        "type": "sampled",
        "name": stage,
        "unit": "nanoseconds",
        "startValue": 0,
        "endValue": sum(weights),
        "samples": samples,
        "weights": weights,
    }


# Stacks as a pprof profile: gzipped protobuf, `perftools.profiles.Profile`.
#
# Format: https://github.com/google/pprof/blob/main/proto/profile.proto. The message is built by the
# protobuf runtime, which OpenTelemetry's exporters bring, from a description of the fields used
# here. Labels of each sample: `stage`, `thread`, `pid`.


_FIELDS: dict[str, tuple[tuple[str, int, str, bool], ...]] = {
    "ValueType": (("type", 1, "int64", False), ("unit", 2, "int64", False)),
    "Label": (("key", 1, "int64", False), ("str", 2, "int64", False), ("num", 3, "int64", False)),
    "Sample": (
        ("location_id", 1, "uint64", True),
        ("value", 2, "int64", True),
        ("label", 3, "Label", True),
    ),
    "Line": (("function_id", 1, "uint64", False), ("line", 2, "int64", False)),
    "Location": (("id", 1, "uint64", False), ("line", 4, "Line", True)),
    "Function": (
        ("id", 1, "uint64", False),
        ("name", 2, "int64", False),
        ("system_name", 3, "int64", False),
        ("filename", 4, "int64", False),
    ),
    "Profile": (
        ("sample_type", 1, "ValueType", True),
        ("sample", 2, "Sample", True),
        ("location", 4, "Location", True),
        ("function", 5, "Function", True),
        ("string_table", 6, "string", True),
        ("duration_nanos", 10, "int64", False),
        ("period_type", 11, "ValueType", False),
        ("period", 12, "int64", False),
    ),
}
"""Message → (field, number, type, repeated), as profile.proto has them."""
_PACKAGE = "perftools.profiles"


def pprof(spans: Sequence[StackSpan]) -> bytes:
    """Return the profile: values are samples and ns of wall time."""
    return gzip.compress(_Profile(spans).message.SerializeToString(), mtime=0)


def profile_type() -> Any:
    """Return the message's class, for reading a profile too."""
    return _types()["Profile"]


@cache
def _types() -> dict[str, Any]:
    from google.protobuf import (  # type: ignore[import-untyped]
        descriptor_pb2,
        descriptor_pool,
        message_factory,
    )

    file = descriptor_pb2.FileDescriptorProto(
        name="stagescope_profile.proto", package=_PACKAGE, syntax="proto3"
    )
    for message, fields in _FIELDS.items():
        described = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = described.field.add(name=name, number=number)
            field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if kind in _FIELDS:
                field.type, field.type_name = field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                field.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))
        for name in _FIELDS
    }


class _Profile:
    """Fills one message."""

    def __init__(self, spans: Sequence[StackSpan]) -> None:
        self.message = profile_type()()
        self._strings: dict[str, int] = {"": 0}
        self._functions: dict[tuple[str, str], int] = {}
        self._locations: dict[Frame, int] = {}
        self._type(self.message.sample_type.add(), "samples", "count")
        self._type(self.message.sample_type.add(), "wall", "nanoseconds")
        self._type(self.message.period_type, "wall", "nanoseconds")
        for span in spans:
            self._sample(span)
        if spans:
            since = min(span.start_ns for span in spans)
            self.message.duration_nanos = max(span.end_ns for span in spans) - since
            self.message.period = sum(s.end_ns - s.start_ns for s in spans) // sum(
                s.samples for s in spans
            )
        self.message.string_table.extend(self._strings)

    def _type(self, message: Any, kind: str, unit: str) -> None:
        message.type, message.unit = self._string(kind), self._string(unit)

    def _string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings))

    def _sample(self, span: StackSpan) -> None:
        sample = self.message.sample.add()
        sample.location_id.extend(self._location(frame) for frame in reversed(span.frames))
        sample.value.extend([span.samples, span.end_ns - span.start_ns])
        for key, text in (("stage", stage_of(span)), ("thread", span.thread)):
            sample.label.add(key=self._string(key), str=self._string(text))
        sample.label.add(key=self._string("pid"), num=span.pid)

    def _location(self, frame: Frame) -> int:
        if frame not in self._locations:
            self._locations[frame] = len(self._locations) + 1
            location = self.message.location.add(id=self._locations[frame])
            location.line.add(function_id=self._function(frame), line=frame.line)
        return self._locations[frame]

    def _function(self, frame: Frame) -> int:
        key = (frame.function, frame.file)
        if key not in self._functions:
            self._functions[key] = len(self._functions) + 1
            name = self._string(frame.function)
            self.message.function.add(
                id=self._functions[key], name=name, system_name=name,
                filename=self._string(frame.file),
            )  # fmt: skip
        return self._functions[key]
