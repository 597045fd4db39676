"""One recorder file a process: after fork, spawn, several workers and preload; and who is alive."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.stage import stage
from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import ring_files
from stagescope.records import RequestRecord
from stagescope.testing import wait_until
from tests.support.serving import exchange

HERE = Path(__file__).parent
REQUEST = b"GET /p HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"


def serve_one(spool: Path, path: str, inside: Callable[[], object] = lambda: None) -> None:
    """Answer one request in this process, through the middleware; call *inside* in a stage."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with stage("inference"):
            inside()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    asyncio.run(StageMiddleware(app, "processes", spool)(scope, receive, send))


def paths_by_pid(spool: Path) -> dict[int, list[str]]:
    """Return, for each recorder file's process, the paths that it recorded."""
    found: dict[int, list[str]] = {}
    for path in ring_files(spool):
        with RecorderReader(path) as reader:
            records = [record for record in reader.poll() if isinstance(record, RequestRecord)]
            assert reader.process.pid not in found, "two files of one process"
            found[reader.process.pid] = [record.path for record in records]
            assert not [span for record in records for span in record.stages if span.open]
            assert reader.counters()["faults"] == 0
    return found


def alive_pids(spool: Path) -> set[int]:
    """Return the pids of the files whose writer holds its lock."""
    alive = set()
    for path in ring_files(spool):
        with RecorderReader(path) as reader:
            if reader.writer_alive():
                alive.add(reader.process.pid)
    return alive


def leave(problem: BaseException | None) -> NoReturn:
    """End a forked child, never to run what its parent has yet to do."""
    if problem is not None:
        traceback.print_exception(problem)
    os._exit(0 if problem is None else 1)


def in_child(act: Callable[[], object]) -> int:
    """Fork, *act* in the child, and give its pid once it ended well."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException as problem:  # noqa: BLE001 - told on stderr, and by the exit status
            leave(problem)
        leave(None)
    assert os.waitpid(pid, 0)[1] == 0
    return pid


def test_a_forked_child_opens_its_own_file(tmp_path: Path) -> None:
    """Parent and child each write to a file of their own, before and after each other."""

    def parent() -> None:
        serve_one(tmp_path, "/before")
        for name in ("/child-1", "/child-2"):
            in_child(lambda name=name: serve_one(tmp_path, name))  # type: ignore[misc]
        serve_one(tmp_path, "/after")

    pid = in_child(parent)
    found = paths_by_pid(tmp_path)

    assert found.pop(pid) == ["/before", "/after"]
    assert sorted(found.values()) == [["/child-1"], ["/child-2"]]
    assert alive_pids(tmp_path) == set()


def test_a_fork_inside_a_request_leaves_the_parents_record_alone(tmp_path: Path) -> None:
    """The child may go on with what it inherited, stages and all: nothing reaches the parent's file."""

    def act_and_return() -> None:
        with stage("postprocess"):
            for _ in range(100):
                with stage("respond"):
                    pass

    def fork_in_request() -> None:
        serve_one(tmp_path, "/request", lambda: in_child(act_and_return))
        serve_one(tmp_path, "/next")

    pid = in_child(fork_in_request)

    assert paths_by_pid(tmp_path) == {pid: ["/request", "/next"]}
    (path,) = ring_files(tmp_path)
    with RecorderReader(path) as reader:
        record = reader.poll()[0]
    assert isinstance(record, RequestRecord)
    assert [span.stage for span in record.stages] == ["inference", "respond"]


def test_a_child_that_ends_the_parents_request_writes_nowhere(tmp_path: Path) -> None:
    """A child that returns from the endpoint, as the parent does, changes nothing in its file."""
    statuses: list[int] = []

    def fork_and_go_on_in_both() -> None:
        pid = os.fork()
        if pid:
            statuses.append(os.waitpid(pid, 0)[1])

    def both() -> None:
        serve_one(tmp_path, "/both", fork_and_go_on_in_both)
        if not statuses:
            serve_one(tmp_path, "/child")
        else:
            assert statuses == [0]

    pid = in_child(both)
    found = paths_by_pid(tmp_path)

    assert found.pop(pid) == ["/both"]
    assert list(found.values()) == [["/child"]]


