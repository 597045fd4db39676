"""What a hook is, and how one is installed: once, for versions it knows, or not at all."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version

from stagescope import settings
from stagescope.errors import UsageError
from stagescope.middleware.hooks import HOOKS
from stagescope.middleware.patching import unwrap, wrapped_count
from stagescope.middleware.recording.guard import fault, guarded

log = logging.getLogger("stagescope")


_installed: set[str] = set()

ENTRY_POINTS = "stagescope.hooks"
"""Group under which other packages offer hooks: `"IMPORT NAME" = "module:HOOK"`."""


@dataclass(frozen=True, slots=True)
class Hook:
    """How one framework is timed."""

    name: str
    """The framework's import name."""
    distribution: str
    """Its name on the package index."""
    tested: tuple[str, str]
    """First version known, and first version not known any more: `("0.2.10", "0.3")`."""
    install: Callable[[], None]
    """Wrap what is to be timed, with `wrap`; raises AttributeError where it is not there."""


def install(name: str) -> bool:
    """Install the hook of framework *name*; False where it stepped aside, which is logged once.

    False too where `STAGESCOPE_HOOKS` switches it off.

    A second call does nothing. Raises UsageError where there is no such hook, or where the
    framework is not installed.
    """
    if name in _installed:
        return True
    if is_switched_off(name):
        return False
    hook, module = _loaded(name)
    _installed.add(name)
    if not _known(hook):
        return False
    before = wrapped_count()
    try:
        hook.install()
    except AttributeError as gone:
        unwrap(before)
        log.warning("stagescope: hook %s steps aside: %s; the server runs without it", name, gone)
        return False
    except Exception as error:
        unwrap(before)
        if name not in HOOKS:
            log.warning(
                "stagescope: hook %s (%s) is switched off, it raised %r; the server runs without it",
                name, module, error,
            )  # fmt: skip
        elif fault(error, None):
            raise
        return False
    return True


def _loaded(name: str) -> tuple[Hook, str]:
    """Return the hook and the name of its module. Raises UsageError, as `install` does."""
    there = HOOKS if name in HOOKS else HOOKS | third_party()
    if name not in there:
        raise UsageError(f"there is no hook for {name!r}; there are: {', '.join(sorted(there))}")
    module, _, attribute = there[name].partition(":")
    try:
        hook: Hook = getattr(import_module(module), attribute)
    except ModuleNotFoundError as missing:
        raise UsageError(
            f"the hook for {name} needs {missing.name}, which is not installed: "
            f"pip install {missing.name}"
        ) from missing
    return hook, module


def is_switched_off(name: str) -> bool:
    """Return whether `STAGESCOPE_HOOKS` names the hook, or its library, with a minus before it."""
    off = settings.HOOKS.text().replace(" ", "").split(",")
    return f"-{name}" in off or f"-{name.partition('.')[0]}" in off


@cache
def third_party() -> dict[str, str]:
    """Return the hooks that other packages offer: import name to module and attribute."""
    offered = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    return {name: value for name, value in offered.items() if name not in HOOKS}


def install_loaded(names: Sequence[str]) -> None:
    """Install the hooks of those frameworks of *names* that this process has loaded."""
    for name in names:
        if name in sys.modules:
            with guarded():
                install(name)


def _known(hook: Hook) -> bool:
    try:
        found = version(hook.distribution)
    except PackageNotFoundError:
        found = str(getattr(sys.modules.get(hook.name), "__version__", ""))
    first, beyond = hook.tested
    if _numbers(first) <= _numbers(found) < _numbers(beyond):
        return True
    log.warning(
        "stagescope: hook %s steps aside: it knows %s from %s to below %s, this is %s; "
        "the server runs without it",
        hook.name, hook.distribution, first, beyond, found or "unknown",
    )  # fmt: skip
    return False


def _numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: `2.13.0+cpu` gives (2, 13, 0)."""
    numbers: list[int] = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
