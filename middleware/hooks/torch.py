"""Plain torch modules: `time_module(model)` charges its calls to `inference`.

Wall time of the call, as the request waited for it: nothing here waits for a device, so where the
model runs on a GPU and the caller does not ask for the result, the time ends when the work is
queued (device time is a matter of the agent's).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from stagescope.middleware.hooks.model_calls import model_call
from stagescope.middleware.patching import PATCHED
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.timeline import Timeline
from stagescope.middleware.runtime.workers import present
from stagescope.middleware.stage import marked, stage

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")


def time_module(module: M, stage: str = "inference") -> M:
    """Charge calls of *module* to the stage named *stage*, in the request that they are made for.

        model = time_module(torch.compile(model))

    Only the outermost of nested calls to one stage counts. Call it on what you call, and after
    compiling: inside a compiled region there is nothing to see, so a module that is compiled
    later is not timed. A second call changes nothing. Gives *module* back.
    """
    with guarded():
        _time(module, stage)
    return module


def _time(module: nn.Module, stage: str) -> None:
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is not None:  # `module.compile()`: hooks would be part of what is compiled.
        if not hasattr(compiled, PATCHED):
            module._compiled_call_impl = _around(compiled, stage)  # pyright: ignore[reportPrivateUsage]
    elif not any(isinstance(hook, Begin) for hook in _pre_hooks(module)):
        module.register_forward_pre_hook(Begin(stage), prepend=True)
        module.register_forward_hook(End(), always_call=True)


def _pre_hooks(module: nn.Module) -> Iterable[object]:
    return module._forward_pre_hooks.values()  # pyright: ignore[reportPrivateUsage]


@dataclass(slots=True)
class _Call:
    """A call of a timed module that has begun."""

    module: nn.Module
    timeline: Timeline
    name: str
    opened: stage | model_call | None
    """None where a call of the same stage is around this one."""
    before: BaseException | None
    """An exception that was being handled already."""


_calls: ContextVar[tuple[_Call, ...]] = ContextVar("stagescope_module_calls", default=())


@dataclass(frozen=True, slots=True)
class Begin:
    """The forward pre-hook. A module is pickled with its hooks, so they are plain data."""

    stage: str

    def __call__(self, module: nn.Module, args: object) -> None:
        if _is_compiling():
            return
        with guarded():
            timeline = present()
            if timeline is not None:
                self._begin(module, timeline)

    def _begin(self, module: nn.Module, timeline: Timeline) -> None:
        around = tuple([call for call in _calls.get() if call.timeline is timeline])
        opened = None
        if not any(call.name == self.stage for call in around):
            opened = model_call(is_mark=True) if self.stage == "inference" else stage(self.stage)
            opened.__enter__()
        call = _Call(module, timeline, self.stage, opened, sys.exception())
        _calls.set((*around, call))


@dataclass(frozen=True, slots=True)
class End:
    """The forward hook; called also where the module raised, which only `sys` then tells."""

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if _is_compiling():
            return
        calls = _calls.get()
        if calls and calls[-1].module is module:
            call = calls[-1]
            _calls.set(calls[:-1])
            if call.opened is not None:
                error = sys.exception()
                kind = type(error) if error is not None and error is not call.before else None
                call.opened.__exit__(kind, None, None)


def _around(compiled: Callable[..., Any], name: str) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with model_call(is_mark=True) if name == "inference" else stage(name):
            return compiled(*args, **kwargs)

    setattr(timed, PATCHED, compiled)
    return marked(timed, name)


def _is_compiling() -> bool:
    """Return whether this is being traced by torch.compile, which then leaves it out."""
    from torch.compiler import is_compiling

    return is_compiling()
