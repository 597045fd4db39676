"""Samples, stacks and kernels made by hand, for tests of what reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stagescope.kernels import KernelRow
from stagescope.samples import Sample
from stagescope.stacks import Frame, StackSpan


def sample(**changes: Any) -> Sample:
    """Return a reading of a collector's CPU time, from 1 s to 2 s on the clock, with *changes*."""
    made = Sample(
        "stagescope.collector.cpu_time", 1_000_000_000, 2_000_000_000, 0.25, detail="host"
    )
    return replace(made, **changes)


def stack(**changes: Any) -> StackSpan:
    """Return a stack of two frames in `preprocess`, from 1 s on the clock, with *changes*."""
    made = StackSpan(
        pid=4242,
        thread_id=4243,
        thread="MainThread",
        start_ns=1_000_000_000,
        end_ns=1_100_000_000,
        samples=5,
        stage="preprocess",
        by="marker",
        running=True,
        frames=(Frame("predict", "/srv/app.py", 12), Frame("decode", "/srv/images.py", 40)),
        reason="window",
        how="py-spy",
    )
    return replace(made, **changes)


def kernel(**changes: Any) -> KernelRow:
    """Return a kernel in `inference`, of a capture from 1 s to 3 s on the clock, with *changes*."""
    made = KernelRow(
        capture_id="c-1",
        pid=4242,
        start_ns=1_000_000_000,
        end_ns=3_000_000_000,
        stage="inference",
        kind="kernel",
        name="sgemm_128x128",
        device="cuda:0",
        launches=64,
        busy_ns=5_000_000,
        span_ns=0,
        idle_ns=0,
        host_wait_ns=0,
        bound="",
        unmatched=0,
    )
    return replace(made, **changes)
