"""What a hook of another package is written with; docs/hooks/writing.md has a whole one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.model_calls import timed_call, timed_part
from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.names import intern

__all__ = ["Hook", "part", "recognised", "wrap"]

Make = Callable[[Callable[..., Any]], Callable[..., Any]]


def recognised(stage: str) -> Make:
    """Return what makes each call of a function a recognised one, charged to *stage*; for `wrap`.

    Of nested recognised calls only the outermost counts, and a mark of the app's wins.
    """
    return partial(timed_call, code=intern(stage))


def part(stage: str) -> Make:
    """Return what charges a function to the sub-stage *stage*, within a recognised call alone."""
    return partial(timed_part, name=stage)
