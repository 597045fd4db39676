"""Which spool the server behind a port records into, found by its open recorder file."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from stagescope.recorder.listener import spool_of_listener
from stagescope.recorder.spool import ring_files

SERVER = """
import os, socket, sys, time
from pathlib import Path
from stagescope.middleware.process import process_recorder
listener = socket.create_server((sys.argv[2], 0), family=socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET)
if sys.argv[3] == "child" and os.fork() == 0:
    listener.close()
    process_recorder(Path(sys.argv[1]), "test")
elif sys.argv[3] == "self":
    process_recorder(Path(sys.argv[1]), "test")
print(listener.getsockname()[1] if listener.fileno() >= 0 else "child", flush=True)
if sys.argv[3] == "later":
    while not Path(sys.argv[1] + ".go").exists():
        time.sleep(0.02)
    process_recorder(Path(sys.argv[1]), "test")
sys.stdin.read()
"""


@contextmanager
def server(spool: Path, host: str, recorded_by: str) -> Iterator[tuple[int, int]]:
    """A process that listens on *host*, its port and pid; it or its child records into *spool*."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(spool), host, recorded_by],
        env=os.environ | {"STAGESCOPE_PROBE": "off"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    try:
        lines = [process.stdout.readline().strip() for _ in range(1 + (recorded_by == "child"))]
        yield next(int(line) for line in lines if line.isdecimal()), process.pid
    finally:
        process.stdin.close()
        process.stdout.read()  # Ends when the child has ended too.
        process.wait()
        process.stdout.close()


def test_the_listening_process_is_found(tmp_path: Path) -> None:
    """Its spool and pid are told, on IPv4 and IPv6."""
    for number, host in enumerate(("127.0.0.1", "::1")):
        spool = tmp_path / str(number)
        with server(spool, host, "self") as (port, pid):
            found = spool_of_listener(port)

            assert (found.spool, found.pids, found.deleted) == (spool, (pid,), False)


def test_a_child_that_records_for_its_parent_is_found(tmp_path: Path) -> None:
    """A front end listens, its worker records: TorchServe, LitServe, Ray Serve."""
    with server(tmp_path / "spool", "127.0.0.1", "child") as (port, pid):
        found = spool_of_listener(port, wait_s=20)

        assert found.spool == tmp_path / "spool"
        assert pid in found.pids
        assert len(found.pids) == 2


def test_a_server_that_records_a_moment_later_is_waited_for(tmp_path: Path) -> None:
    """One that was just started, or that hands over to new workers, as gunicorn's reload does."""
    spool = tmp_path / "spool"
    with server(spool, "127.0.0.1", "later") as (port, _), ThreadPoolExecutor(1) as pool:
        assert spool_of_listener(port).spool is None
        waiting = pool.submit(spool_of_listener, port, wait_s=60)
        (tmp_path / "spool.go").touch()

        assert waiting.result().spool == spool


def test_a_deleted_spool_is_told(tmp_path: Path) -> None:
    """The file was deleted while the server writes it: the place is named, and that it is gone."""
    spool = tmp_path / "spool"
    with server(spool, "127.0.0.1", "self") as (port, _):
        for path in ring_files(spool):
            path.unlink()
        found = spool_of_listener(port)

        assert (found.spool, found.deleted) == (spool, True)


def test_who_records_nowhere_has_no_spool(tmp_path: Path) -> None:
    """A listener without a recorder file, and a port on which nobody listens any more."""
    with server(tmp_path / "spool", "127.0.0.1", "nobody") as (port, pid):
        found = spool_of_listener(port)
        assert (found.pids, found.spool) == ((pid,), None)

    assert spool_of_listener(port).pids == ()
