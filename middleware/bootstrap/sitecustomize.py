"""Runs at the start of every Python process under `stagescope run`; then the user's own runs.

Whatever Python the command starts finds this file, so its syntax is that of the oldest in use.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.dirname(os.path.dirname(HERE))
"""The stagescope that runs: lent where the served environment has none of its own."""


def begin():  # type: ignore[no-untyped-def]
    """Watch for the frameworks that there are hooks for."""
    if not os.environ.get("STAGESCOPE_RUN"):
        return
    if os.environ.get("STAGESCOPE_DISABLE", "") not in ("", "0"):
        return
    if sys.version_info < (3, 11):  # noqa: UP036 - the served Python is not the one that we run on
        say("Python %d.%d is too old, 3.11 is needed" % sys.version_info[:2])
        return
    try:
        find_stagescope()
        from stagescope.middleware.hooks.autoload import begin as watch

        watch()
    except Exception as error:  # the guard: the server starts, whatever is wrong with us
        say("%s: %s" % (type(error).__name__, error))  # noqa: UP031 - see the top


def find_stagescope():  # type: ignore[no-untyped-def]
    """Import stagescope: the served environment's, else the one that this file belongs to."""
    try:
        import stagescope  # noqa: F401 - what is wanted is that it is there
    except ModuleNotFoundError:
        # Only the package is lent; its folder on sys.path would lend its neighbours too.
        from importlib.util import module_from_spec, spec_from_file_location

        spec = spec_from_file_location(
            "stagescope",
            os.path.join(PACKAGE, "__init__.py"),
            submodule_search_locations=[PACKAGE],
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules["stagescope"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


def say(why):  # type: ignore[no-untyped-def]
    """Say on standard error why this process records nothing."""
    text = "stagescope run: nothing is recorded in process %d: %s\n"
    sys.stderr.write(text % (os.getpid(), why))


def chain():  # type: ignore[no-untyped-def]
    """Step aside, and let the sitecustomize run that would have run without us."""
    sys.path[:] = [entry for entry in sys.path if entry != HERE]
    ours = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # noqa: F401
    except ModuleNotFoundError as missing:
        if missing.name != "sitecustomize":
            raise
        if ours is not None:
            sys.modules["sitecustomize"] = ours


# Imported by hand (a tool that walks the package), it does nothing.
if __name__ == "sitecustomize":
    begin()
    chain()
