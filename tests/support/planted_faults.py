"""Every function of some source files, and a way to make one of them raise wherever it is called.

A function is replaced by its code, not by its name: whoever holds it, under whatever name, in a
closure or as a bound method, gets the planted one. A function inside another, which is made anew
each time, is replaced in the constants of the code that makes it.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

Key = tuple[str, int]
"""File and first line: a mark changes the name of a function's code, never these."""
Hook = Callable[..., Any]

_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>")
_SOURCE = """
def outer():
    {names}
    {kind}def planted(*_0, **_1):
        _2 = 'the hook'
        if _2 is None:
            {uses}
        {action}
    return planted
"""


class Planted(Exception):
    """What a planted function raises."""


@dataclass(frozen=True, slots=True)
class Target:
    """One function of a source file."""

    key: Key
    name: str
    """Module's path and qualified name: `middleware/asgi.py:StageMiddleware.open`."""


def targets(root: Path, files: list[Path]) -> list[Target]:
    """Return every function of *files*, those inside others too; names are relative to *root*."""
    found = []
    for file in files:
        code = compile(file.read_text(), str(file), "exec")
        for inner in _functions_in(code):
            name = f"{file.relative_to(root)}:{inner.co_qualname.replace('.<locals>', '')}"
            found.append(Target((str(file), inner.co_firstlineno), name))
    return found


def _functions_in(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & inspect.CO_OPTIMIZED and constant.co_name not in _COMPREHENSIONS:
                yield constant
            yield from _functions_in(constant)


class Functions:
    """The functions of *files* that live in this process, as of now."""

    def __init__(self, files: list[Path]) -> None:
        names = {str(file) for file in files}
        self._real: dict[str, str] = {}
        self._holders: dict[Key, list[FunctionType]] = {}
        for function in gc.get_objects():
            if type(function) is FunctionType and self.key(function.__code__)[0] in names:
                for code in (function.__code__, *_functions_in(function.__code__)):
                    self._holders.setdefault(self.key(code), []).append(function)

    def key(self, code: CodeType) -> Key:
        """Return where *code* stands, its file without symbolic links."""
        file = code.co_filename
        if file not in self._real:
            self._real[file] = str(Path(file).resolve())
        return self._real[file], code.co_firstlineno

    def plant(self, target: Target, raises: Callable[[], bool]) -> Callable[[], None]:
        """Let *target* raise at each call for which *raises* is true; returns what undoes it.

        One that is made anew within another raises always.
        """
        before = []
        for function in self._holders.get(target.key, ()):
            code = function.__code__
            before.append((function, code))
            if self.key(code) == target.key:
                function.__code__ = _raising(code, _hook(function, raises))
            else:
                function.__code__ = self._replaced(code, target.key, _hook(None, raises))

        def undo() -> None:
            for function, code in before:
                function.__code__ = code

        return undo

    def _replaced(self, code: CodeType, key: Key, hook: Hook) -> CodeType:
        constants = tuple(
            constant
            if not isinstance(constant, CodeType)
            else _raising(constant, hook)
            if self.key(constant) == key
            else self._replaced(constant, key, hook)
            for constant in code.co_consts
        )
        return code.replace(co_consts=constants)


def _hook(function: FunctionType | None, raises: Callable[[], bool]) -> Hook:
    original = None
    if function is not None:
        original = FunctionType(
            function.__code__, function.__globals__, function.__name__, function.__defaults__,
            function.__closure__,
        )  # fmt: skip
        original.__kwdefaults__ = function.__kwdefaults__

    def hook(*args: Any, **kwargs: Any) -> Any:
        if raises() or original is None:
            raise Planted("planted")
        return original(*args, **kwargs)

    return hook


def _raising(code: CodeType, hook: Hook) -> CodeType:
    """Return code of the same kind and with the same free variables, which only calls *hook*."""
    flags = code.co_flags
    kind, action = "", "return _2(*_0, **_1)"
    if flags & inspect.CO_COROUTINE:
        kind, action = "async ", "return await _2(*_0, **_1)"
    elif flags & inspect.CO_ASYNC_GENERATOR:
        kind, action = "async ", "async for _3 in _2(*_0, **_1): yield _3"
    elif flags & inspect.CO_GENERATOR:
        action = "return (yield from _2(*_0, **_1))"
    free = code.co_freevars
    source = _SOURCE.format(
        kind=kind, action=action, uses=", ".join(free) or "pass",
        names=f"{' = '.join(free)} = None" if free else "pass",
    )  # fmt: skip
    namespace: dict[str, Any] = {}
    exec(compile(source, code.co_filename, "exec"), namespace)  # noqa: S102 - our own source
    planted: CodeType = namespace["outer"]().__code__
    assert planted.co_freevars == free
    constants = tuple(
        hook if constant == "the hook" else constant for constant in planted.co_consts
    )
    return planted.replace(
        co_consts=constants, co_name=code.co_name, co_firstlineno=code.co_firstlineno
    )
