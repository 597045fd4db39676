"""What one second of the host sampler costs, beside psutil reading the same of each process.

    PYTHONPATH=src python benchmarks/host_sampler.py [--processes 1 8] [--threads 20] [--rounds 40]

Each process has a recorder file and so many idle threads. CPU milliseconds of the agent's thread
for one reading, with pauses between as in an agent: caches are cold, which doubles it at least.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import mean, median

import psutil

from stagescope.agent.drain import Drain
from stagescope.agent.host.sampler import HostSampler
from stagescope.agent.store.samples import SampleStore

SERVED = """
import sys, threading
from pathlib import Path
from stagescope.middleware.recording.file import create_recorder_file

recorder = create_recorder_file(Path(sys.argv[1]), "cost", ring_slots=64)
over = threading.Event()
for _ in range(int(sys.argv[2])):
    threading.Thread(target=over.wait).start()
print("up", flush=True)
sys.stdin.read()
over.set()
"""


@contextmanager
def served(spool: Path, threads: int) -> Iterator[int]:
    """Run one process; returns its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVED, str(spool), str(threads)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout
        process.stdout.readline()
        yield process.pid


def cost_ms(read: Callable[[], object], rounds: int, pause_s: float) -> list[float]:
    """Return the CPU ms of each of *rounds* readings after the first."""
    read()
    spent = []
    for _ in range(rounds):
        time.sleep(pause_s)
        began = time.thread_time_ns()
        read()
        spent.append((time.thread_time_ns() - began) / 1e6)
    return spent


def by_psutil(processes: Sequence[psutil.Process]) -> None:
    """Read what psutil has of the same."""
    for process in processes:
        with process.oneshot():
            process.cpu_times(), process.memory_info(), process.num_threads()
            process.num_ctx_switches(), process.io_counters(), process.num_fds()


def measure(count: int, threads: int, rounds: int, pause_s: float) -> None:
    """Print the rows of *count* processes."""
    with ExitStack() as stack:
        spool = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pids = [stack.enter_context(served(spool, threads)) for _ in range(count)]
        drain = stack.enter_context(closing(Drain(spool, {})))
        drain.discover()
        sampler = stack.enter_context(closing(HostSampler(drain.alive, SampleStore().add)))
        processes = [psutil.Process(pid) for pid in pids]
        rows = {
            "host sampler, all of it": cost_ms(sampler.collect, rounds, pause_s),
            "psutil, the processes alone": cost_ms(lambda: by_psutil(processes), rounds, pause_s),
        }
        for what, spent in rows.items():
            print(
                f"{count} processes, {threads} threads each: {what}: "
                f"median {median(spent):.2f}, mean {mean(spent):.2f}, most {max(spent):.2f} ms"
            )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--pause", type=float, default=0.2, help="seconds between two readings")
    asked = parser.parse_args()
    for count in asked.processes:
        measure(count, asked.threads, asked.rounds, asked.pause)


if __name__ == "__main__":
    main()
