"""What `stagescope run` says at the end where nothing was recorded: as far as can be told, why."""

from __future__ import annotations

from stagescope.middleware.run_notes import HOOK, PYTHON, RECORDER


def unrecorded(notes: str, command: str) -> str | None:
    """Give why no process of *command* recorded anything, from their notes; None where one did."""
    said = {line.split(" ")[0] for line in notes.splitlines()}
    if RECORDER in said:
        return None
    hooks = sorted(what.removeprefix(HOOK) for what in said if what.startswith(HOOK))
    if hooks:
        return (
            f"nothing was recorded: hooked {', '.join(hooks)}, but it served no app or no request"
        )
    if PYTHON in said:
        return (
            f"nothing was recorded: {command} ran Python, but imported no server that there is "
            "a hook for: is it a Python server?"
        )
    return (
        f"nothing was recorded: {command} started no Python that reads PYTHONPATH (-I, -E and -S "
        "forbid it): is it a Python server?"
    )
