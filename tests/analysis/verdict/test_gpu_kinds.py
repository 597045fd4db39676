"""The kinds of a GPU, by recorded shapes of evidence; they have not been tried on a device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stagescope.analysis.build import build_report
from stagescope.analysis.report import Report
from tests.support.runs import (
    MS,
    amount_row,
    client_row,
    kernel_row,
    level_row,
    server_row,
    write_run_folder,
)

FACTS = [
    {"kind": "ran", "loop": 0, "start_ns": 0, "end_ns": MS},
    {"kind": "awaited", "loop": 0, "start_ns": MS, "end_ns": 15 * MS},
]
"""A millisecond on the loop, then the model elsewhere."""
END = 14_000 * MS


def report_of(
    folder: Path, kernels: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]] = ()
) -> Report:
    """Return the report of 120 requests of which 14 of 20 ms are in `inference`."""
    client = [client_row(seq) for seq in range(120)]
    server = [
        server_row(row, {"preprocess": MS, "inference": 14 * MS}, wait_facts=FACTS)
        for row in client
    ]
    device = amount_row("model_server.stage.device_time", 1.6, 0, END, detail="inference")
    path = write_run_folder(
        folder, client, server, samples=[device, *samples], stacks=[], kernels=kernels
    )
    return build_report(path)


def captured(bound: str, *kinds: tuple[str, str, int], idle_ns: int) -> list[dict[str, Any]]:
    """Return the rows of one capture: kernels and copies, and the stage's sum."""
    busy = sum(ns for _, _, ns in kinds)
    return [
        *(kernel_row("inference", kind, name, ns, launches=120) for kind, name, ns in kinds),
        kernel_row(
            "inference", "stage", "", busy, bound=bound, span_ns=busy + idle_ns, idle_ns=idle_ns
        ),
    ]


SHAPES = {
    "gpu-compute": captured(
        "kernel", ("kernel", "ampere_sgemm_128x64_tn", 900 * MS),
        ("kernel", "vectorized_elementwise_kernel", 60 * MS), idle_ns=30 * MS,
    ),
    "gpu-launch": captured(
        "launch", ("kernel", "vectorized_elementwise_kernel", 120 * MS), idle_ns=880 * MS
    ),
    "gpu-copy": captured(
        "copy", ("copy", "Memcpy HtoD (Pageable -> Device)", 800 * MS),
        ("kernel", "ampere_sgemm_128x64_tn", 90 * MS), idle_ns=40 * MS,
    ),
}  # fmt: skip
"""As torch's profiler writes them."""


@pytest.mark.parametrize("kind", SHAPES)
def test_what_a_capture_says_of_the_stage(tmp_path: Path, kind: str) -> None:
    """What bounds the stage that takes most of the latency is the verdict, with its stage."""
    verdict = build_of(tmp_path, kind).verdict

    assert (verdict.kind, verdict.stage) == (kind, "inference")
    others = {rival.kind: rival.status for rival in verdict.rivals}
    assert all(others[other] == "ruled out" for other in SHAPES if other != kind)
    assert verdict.next_steps[0].docs == f"docs/verdicts.md#{kind}"


def build_of(folder: Path, kind: str) -> Report:
    """Return the report of the shape of *kind*."""
    return report_of(folder, SHAPES[kind])


def test_the_allocators_retries(tmp_path: Path) -> None:
    """Where torch's allocator tries again for every tenth request, device memory is short."""
    retries = amount_row("model_server.torch.memory.events", 24, 0, END, detail="num_alloc_retries")
    memory = [level_row("process.memory.usage", 1e9, at * 1000 * MS) for at in range(1, 13)]

    verdict = report_of(tmp_path, (), [retries, *memory]).verdict

    assert verdict.kind == "gpu-memory", verdict


def test_a_device_without_a_capture_names_the_command(tmp_path: Path) -> None:
    """Without a capture nobody knows what bounds the stage; the verdict says how to learn it."""
    verdict = report_of(tmp_path, ()).verdict

    assert not verdict.kind.startswith("gpu")
    assert any("stagescope capture" in missing for missing in verdict.untested)
