"""CPU time by stage: what threads really used, laid over the stacks that were seen of them."""

import http.client
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from stagescope.agent.stacks.sampler import Stacks
from stagescope.agent.stacks.thread_cpu import with_cpu
from stagescope.stacks import Frame, StackSpan, ThreadCpu, read_thread_cpu
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.agent.stacks.burn_server import BURNS_MS
from tests.support.evidence import stack
from tests.support.sampled import RUN_ID, SOURCE, sampling_agent
from tests.support.server_processes import free_port

MS = 1_000_000
SERVERS = {
    "uvicorn": ["uvicorn", "--port={port}", "--workers={workers}", "--log-level=error"],
    "gunicorn": ["gunicorn", "--worker-class=uvicorn.workers.UvicornWorker",
                 "--bind=127.0.0.1:{port}", "--workers={workers}", "--log-level=error"],
    "hypercorn": ["hypercorn", "--bind=127.0.0.1:{port}", "--workers={workers}",
                  "--log-level=error"],
}  # fmt: skip


def span(thread_id: int, since_ms: int, until_ms: int, *, running: bool = True) -> StackSpan:
    """A stack of *thread_id* from *since_ms* to *until_ms*, in no stage."""
    times = {"start_ns": since_ms * MS, "end_ns": until_ms * MS}
    return stack(thread_id=thread_id, stage="", running=running, **times)


def cpu(at_ms: int, **used_ms: int) -> ThreadCpu:
    """A reading at *at_ms*; threads are named `t1`, `t2`."""
    return ThreadCpu(at_ms * MS, {int(name[1:]): ms * MS for name, ms in used_ms.items()})


def test_a_thread_that_used_nothing_did_not_run() -> None:
    """It sits in a read that its name does not tell; what the other used is all the other's."""
    readings = [cpu(0, t1=5, t2=7), cpu(100, t1=5, t2=87)]
    idle, busy = with_cpu([span(1, 0, 100), span(2, 0, 100)], readings, ())
    assert (idle.cpu_ns, idle.running) == (0, False)
    assert (busy.cpu_ns, busy.running) == (80 * MS, True)


def test_a_thread_shares_its_time_out_over_what_it_ran_meanwhile() -> None:
    """By their lengths between the two readings; a wait has a share only where nothing ran."""
    seen = [span(1, 0, 30), span(1, 30, 40), span(1, 40, 100, running=False)]
    readings = [cpu(0, t1=0), cpu(100, t1=40), cpu(200, t1=44)]
    assert [one.cpu_ns for one in with_cpu(seen, readings, ())] == [33 * MS, 11 * MS, 0]
    (waits,) = with_cpu(seen[2:], readings[:2], ())
    assert (waits.cpu_ns, waits.running) == (40 * MS, False)


def test_native_threads_work_for_the_threads_that_ran_beside_them() -> None:
    """Threads without a stack of their own, BLAS's for one; our own threads work for nobody."""
    readings = [cpu(0, t1=0, t2=0, t8=0, t9=0), cpu(100, t1=30, t2=10, t8=80, t9=500)]
    first, second = with_cpu([span(1, 0, 100), span(2, 0, 100)], readings, {9})
    assert (first.cpu_ns, second.cpu_ns) == (90 * MS, 30 * MS)


def test_a_thread_that_began_in_the_window_is_known_without_its_id() -> None:
    """py-spy tells the ids of those alone that were there at its begin."""
    readings = [cpu(0, t1=0), cpu(100, t1=10, t5=60)]
    first, unknown = with_cpu([span(1, 0, 100), span(0, 0, 100)], readings, ())
    assert (first.cpu_ns, unknown.cpu_ns) == (10 * MS, 60 * MS)


def test_without_two_readings_nothing_is_claimed() -> None:
    """A kernel without the count, another PID namespace, an older server."""
    spans = [span(1, 0, 100)]
    assert with_cpu(spans, [cpu(0, t1=0)], ()) == spans
    assert with_cpu(spans, [cpu(0), cpu(100)], ()) == spans


def test_readings_are_of_this_host() -> None:
    """A thread that burns is seen to; a process that is gone has no threads."""
    own = Path("/proc/self")
    before = read_thread_cpu(own, 1)
    wait_until(
        lambda: (
            read_thread_cpu(own, 2).used_ns[threading.get_native_id()]
            > before.used_ns[threading.get_native_id()]
        )
    )
    assert read_thread_cpu(Path("/proc/0"), 3) == ThreadCpu(3, {})


@contextmanager
def serving(server: str, workers: int, spool: Path) -> Iterator[int]:
    """The port of a real *server* of `burn_server` with so many *workers*; ended with the block."""
    port = free_port()
    options = [word.format(port=port, workers=workers) for word in SERVERS[server]]
    process = subprocess.Popen(
        [sys.executable, "-m", *options, "burn_server:served"],
        cwd=Path(__file__).parent,
        env=os.environ
        | {"PYTHONPATH": str(SOURCE), "STAGESCOPE_SPOOL": str(spool), "STAGESCOPE_AGENT": "off"},
        start_new_session=True,
    )
    try:
        wait_until(lambda: process.poll() is not None or _answers(port), 60)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _ask(connection: http.client.HTTPConnection, path: str) -> None:
    connection.request("GET", path, headers={"baggage": f"stagescope.run={RUN_ID}"})
    assert connection.getresponse().read()


def _answers(port: int) -> bool:
    try:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            _ask(connection, "/plain")
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("server", "workers", "shared"),
    [
        ("uvicorn", 1, False),
        ("uvicorn", 2, False),
        ("uvicorn", 2, True),
        ("gunicorn", 1, False),
        ("gunicorn", 2, False),
        ("hypercorn", 1, False),
        ("hypercorn", 2, False),
    ],
    ids=["uvicorn", "uvicorn-2", "uvicorn-2-in-process", "gunicorn", "gunicorn-2", "hypercorn",
         "hypercorn-2"],
)  # fmt: skip
def test_planted_burns_come_out_by_stage(server: str, workers: int, shared: bool) -> None:
    """On the loop, by `to_thread`, in an executor and in a plain `def` endpoint; helpers get none."""
    with (
        short_spool() as spool,
        serving(server, workers, spool) as port,
        sampling_agent(
            spool, lambda agent: [Stacks(agent, always=False, window_s=2.0)], shared=shared
        ) as agent,
    ):

        def over() -> bool:
            return agent.evidence.counts["stacks_windows"] >= 4

        def ask() -> None:
            with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
                for _ in range(500):
                    if over():
                        return
                    _ask(connection, "/all")
                    _ask(connection, "/plain")

        clients = [threading.Thread(target=ask) for _ in range(workers)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        agent.evidence.settle(10)
        spans = agent.evidence.stacks.between(0, 1 << 63)
    used = Counter[str]()
    for one in spans:
        assert one.cpu_ns is not None
        used[one.stage] += one.cpu_ns
    burnt = sum(used[name] for name in BURNS_MS)
    shares = {name: used[name] / burnt for name in BURNS_MS}
    truth = {name: ms / sum(BURNS_MS.values()) for name, ms in BURNS_MS.items()}
    assert shares == pytest.approx(truth, abs=0.15), shares
    assert burnt > 0.5 * sum(used.values())
    pipes = [one for one in spans if _leaf(one).function.endswith("Connection._recv")]
    assert sum(one.cpu_ns or 0 for one in pipes) < 0.01 * burnt


def _leaf(one: StackSpan) -> Frame:
    return one.frames[-1]
