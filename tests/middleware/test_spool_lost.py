"""A server whose recorder file is deleted or cut off, and what it finds in its spool when it starts."""

import asyncio
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from stagescope.middleware import process
from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.process import process_recorder
from stagescope.middleware.recording.file import (
    MOST_LEFT_BEHIND,
    RecorderFile,
    create_recorder_file,
)
from stagescope.middleware.recording.recorder import Recorder
from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import LOCK_NAME, opened_spool, ring_files, try_lock
from stagescope.records import RequestRecord
from tests.support.rings import RingWriter


@pytest.fixture(autouse=True)
def _no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGESCOPE_PROBE", "off")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[StageMiddleware]:
    """The middleware, with a spool of its own, after its first request."""
    middleware = StageMiddleware(app, "test", tmp_path / "spool")
    serve(middleware)
    yield middleware
    forget(tmp_path / "spool")


def forget(spool: Path) -> None:
    """Close this process's recorder files in *spool*."""
    for key in [key for key in process._open if key[0] == spool]:
        found = process._open.pop(key)
        if found:
            found[0].close()
            os.close(found[1].fd)


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Do what the scope says, and answer."""
    if inside := scope.get("inside"):
        await inside()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"x"})


def serve(middleware: StageMiddleware, path: str = "/", inside: Any = None) -> None:
    """Serve one request in this process."""
    asyncio.run(request(middleware, path, inside))


async def request(middleware: StageMiddleware, path: str, inside: Any = None) -> None:
    """Serve one request; *inside* is awaited while it is in flight."""
    answers: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "inside": inside}
    await middleware(scope, receive, send)
    assert [message["type"][14:] for message in answers] == ["start", "body"]


def make_upkeep_due(middleware: StageMiddleware) -> None:
    """Let a second pass."""
    assert middleware._recorder is not None
    middleware._recorder.upkeep_due_ns = 0


def paths_recorded(spool: Path) -> list[str]:
    """Return the paths of all requests in the recorder files there."""
    found: list[str] = []
    for path in ring_files(spool):
        with RecorderReader(path) as reader:
            found += [r.path for r in reader.poll() if isinstance(r, RequestRecord)]
    return found


@pytest.mark.parametrize("what", ["file", "spool"])
def test_a_deleted_file_is_replaced(
    what: str, served: StageMiddleware, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Noticed by the request that finds the upkeep due; the next one is in a new file."""
    spool = tmp_path / "spool"
    (path,) = ring_files(spool)
    path.unlink()
    if what == "spool":
        spool.rmdir()
    make_upkeep_due(served)
    with caplog.at_level(logging.WARNING):
        serve(served, "/notices")
        serve(served, "/recorded")
        serve(served, "/recorded")

    assert paths_recorded(spool) == ["/recorded", "/recorded"]
    assert len([line for line in caplog.messages if f"{path} was deleted" in line]) == 1


@pytest.mark.parametrize("size", [0, 1024, 100_000])
def test_a_file_that_was_cut_off_is_replaced(
    size: int, served: StageMiddleware, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever may write the file may cut it off: once that is noticed nothing of it is touched."""
    spool = tmp_path / "spool"
    (path,) = ring_files(spool)

    async def cut_off() -> None:
        os.truncate(path, size)
        make_upkeep_due(served)
        await request(served, "/notices")

    with caplog.at_level(logging.WARNING):
        serve(served, "/in-flight", cut_off)
        serve(served, "/recorded")
    path.unlink()

    assert paths_recorded(spool) == ["/recorded"]
    assert len([line for line in caplog.messages if f"{path} was cut off" in line]) == 1
    assert "fault" not in caplog.text


def test_upkeep_is_due_each_second_and_an_anchor_each_minute(tmp_path: Path) -> None:
    """A request costs no system call, and one a second costs one."""
    now_ns = 10**15
    file = create_recorder_file(tmp_path, "test")
    recorder = Recorder(
        memoryview(file.memory), ring_slots=file.ring_slots, clock=lambda: now_ns, fd=file.fd
    )
    with RecorderReader(file.path) as reader:
        assert reader.process.anchor.monotonic_ns == now_ns
        for seconds, anchored in ((1, 0), (59, 0), (61, 61)):
            now_ns = 10**15 + seconds * 10**9
            assert recorder.upkeep_due_ns <= now_ns
            recorder.upkeep(now_ns)
            assert recorder.upkeep_due_ns > now_ns
            assert reader.process.anchor.monotonic_ns == 10**15 + anchored * 10**9
    close(file)


def close(file: RecorderFile) -> None:
    """Be the end of the process that has *file*."""
    os.close(file.fd)


def test_a_sweep_counts_the_dead_alone(tmp_path: Path) -> None:
    """Forty live workers leave a dead one's unread file alone."""
    with ExitStack() as live:
        for number in range(40):
            live.enter_context(RingWriter(tmp_path / f"live{number}.ring"))
        with RingWriter(tmp_path / "dead.ring") as dead:
            dead.request()
        os.utime(tmp_path / "dead.ring", (0, 0))

        file = create_recorder_file(tmp_path, "test")
        assert file.swept == 0
        assert (tmp_path / "dead.ring").exists()
        os.close(file.fd)


@pytest.mark.parametrize("held", [False, True])
def test_what_is_swept_is_counted(held: bool, tmp_path: Path) -> None:
    """The oldest dead files go where no agent reads them, and the new file says how many."""
    with ExitStack() as cleanup:
        if held:
            (tmp_path / LOCK_NAME).touch()
            fd = os.open(tmp_path / LOCK_NAME, os.O_RDONLY)
            cleanup.callback(os.close, fd)
            assert try_lock(fd)
        for number in range(MOST_LEFT_BEHIND + 3):
            path = tmp_path / f"{number}.ring"
            RingWriter(path).close()
            os.utime(path, (number, number))

        recorder = process_recorder(tmp_path, "test")
        cleanup.callback(forget, tmp_path)
        assert recorder is not None
        assert recorder.path is not None
        with RecorderReader(recorder.path) as reader:
            assert reader.counters()["files_swept"] == (0 if held else 3)
        left = {path.name for path in ring_files(tmp_path)}
        assert ("2.ring" in left, "3.ring" in left) == (held, True)


def test_nothing_in_a_spool_keeps_a_server_from_recording(tmp_path: Path) -> None:
    """Pipes, folders, links and a loop of them with the names of recorder files stay as they are."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o700)
    for number in range(MOST_LEFT_BEHIND):
        os.mkfifo(spool / f"pipe{number}.ring")
        (spool / f"folder{number}.ring").mkdir()
        (spool / f"link{number}.ring").symlink_to(precious)
        (spool / f"loop{number}.ring").symlink_to(spool / f"loop{number}.ring")
    os.mkfifo(spool / LOCK_NAME)

    file = create_recorder_file(spool, "test")

    assert ring_files(spool) == [file.path]
    assert len(os.listdir(spool)) == 4 * MOST_LEFT_BEHIND + 2
    assert precious.read_text() == "precious"
    with opened_spool(spool):
        os.close(file.fd)
