"""Hugging Face pipelines: `preprocess`, `inference` with `inference.forward`, `postprocess`.

Each item and each batch that a pipeline works on is an opening of its own. Subclasses define these
methods, also the user's, so they are wrapped in the classes of each pipeline when it is made.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from stagescope.middleware.decorators import Steps
from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.model_calls import model_call, timed_call
from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.stage import stage

# Hugging Face `generate` is `inference`, also in a thread of its own that feeds a streamer.
#
# A streamer belongs to the request that made it: a `generate` that gets it works for that request,
# whatever thread it is in, and waiting for the next piece of text is `inference` too.


_OWNER = "_stagescope_timeline"
_STEPS = "_stagescope_steps"


def install_generation() -> None:
    """Wrap `generate` and the streamers."""
    from transformers.generation import streamers
    from transformers.generation.utils import GenerationMixin

    wrap(GenerationMixin, "generate", _timed_generate)
    if hasattr(GenerationMixin, "_prefill"):  # Since 5.0.
        wrap(GenerationMixin, "_prefill", _timed_prefill)
    wrap(streamers.TextStreamer, "__init__", _owned_init)
    wrap(streamers.TextIteratorStreamer, "__next__", _timed_next)
    wrap(streamers.AsyncTextIteratorStreamer, "__anext__", _timed_anext)


@contextmanager
def on_behalf_of(streamer: object) -> Iterator[None]:
    """Work for the request that made *streamer*, where this thread works for none."""
    owner: Timeline | None = getattr(streamer, _OWNER, None)
    if owner is None or current.get() is not None:
        yield
        return
    token = current.set(owner)
    try:
        yield
    finally:
        current.reset(token)


def _timed_generate(generate: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with on_behalf_of(kwargs.get("streamer")), model_call():
            if _decoding.get() is not None:  # An assistant's, within another one.
                return generate(*args, **kwargs)
            decoding: list[stage] = []
            token = _decoding.set(decoding)
            try:
                return generate(*args, **kwargs)
            finally:
                _decoding.reset(token)
                for opened in decoding:
                    opened.__exit__(None, None, None)

    return timed


_decoding: ContextVar[list[stage] | None] = ContextVar("stagescope_decoding", default=None)
"""In `generate`: the stage `inference.decode`, once the prompt has been read."""


def _timed_prefill(prefill: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        decoding = _decoding.get()
        if decoding is None or decoding:
            return prefill(*args, **kwargs)
        with stage("inference.prefill"):
            output = prefill(*args, **kwargs)
        decoding.append(stage("inference.decode"))
        decoding[0].__enter__()
        return output

    return timed


def _owned_init(init: Callable[..., None]) -> Callable[..., None]:
    def owned(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        setattr(self, _OWNER, current.get())
        setattr(self, _STEPS, Steps(stage.of_code, CODES["inference"]))

    return owned


def _timed_next(step: Callable[[Any], str]) -> Callable[[Any], str]:
    def timed(self: Any) -> str:
        steps: Steps = getattr(self, _STEPS)
        steps.begin()
        try:
            text = step(self)
        except BaseException as end:
            steps.close(end if not isinstance(end, StopIteration) else None)
            raise
        steps.end()
        return text

    return timed


def _timed_anext(step: Callable[[Any], Awaitable[str]]) -> Callable[[Any], Awaitable[str]]:
    async def timed(self: Any) -> str:
        steps: Steps = getattr(self, _STEPS)
        steps.begin()
        try:
            text = await step(self)
        except BaseException as end:
            steps.close(end if not isinstance(end, StopAsyncIteration) else None)
            raise
        steps.end()
        return text

    return timed


GENERATION = Hook("transformers.generation.utils", "transformers", ("5", "6"), install_generation)


Make = Callable[[Callable[..., Any]], Callable[..., Any]]

TIMED: dict[str, Make] = {
    "preprocess": stage("preprocess"),
    "forward": timed_call,
    "_forward": stage("inference.forward"),
    "postprocess": stage("postprocess"),
}
"""Method of a pipeline → how it is timed. `forward` moves tensors around `_forward`."""


def install_pipelines() -> None:
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
        with guarded():
            wrap_methods(type(self))
        init(self, *args, **kwargs)

    return wrapping


def _with_streamer(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        with on_behalf_of(kwargs.get("streamer")):
            return call(self, *args, **kwargs)

    return called


PIPELINES = Hook("transformers.pipelines", "transformers", ("5", "6"), install_pipelines)
