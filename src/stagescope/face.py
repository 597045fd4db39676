"""`StageMiddleware` and `install` as users get them: the embedded agent is the default beside."""

from __future__ import annotations

from pathlib import Path

from stagescope.middleware import asgi
from stagescope.middleware.hooks.installer import FrameworkHooks
from stagescope.middleware.types import ASGIApp


class StageMiddleware(asgi.StageMiddleware):
    """Record where each request's time goes, and start an agent that reads the records where none runs.

    One line is enough: `app = StageMiddleware(app)` or `app.add_middleware(StageMiddleware)`.
    The records are read by `stagescope agent` where one runs for this spool, else by a process
    that this one starts (`STAGESCOPE_AGENT=off` forbids that).
    """

    __doc__ = (__doc__ or "") + (asgi.StageMiddleware.__doc__ or "")

    def __init__(
        self,
        app: ASGIApp,
        service: str | None = None,
        spool: str | Path | None = None,
        *,
        hooks: bool = True,
    ) -> None:
        installer = FrameworkHooks() if hooks else None
        super().__init__(app, service, spool, installer=installer, beside=start_embedded)


def start_embedded(spool: Path) -> asgi.Companion | None:
    """Start the agent of this process, loading what starts it only now."""
    from stagescope.embedded import start_embedded_agent

    return start_embedded_agent(spool)


def install(name: str) -> bool:
    """Install the hook of framework *name*, as `stagescope run` does without being asked.

    False where it stepped aside, which is logged once. Raises UsageError where there is no such hook,
    or where the framework is not installed. An app that a hook wraps has the embedded agent
    beside it, like one that was wrapped by hand.
    """
    from stagescope.middleware.hooks import hook, wrapping

    wrapping.beside = start_embedded
    return hook.install(name)
