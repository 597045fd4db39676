"""Getting what an agent sampled while a run lasted into the run's folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from stagescope.errors import StagescopeError
from stagescope.exporters.evidence_tables import write_kernels, write_samples, write_stacks
from stagescope.exporters.run_folder import ServerSide
from stagescope.kernels import KernelRow
from stagescope.samples import Sample
from stagescope.stacks import StackSpan
from stagescope.tables import EVIDENCE

MARGIN_NS = 2_000_000_000
"""Samples from so long before the first request until so long after the last are the run's too."""
SAMPLED_S = 1.5
"""Samples are taken once a second: that of the run's last moment comes after its end."""
_POLL_S = 0.1


class EvidenceSource(Protocol):
    """What we ask of an agent; times are on the monotonic clock of its host."""

    def samples(self, since_ns: int = 0, until_ns: int | None = None) -> Iterator[Sample]:
        """Give the samples that tell of any moment between."""
        ...

    def stacks(self, since_ns: int = 0, until_ns: int | None = None) -> Iterator[StackSpan]:
        """Give the stacks that were seen at any moment between."""
        ...

    def kernels(self, since_ns: int = 0, until_ns: int | None = None) -> Iterator[KernelRow]:
        """Give what captures saw that recorded at any moment between."""
        ...


def collect_evidence(folder: Path, source: EvidenceSource, side: ServerSide) -> str:
    """Write samples, stacks and kernels of the time of *side*'s requests into *folder*.

    Gives a sentence about what is missing, or an empty one: a run is valid without them.
    """
    if not side.requests:
        return ""
    since_ns, until_ns = side.since_ns, side.until_ns
    writes: tuple[Callable[[], int], ...] = (
        lambda: write_samples(
            folder, source.samples(max(0, since_ns - MARGIN_NS), until_ns + MARGIN_NS)
        ),
        lambda: write_stacks(folder, source.stacks(since_ns, until_ns)),
        lambda: write_kernels(folder, source.kernels(since_ns, until_ns)),
    )
    try:
        _wait_until_sampled(source, until_ns)
        for write in writes:
            write()
    except StagescopeError as problem:
        return f"this run has no {_missing(folder)}: {problem}"
    except KeyboardInterrupt:
        return f"this run has no {_missing(folder)}: ended while they were collected"
    return ""


def _wait_until_sampled(source: EvidenceSource, until_ns: int) -> None:
    deadline = time.monotonic() + SAMPLED_S
    while not any(True for _ in source.samples(until_ns)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _missing(folder: Path) -> str:
    names = [table.name for table in EVIDENCE if not (folder / table.file_name).exists()]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