def test_the_lock_is_the_parents_alone(tmp_path: Path) -> None:
    """A child that lives on does not keep its dead parent's file alive."""
    ready, tell = os.pipe()
    held, let_go = os.pipe()

    def parent() -> None:
        serve_one(tmp_path, "/parent")
        if os.fork() == 0:
            os.close(let_go)
            os.write(tell, b"x")
            os.read(held, 1)  # Until the test closes its end.
            leave(None)
        os.read(ready, 1)
        assert alive_pids(tmp_path) == {os.getpid()}

    in_child(parent)
    try:
        assert alive_pids(tmp_path) == set()
    finally:
        for fd in (ready, tell, held, let_go):
            os.close(fd)


def test_a_spawned_child_opens_its_own_file(tmp_path: Path) -> None:
    """multiprocessing's spawn: the child's own import, the child's own file."""
    script = (
        "import multiprocessing, sys; sys.path.insert(0, sys.argv[1]); import test_processes as t\n"
        "if __name__ == '__main__':\n"
        "    spool = t.Path(sys.argv[2]); t.serve_one(spool, '/parent')\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    child = context.Process(target=t.serve_one, args=(spool, '/child'))\n"
        "    child.start(); child.join(30); sys.exit(child.exitcode)\n"
    )
    (tmp_path / "spawning.py").write_text(script)
    spool = tmp_path / "spool"
    subprocess.run(
        [sys.executable, str(tmp_path / "spawning.py"), str(HERE), str(spool)],
        env=environment(spool),
        check=True,
        timeout=60,
    )

    assert sorted(paths_by_pid(spool).values()) == [["/child"], ["/parent"]]


# --- servers with several workers ---------------------------------------------------------------


def environment(spool: Path) -> dict[str, str]:
    """Return the environment of a server."""
    return os.environ | {
        "PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{HERE}",
        "STAGESCOPE_SPOOL": str(spool),
        "STAGESCOPE_AGENT": "off",
    }


def free_port() -> int:
    """Return a port that nobody has just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


SERVERS = {
    "uvicorn": ["uvicorn", "--workers", "2", "--no-access-log", "--log-level", "warning"],
    "gunicorn": ["gunicorn", "-k", "uvicorn.workers.UvicornWorker", "-w", "2"],
}


@pytest.mark.parametrize("name", ["uvicorn", "gunicorn", "gunicorn preload"])
def test_each_worker_has_its_file(name: str, tmp_path: Path) -> None:
    """Real servers with two workers: a file each, alive while they are, dead after SIGKILL."""
    spool = tmp_path / "spool"
    port = free_port()
    with server(name, port, spool):
        wait_until(lambda: answering_pid(port), 30)
        answers = Counter[int]()

        def both_answered() -> bool:
            answers.update([answering_pid(port)])
            return len(answers) >= 2 and min(answers.values()) >= 3

        wait_until(both_answered, 30)
        workers = set(answers)
        assert workers <= alive_pids(spool)
        victim = min(workers)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in alive_pids(spool))
        wait_until(lambda: len(alive_pids(spool) - {victim}) >= 2, 30)  # It is replaced.
        answers.update([answering_pid(port)])
    wait_until(lambda: not alive_pids(spool))

    recorded = {pid: len(paths) for pid, paths in paths_by_pid(spool).items()}
    for pid in workers:
        # The first answer, on which the test waited, is in no count.
        assert answers[pid] <= recorded[pid] <= answers[pid] + 1


def answering_pid(port: int) -> int:
    """Return the pid of the worker that answers; 0 where none does yet."""
    try:
        return int(exchange(port, REQUEST).splitlines()[-1])
    except (ConnectionError, IndexError):
        return 0


@contextmanager
def server(name: str, port: int, spool: Path) -> Iterator[None]:
    """Start a server with two workers, in a group of its own, and end it in order."""
    kind, _, preload = name.partition(" ")
    place = ["--port", str(port)] if kind == "uvicorn" else ["-b", f"127.0.0.1:{port}"]
    command = [sys.executable, "-m", *SERVERS[kind], *place, *(["--preload"] if preload else [])]
    with subprocess.Popen(
        [*command, "multi_server:app"], env=environment(spool), stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)
