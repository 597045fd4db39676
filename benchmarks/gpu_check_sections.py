"""What `gpu_check.py` measures: its sections, what each needs, and the questions that they answer.

The questions are those that no code and no document could answer without a GPU.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

Parts = Mapping[str, Callable[[], object]]
"""What a section measures: each part by its name, gives figures, and may fail by itself."""


@dataclass(frozen=True, slots=True)
class Section:
    """Parts that run in one process of their own."""

    name: str
    parts: str
    """`module:NAME`: there stand its `Parts`, or a function that gives them."""
    needs: tuple[str, ...] = ()
    """Modules without which it is left out."""
    limit_s: float = 60.0
    gpu: bool = True
    """False: it runs without a GPU too."""

    def missing(self) -> list[str]:
        """Return what is not installed here of what it needs."""
        return [name for name in self.needs if find_spec(name) is None]

    def load(self) -> Parts:
        """Import the module, and give the parts."""
        module, _, name = self.parts.partition(":")
        found: Any = getattr(importlib.import_module(module), name)
        parts: Parts = found() if callable(found) else found
        return parts


def captures() -> Parts:
    """Return the cases of gpu_capture.py."""
    module: Any = importlib.import_module("gpu_capture")
    return {case.name: partial(_capture, module, case) for case in module.CASES}


def _capture(module: Any, case: Any) -> object:
    found: dict[str, object] = module.measure((case,))[case.name]
    if "failed" in found:
        raise RuntimeError(found["failed"])
    return found


MACHINE: Final = Section("machine", "gpu_check_machine:PARTS", limit_s=90.0, gpu=False)

_TORCH: Final = ("torch", "numpy")
_HTTP: Final = ("fastapi", "uvicorn", "PIL", "aiohttp", "ibis", "duckdb", "pyarrow", "rich",
                "psutil", "prometheus_client")  # fmt: skip

SECTIONS: Final = (
    Section("device", "gpu_device:PARTS", _TORCH, 90.0),
    Section("nvml", "gpu_nvml:PARTS", (*_TORCH, "pynvml"), 150.0),
    Section("capture", "gpu_check_sections:captures", (*_TORCH, "gpu_capture"), 170.0),
    Section("threads", "gpu_threads:PARTS", _TORCH, 50.0),
    Section("served", "gpu_served:PARTS", (*_TORCH, *_HTTP), 80.0),
)
"""In the order of their worth, for the time of all may be over before the last."""


def planted(table: Path) -> tuple[Section, ...]:
    """Read other sections: a JSON list of objects with the fields of `Section`."""
    return tuple(
        Section(**one | {"needs": tuple(one.get("needs", ()))})
        for one in json.loads(table.read_text())
    )


@dataclass(frozen=True, slots=True)
class Question:
    """Something that only a real GPU can answer."""

    number: int
    asked: str
    answered_by: tuple[str, ...] = ()
    """`section/part` of the figures."""
    look_at: str = ""
    """Names of the figures in there."""
    why_not: str = ""
    """Why it is not measured; empty: it is."""


_EAGER = ("capture/eager", "capture/eager, CUPTI left in place")
_GRAPHS = ("capture/graphs", "capture/graphs, prewarmed")

QUESTIONS: Final = (
    Question(
        1, "what a pair of events and its drain cost a batch, 1 to 64 in flight",
        ("device/event_cost",), "put_us and settled_us less unwatched_us",
    ),
    Question(
        2, "micro-capture: first start, slower batches, what it leaves behind, eager and graphs",
        (*_EAGER, *_GRAPHS),
        "warming_s of the first, recorded_batch_ms beside before_ms, left_behind",
    ),
    Question(
        3, "whether a profile before graphs are captured leaves later captures without kernels",
        ("capture/graphs, prewarmed",), "kernels, degraded",
    ),
    Question(
        4, "how long stop() holds the process where kernels alone are recorded",
        (*_EAGER, *_GRAPHS), "stop_s where deep is false, longest_batch_ms, events",
    ),
    Question(
        5, "NVML: the median of each call under load, GPM at 100 ms to 1 s, effect on p99",
        ("nvml/calls", "nvml/gpm", "nvml/effect"),
    ),
    Question(6, "GetSamples: length and period of each buffer", ("nvml/buffers", "nvml/fields")),
    Question(
        7, "how long a capture by KINETO_USE_DAEMON holds the process",
        why_not="a capture on demand is asked for by dynolog's daemon, over its own datagrams; it "
        "is not part of torch, and we do not speak its protocol",
    ),
    Question(
        8, "whether kernels of graph.replay() come to the stage that replayed them",
        _GRAPHS, "stages, nowhere, ambiguous, told_by_time; busy_ms beside recorded_device_ms",
    ),
    Question(9, "GPM beside a micro-capture: whether both work", ("nvml/gpm_beside_capture",)),
)  # fmt: skip

HEADLINES: Final = (
    ("stage unwatched, 1 in flight, µs", "device/event_cost/0/unwatched_us"),
    ("stage with device time, 1 in flight, µs", "device/event_cost/0/put_us"),
    ("stage with device time, 64 in flight, µs", "device/event_cost/6/put_us"),
    ("batches/s, watched", "device/throughput/watched"),
    ("batches/s, unwatched", "device/throughput/unwatched"),
    ("first capture, eager: warming, s", "capture/eager/captures/0/warming_s"),
    ("first capture, eager: stop, s", "capture/eager/captures/0/stop_s"),
    ("first capture, eager: kernels", "capture/eager/captures/0/kernels"),
    ("batches slower after captures, eager", "capture/eager/left_behind"),
    ("batches slower after captures, graphs", "capture/graphs/left_behind"),
    ("first capture, graphs: kernels", "capture/graphs/captures/0/kernels"),
    ("first capture, prewarmed: kernels", "capture/graphs, prewarmed/captures/0/kernels"),
    ("NVML at 1 Hz: change of p99", "nvml/effect/1 Hz/p99_change"),
    ("NVML at 10 Hz: change of p99", "nvml/effect/10 Hz/p99_change"),
    ("batches with device time, threads", "threads/threads/coverage"),
    ("batches with device time, served", "served/http/coverage"),
)
"""Printed at the end, where there is such a figure."""
