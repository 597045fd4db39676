"""`StageMiddleware`: pure ASGI, outermost, HTTP timed, everything else passed through untouched."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from stagescope import settings
from stagescope.middleware import process
from stagescope.middleware.exchange import Exchange, begin
from stagescope.middleware.otel_context import Attached, Nesting
from stagescope.middleware.process import default_service, process_recorder
from stagescope.middleware.recording.guard import fault, guarded, say_once
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.timeline import current
from stagescope.middleware.runtime import cold_start
from stagescope.middleware.runtime.calibration import calibrate
from stagescope.middleware.runtime.loop_waits import stepped
from stagescope.middleware.runtime.pauses import watch
from stagescope.middleware.types import ASGIApp, Receive, Scope, Send
from stagescope.recorder.spool import default_spool

SERVICE_VARIABLE = process.SERVICE_VARIABLE
SCOPE_KEY = "stagescope.timeline"

TWICE = (
    "StageMiddleware is around this app twice; the outer one times the request, "
    "the inner one does nothing: remove one of the two"
)


class Companion(Protocol):
    """What runs beside the app in its process: the embedded agent."""

    def stop(self) -> None:
        """Finish what is there, within seconds, and end; a second call does nothing."""


class Installer(Protocol):
    """Installs what times the app's frameworks by itself: `hooks.installer.FrameworkHooks`.

    The middleware calls it and knows no framework; the public package passes it in.
    """

    def wrapped(self) -> None:
        """An app has been wrapped: install the hooks of what is loaded by now."""

    def starting(self) -> None:
        """The app is about to start: time the model loads of what is loaded by now."""

    def opened(self, app: ASGIApp, scope: Scope, middleware: type[StageMiddleware]) -> None:
        """The recorder is open: advise on what keeps *middleware* from seeing whole requests."""


async def stopped(companion: Companion) -> None:
    """Stop *companion* without holding the event loop meanwhile; under trio it holds it."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        companion.stop()
    else:
        await loop.run_in_executor(None, companion.stop)


