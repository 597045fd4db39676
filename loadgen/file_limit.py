"""Open loop means as many connections as the server makes wait: raise the limit of open files."""

from __future__ import annotations

from contextlib import suppress


def raise_file_limit() -> None:
    """Raise this process's soft limit of open files to its hard limit, where the system lets us."""
    try:
        import resource
    except ModuleNotFoundError:  # not a Unix
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
