"""Ray Serve: calls of one deployment by another, `handle.remote(...)`.

The caller's note travels as one more attribute of the request's metadata, a plain tuple, so that
a process without stagescope reads it without harm.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from stagescope import recorder_format as fmt
from stagescope.middleware.carrier import AttachedTimeline, attach, lend
from stagescope.middleware.exchange import begin
from stagescope.middleware.guard import guarded
from stagescope.middleware.hooks import entry, ray_http
from stagescope.middleware.names import CODES
from stagescope.middleware.stage import stage
from stagescope.middleware.timeline import Timeline, current
from stagescope.middleware.together import Together

NOTE = "stagescope"
QUEUE = CODES["queue"]


def noting(get_metadata: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what makes the metadata of a call, on the caller's side."""

    def get_and_note(*args: Any, **kwargs: Any) -> Any:
        metadata = get_metadata(*args, **kwargs)
        with guarded():
            metadata.__dict__[NOTE] = (_carrier(), ray_http.arrived.get())
        return metadata

    return get_and_note


def _carrier() -> str:
    """Lend the present timeline, or tell its ids alone; empty where there is no one request."""
    timeline = current.get()
    if timeline is None or timeline.done or isinstance(timeline, Together):
        return ""
    return lend() or ";".join(
        (timeline.trace_id.hex(), timeline.span_id.hex(), str(timeline.start_ns),
         str(timeline.clock()), "0", timeline.run.decode(), "")
    )  # fmt: skip


def called(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of a user's method in the replica, on the user's loop."""

    async def run_timed(self: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
        with Call(self, metadata):
            return await run(self, metadata, *args, **kwargs)

    return run_timed


def streamed(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of a user's generator in the replica, where it runs to its end inside."""

    async def run_timed(
        self: Any, metadata: Any, *args: Any, enqueue: Callable[..., Any] | None = None
    ) -> Any:
        if enqueue is None:
            return await run(self, metadata, *args)
        with Call(self, metadata):
            return await run(self, metadata, *args, enqueue=enqueue)

    return run_timed


class Call:
    """One call in its replica: the caller's timeline where it can be had, else a record apart."""

    __slots__ = ("_metadata", "_replica", "_stage", "_timeline", "_token")

    def __init__(self, replica: Any, metadata: Any) -> None:
        self._replica = replica
        self._metadata = metadata
        self._timeline: Timeline | None = None

    def __enter__(self) -> None:
        with guarded():
            self._timeline = self._take_up()
        self._token = current.set(self._timeline)
        deployment = self._replica._deployment_id.name
        self._stage = stage(f"inference.{deployment}"[: fmt.NAME_BYTES - 1])
        self._stage.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stage.__exit__(kind, error, traceback)
        current.reset(self._token)
        if self._timeline is not None:
            with guarded(self._timeline.recorder):
                self._end(self._timeline, kind)

    def _take_up(self) -> Timeline | None:
        carrier, _ = self._metadata.__dict__.get(NOTE) or ("", None)
        recorder = entry.recorder() if carrier else None
        if recorder is None:
            return None
        attached = attach(carrier, recorder)
        if attached is not None:
            attached.close_at(attached.open_at(QUEUE, attached.lent_ns), attached.clock())
            return attached
        trace, span, _, _, _, run, _ = carrier.split(";", 6)
        headers = [(b"traceparent", f"00-{trace}-{span}-01".encode())]
        if run:
            headers.append((b"baggage", f"stagescope.run={run}".encode()))
        deployment = self._replica._deployment_id
        path = f"/{deployment.app_name}/{deployment.name}/{self._metadata.call_method}"
        return begin(recorder, {"headers": headers, "method": "CALL", "path": path})

    @staticmethod
    def _end(timeline: Timeline, kind: type[BaseException] | None) -> None:
        if isinstance(timeline, AttachedTimeline):
            timeline.done = True
            return
        error = kind.__name__.encode() if kind else b""
        timeline.finish(timeline.clock(), 0, 0, 0, 0, 0, 0, error, b"")
