"""Hugging Face pipelines: `preprocess`, `inference` with `inference.forward`, `postprocess`.

Each item and each batch that a pipeline works on is an opening of its own. Subclasses define these
methods, also the user's, so they are wrapped in the classes of each pipeline when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from stagescope.middleware.hooks.hook import Hook, wrap
from stagescope.middleware.hooks.model_call import timed_call
from stagescope.middleware.hooks.transformers_generation import on_behalf_of
from stagescope.middleware.stage import stage

Make = Callable[[Callable[..., Any]], Callable[..., Any]]

TIMED: dict[str, Make] = {
    "preprocess": stage("preprocess"),
    "forward": timed_call,
    "_forward": stage("inference.forward"),
    "postprocess": stage("postprocess"),
}
"""Method of a pipeline → how it is timed. `forward` moves tensors around `_forward`."""


def install() -> None:
    """Wrap the pipelines that there are, and those still to come when they are made."""
    from transformers.pipelines.base import Pipeline

    wrap(Pipeline, "__init__", _wrapping_init)
    wrap(Pipeline, "__call__", _with_streamer)
    for pipeline in _with_subclasses(Pipeline):
        wrap_methods(pipeline)


def wrap_methods(pipeline: type) -> None:
    """Wrap the timed methods where *pipeline* and its bases define them."""
    for owner in pipeline.__mro__:
        for name, make in TIMED.items():
            if name in owner.__dict__:
                wrap(owner, name, make)


def _with_subclasses(base: type) -> Iterator[type]:
    yield base
    subclasses: list[type] = base.__subclasses__()
    for subclass in subclasses:
        yield from _with_subclasses(subclass)


def _wrapping_init(init: Callable[..., None]) -> Callable[..., None]:
    def wrapping(self: Any, *args: Any, **kwargs: Any) -> None:
        wrap_methods(type(self))
        init(self, *args, **kwargs)

    return wrapping


def _with_streamer(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        with on_behalf_of(kwargs.get("streamer")):
            return call(self, *args, **kwargs)

    return called


HOOK = Hook("transformers.pipelines", "transformers", ("5", "6"), install)
