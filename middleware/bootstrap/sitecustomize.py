"""Runs at the start of every Python process under `stagescope run`; then the user's own runs.

Whatever Python the command starts finds this file, so its syntax is that of Python 3.6.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.dirname(os.path.dirname(HERE))
"""The stagescope that runs: lent where the served environment has none of its own."""


def begin() -> None:
    """Watch for the frameworks that there are hooks for."""
    if not os.environ.get("STAGESCOPE_RUN"):
        return
    if os.environ.get("STAGESCOPE_DISABLE", "").strip().lower() not in (
        "",
        "0",
        "off",
        "no",
        "false",
    ):
        return
    if sys.version_info < (3, 11):  # noqa: UP036 - not the Python that we are run by
        say(f"Python {sys.version_info[0]}.{sys.version_info[1]} is too old, 3.11 is needed")
        return
    try:
        watch()
    except Exception as error:  # noqa: BLE001 - the guard: the server starts, whatever we do
        say(f"{type(error).__name__}: {error}")
    stay_first_after_exec()


def watch() -> None:
    """Use the served environment's stagescope, else lend it the one that this file belongs to."""
    try:
        from stagescope.middleware.hooks import autoload
    except ModuleNotFoundError as missing:
        if missing.name != "stagescope":
            raise
        # For this import only: what lies beside the package is not for the server.
        beside = os.path.dirname(PACKAGE)
        sys.path.append(beside)
        try:
            from stagescope.middleware.hooks import autoload
        finally:
            sys.path.remove(beside)
    autoload.begin()


def with_ours_first(path: str) -> str:
    """Return the PYTHONPATH *path* with our folder first, where it is on it at all."""
    entries = path.split(os.pathsep)
    if HERE not in entries:
        return path
    return os.pathsep.join([HERE] + [entry for entry in entries if entry != HERE])


def put_ours_first() -> None:
    """Put our folder first again on the PYTHONPATH of what this process starts.

    Python runs the first `sitecustomize` alone. Of two launchers that both work by one, that of
    OpenTelemetry puts its own first and does not run ours; ours runs theirs.
    """
    path = os.environ.get("PYTHONPATH")
    if path and with_ours_first(path) != path:
        os.environ["PYTHONPATH"] = with_ours_first(path)


def stay_first_after_exec() -> None:
    """Put our folder first before this process becomes another; each exec of `os` ends in these."""
    execv, execve = os.execv, os.execve

    def execv_with_ours_first(path, argv):  # type: ignore[no-untyped-def]
        put_ours_first()
        return execv(path, argv)

    def execve_with_ours_first(path, argv, env):  # type: ignore[no-untyped-def]
        if isinstance(env, dict) and isinstance(env.get("PYTHONPATH"), str):
            env = dict(env, PYTHONPATH=with_ours_first(env["PYTHONPATH"]))
        elif env is os.environ:
            put_ours_first()
        return execve(path, argv, env)

    os.execv = execv_with_ours_first
    os.execve = execve_with_ours_first


def say(why: str) -> None:
    """Say on standard error why this process records nothing."""
    sys.stderr.write(f"stagescope run: nothing is recorded in process {os.getpid()}: {why}\n")


def chain() -> None:
    """Step aside, and let the sitecustomize run that would have run without us."""
    sys.path[:] = [entry for entry in sys.path if entry != HERE]
    ours = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # type: ignore[import-not-found] # noqa: F401
    except ModuleNotFoundError as missing:
        if missing.name != "sitecustomize":
            raise
        if ours is not None:
            sys.modules["sitecustomize"] = ours
    finally:
        if os.environ.get("STAGESCOPE_RUN"):
            put_ours_first()


# Imported by hand (a tool that walks the package), it does nothing.
if __name__ == "sitecustomize":
    begin()
    chain()