class StageMiddleware:
    """Record where each request's time goes.

    *service* names the service in every record (default `OTEL_SERVICE_NAME`, else
    `model-server`); *spool* is the folder of the recorder files (default: see
    `stagescope.recorder.spool.default_spool`); *installer* installs the hooks of frameworks (none without it); *beside* is called once in each
    process, with the spool, when its recorder opens, and what it gives is stopped when the app's
    lifespan ends: the public package passes the embedded agent.
    With `STAGESCOPE_DISABLE=1` in the environment every request goes straight to *app*.

    Raises nothing of its own; exceptions of the app pass through as they are.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: str | None = None,
        spool: str | Path | None = None,
        *,
        installer: Installer | None = None,
        beside: Callable[[Path], Companion | None] | None = None,
    ) -> None:
        self.app = app
        self._beside = beside
        self._off = True
        self._installer: Installer | None = None
        self._recorder: Recorder | None = None
        """None until the first request: so that no further one asks whether it is the first."""
        self._opened: Recorder | None = None
        self._companion: Companion | None = None
        with guarded():
            self.service = service or default_service()
            self.spool = Path(spool) if spool else default_spool()
            self._off = settings.DISABLE.on()
            self._installer = None if self._off else installer
            if self._installer is not None:
                self._installer.wrapped()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope, as ASGI says."""
        if scope["type"] != "http" or self._off or SCOPE_KEY in scope:
            await self._pass_on(scope, receive, send)
            return
        recorder = self._recorder
        if recorder is None or recorder.closed:
            await self._open_and_serve(scope, receive, send)
            return
        # Guards are `try` blocks, which cost nothing until something is raised.
        timeline = nesting = attached = None
        exchange: Any = None
        try:
            timeline = begin(recorder, scope)
            nesting = timeline.nesting
            if nesting is not None:
                scope, attached = _nested(nesting, scope, recorder)
            exchange = Exchange(timeline, scope, receive, send)
        except Exception as problem:
            if timeline is not None:
                timeline.discard()
                timeline = None
            if fault(problem, recorder):
                raise
        app = self.app  # In a local: `self.app(...)` would look for a method first.
        if timeline is None:
            await app(scope, receive, send)
            return
        scope[SCOPE_KEY] = timeline
        token = current.set(timeline)
        failure = ""
        try:
            work = app(scope, exchange.receive, exchange.send)
            if timeline.watched:
                with guarded(recorder):
                    work = stepped(work, timeline)
            await work
        except BaseException as error:
            with guarded(recorder):
                failure = exchange.failed(error)
            raise
        finally:
            if nesting is not None and attached is not None:
                with guarded(recorder):
                    nesting.leave(attached)
            if not timeline.done:
                with guarded(recorder):
                    exchange.finish(failure)
                if not timeline.done:
                    timeline.discard()
            try:  # noqa: SIM105 - `suppress` costs a request 0.3 µs
                current.reset(token)
            except ValueError:
                pass  # Closed by the garbage collector, in another context.

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" and not self._off:
            await self._live(scope, receive, send)
        else:
            if SCOPE_KEY in scope and not self._off:
                say_once(TWICE)
            await self.app(scope, receive, send)

    async def _open_and_serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        recorder, first = None, False
        with guarded():
            recorder = self.open(scope)
            first = recorder is not None and cold_start.first_request()
        if first:
            await self._serve_first(scope, receive, send)
        elif recorder is None or recorder.closed:
            await self.app(scope, receive, send)
        else:
            await self(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Open the recorder before the first request, so that none waits for it; end with the app.

        What runs beside is stopped here and not at the interpreter's exit, which a server that
        was ended by a signal may never come to.
        """
        startup = None
        with guarded():
            if self._opened is None and self.open(scope):
                self._recorder = None
        with guarded():
            if self._installer is not None:
                self._installer.starting()
            startup = cold_start.Startup(send) if cold_start.begin() else None
        try:
            await self.app(scope, receive, startup.send if startup else send)
        finally:
            with guarded():
                if startup:
                    startup.left()
            with guarded():
                if self._companion is not None:
                    await stopped(self._companion)

    async def _serve_first(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = None
        with guarded():
            first = cold_start.FirstRequest(send)
        failed = True
        try:
            await self(scope, receive, first.send if first else send)
            failed = False
        finally:
            with guarded():
                cold_start.end(at_ns=first.ended_ns if first else 0, failed=failed)

    def open(self, scope: Scope | None = None) -> Recorder | None:
        """Open this process's recorder; None, and from then on pass through, where it cannot.

        *scope* is the connection that found it closed.
        """
        try:
            recorder = process_recorder(self.spool, self.service)
            if recorder is None:
                self._off = True
            elif recorder is not self._opened:
                with guarded(recorder):
                    cold_start.keep(recorder)
                with guarded(recorder):
                    calibrate(recorder, StageMiddleware.around)
                with guarded(recorder):
                    watch(recorder)
                with guarded(recorder):
                    if self._installer is not None:
                        self._installer.opened(self.app, scope or {}, StageMiddleware)
                with guarded(recorder):
                    if self._beside is not None:
                        self._companion = self._beside(self.spool)
        except Exception as error:
            self._off = True
            if fault(error, None):
                raise
            return None
        self._recorder = self._opened = recorder
        return recorder

    @classmethod
    def around(cls, app: ASGIApp, recorder: Recorder) -> StageMiddleware:
        """Wrap *app* with a given recorder, for tests and for measuring ourselves."""
        middleware = cls(app, spool=os.devnull)
        middleware._recorder = middleware._opened = recorder
        return middleware


def _nested(
    nesting: Nesting, scope: Scope, recorder: Recorder | None
) -> tuple[Scope, Attached | None]:
    """Put the app's own spans under the request's; the scope to go on with, and what to undo."""
    with guarded(recorder):
        return nesting.told(scope), nesting.enter_request()
    return scope, None
