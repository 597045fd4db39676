"""ONNX Runtime: each run of an `InferenceSession` is `inference`.

`run_async` comes back at once; its stage lasts until the runtime's own thread has called back,
and the callback belongs to the request again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.model_calls import timed_call
from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline, current

_INFERENCE = CODES["inference"]

RUNS = ("run", "run_with_iobinding", "run_with_ort_values", "run_with_ortvaluevector")
"""Methods that come back when the model has run."""


def install() -> None:
    """Wrap the methods that run a model."""
    from onnxruntime import InferenceSession

    for name in RUNS:
        wrap(InferenceSession, name, timed_call)
    wrap(InferenceSession, "run_async", _timed_async)


def _timed_async(run_async: Callable[..., Any]) -> Callable[..., Any]:
    def timed(
        self: Any, output_names: Any, input_feed: Any, callback: Any, *args: Any, **kwargs: Any
    ) -> Any:
        timeline, index, told = current.get(), None, callback
        with guarded():
            if timeline is not None:
                index = timeline.open(_INFERENCE)
                told = _closing(callback, timeline, index)
        try:
            return run_async(self, output_names, input_feed, told, *args, **kwargs)
        except Exception:
            if timeline is not None and index is not None:
                with guarded():
                    timeline.close_at(index, timeline.clock(), failed=True)
            raise

    return timed


def _closing(callback: Callable[..., Any], timeline: Timeline, index: int) -> Callable[..., Any]:
    @functools.wraps(callback)
    def called_back(results: Any, user_data: Any, error: str) -> Any:
        with guarded():
            timeline.close_at(index, timeline.clock(), failed=bool(error))
        token = current.set(timeline)
        try:
            return callback(results, user_data, error)
        finally:
            current.reset(token)

    return called_back


HOOK = Hook("onnxruntime", "onnxruntime", ("1.17", "2"), install)
