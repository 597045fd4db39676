"""Starlette behind a real uvicorn: what is timed by itself, and what is said about the app's stack."""

from __future__ import annotations

import gc
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from stagescope.face import StageMiddleware
from stagescope.middleware.recording import guard
from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import ring_files
from stagescope.records import RequestRecord
from stagescope.testing import wait_until
from tests.support.serving import served


@pytest.fixture(autouse=True)
def _no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public middleware, without an agent beside it."""
    monkeypatch.setenv("STAGESCOPE_AGENT", "off")


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_said", set())


class Passing(BaseHTTPMiddleware):
    """One that does nothing."""

    async def dispatch(self, request: Request, call_next: Any) -> Any:
        """Hand on."""
        return await call_next(request)


async def echo(request: Request) -> JSONResponse:
    """Give back what was sent."""
    return JSONResponse(await request.json())


def ask(app: Any, path: str = "/echo/5", times: int = 1) -> None:
    """Serve *app* and send it a body."""
    with served(app) as port:
        for _ in range(times):
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=b"[1]")
            with urllib.request.urlopen(request, timeout=10) as response:
                assert response.read() == b"[1]"


def records(spool: Path, count: int = 1) -> list[RequestRecord]:
    """Return the requests in the recorder files of *spool*, of which there are *count*."""
    found: list[RequestRecord] = []
    for path in ring_files(spool):
        with RecorderReader(path) as reader:
            wait_until(lambda reader=reader: reader.poll(0) == [])  # type: ignore[misc]
            found += [record for record in reader.poll() if isinstance(record, RequestRecord)]
    assert len(found) == count
    return found


ROUTES = [
    Route("/echo/{n:int}", echo, methods=["POST"]),
    Mount("/sub/{who}", routes=[Route("/echo", echo, methods=["POST"])]),
]


@pytest.mark.parametrize(
    ("path", "route"), [("/echo/5", "/echo/{n}"), ("/sub/me/echo", "/sub/{who}/echo")]
)
def test_one_line_is_enough(tmp_path: Path, path: str, route: str) -> None:
    """Body, JSON in and out and the route's template, for a plain Starlette that is wrapped."""
    ask(StageMiddleware(Starlette(routes=ROUTES), spool=tmp_path), path)

    (record,) = records(tmp_path)
    assert record.route == route
    assert [s.stage for s in record.stages] == [
        "preprocess.parse", "preprocess.read", "postprocess.serialize", "respond",
    ]  # fmt: skip


def test_ours_inside_others_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Added before another middleware it is not outermost: that is said, with what to do."""
    app = Starlette(routes=ROUTES)
    app.add_middleware(StageMiddleware, spool=tmp_path)
    app.add_middleware(GZipMiddleware)

    ask(app, times=2)

    assert len(records(tmp_path, 2)) == 2
    (said,) = [r.getMessage() for r in caplog.records if r.name == "stagescope"]
    assert "GZipMiddleware runs before it" in said
    assert "add it after all other middleware" in said


def test_outermost_by_add_middleware_is_fine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Added last it is the outermost, and nothing is said."""
    app = Starlette(routes=ROUTES)
    app.add_middleware(GZipMiddleware)
    app.add_middleware(StageMiddleware, spool=tmp_path)

    ask(app)

    assert len(records(tmp_path)) == 1
    assert [r for r in caplog.records if r.name == "stagescope"] == []


def test_a_base_http_middleware_is_said_and_harmless(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The task and the queue that it puts between us and the endpoint hide no stage."""
    app = Starlette(routes=ROUTES)
    app.add_middleware(Passing)

    ask(StageMiddleware(app, spool=tmp_path))

    (record,) = records(tmp_path)
    assert record.route == "/echo/{n}"
    assert {"preprocess.parse", "postprocess.serialize"} <= {s.stage for s in record.stages}
    (said,) = [r.getMessage() for r in caplog.records if r.name == "stagescope"]
    assert "Passing: a BaseHTTPMiddleware" in said


def test_twice_on_one_app_is_one_timeline(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The inner one steps aside, and that is logged once."""
    app = StageMiddleware(StageMiddleware(Starlette(routes=ROUTES), spool=tmp_path), spool=tmp_path)

    ask(app, times=3)

    for record in records(tmp_path, 3):
        assert [s.stage for s in record.stages].count("respond") == 1
        assert [s.stage for s in record.stages].count("preprocess.parse") == 1
    (said,) = [r.getMessage() for r in caplog.records if r.name == "stagescope"]
    assert "twice" in said


def test_the_process_tells_its_waits(tmp_path: Path) -> None:
    """The event loop's lag and the collector's pauses are figures of the recorder file."""
    with served(StageMiddleware(Starlette(routes=ROUTES), spool=tmp_path)):
        (path,) = wait_until(lambda: ring_files(tmp_path))
        with RecorderReader(path) as reader:
            wait_until(lambda: reader.waits()["loop_ticks"] > 1)
            waits = reader.waits()
            assert waits["loop_lag_max_ns"] <= waits["loop_lag_ns"]
            assert 0 < waits["watch_cost_ns"] < 1_000_000_000
            gc.collect()
            assert reader.waits()["gc_pauses"] > waits["gc_pauses"]
