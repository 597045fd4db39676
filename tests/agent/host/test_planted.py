"""The host sampler on planted files: limits, throttling, pressure, containers, reused pids, rubbish."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagescope.agent.host import memory, processes
from stagescope.agent.host.cgroups import Mount
from stagescope.agent.host.proc import PAGE_BYTES, TICK_S
from stagescope.agent.host.processes import MOST_THREADS
from stagescope.agent.host.sampler import HostSampler
from stagescope.samples import Sample
from stagescope.testing.clock import HandClock
from tests.support.host import (
    CGROUP,
    PID,
    host_files,
    plant,
    pressure_text,
    served,
    stat_line,
)

GROUP = f"sys/fs/cgroup{CGROUP}"
SECOND = 1_000_000_000


class Planted:
    """A sampler on planted files, with one process that serves, and all that it found."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = HandClock()
        self.samples: list[Sample] = []
        self._ring = root / "planted.ring"
        self._ring.touch()
        self.sampler = HostSampler(
            lambda: [(self._ring, served())],
            self.samples.extend,
            root=str(root),
            clock=self.clock,
        )

    def collect(self) -> None:
        """Read everything, one second later."""
        self.clock.tick(SECOND)
        self.sampler.collect()

    def find(self, name: str, detail: str | None = None) -> list[float]:
        """Return the values of a name found so far."""
        return [s.value for s in self.samples if s.name == name and detail in (None, s.detail)]


@contextmanager
def planted(root: Path) -> Iterator[Planted]:
    """A sampler on *root*, closed at the end."""
    one = Planted(root)
    with closing(one.sampler):
        yield one


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Planted]:
    """A sampler on a whole planted host."""
    plant(tmp_path, host_files())
    with planted(tmp_path) as one:
        yield one


def test_throttling_is_an_amount_from_reading_to_reading(host: Planted) -> None:
    """What `cpu.stat` grew by, in seconds and periods, under the cgroup's name."""
    host.collect()
    plant(host.root, {f"{GROUP}/cpu.stat": "usage_usec 5100000\nnr_throttled 7\nthrottled_usec 650000\n"})  # fmt: skip
    host.collect()

    assert host.find("stagescope.cgroup.cpu.throttled_time", CGROUP) == [pytest.approx(0.4)]
    assert host.find("stagescope.cgroup.cpu.throttled_periods", CGROUP) == [4]
    assert host.find("stagescope.cgroup.cpu.time", CGROUP) == [pytest.approx(0.1)]
    (throttled,) = (s for s in host.samples if s.name.endswith("throttled_time"))
    assert throttled.end_ns - throttled.start_ns == SECOND


def test_limits_and_usage_of_the_cgroup(host: Planted) -> None:
    """One and a half cores and 1 GiB are allowed, half of that is used; the process is in it."""
    host.collect()

    assert host.find("stagescope.cgroup.cpu.limit", CGROUP) == [1.5]
    assert host.find("stagescope.cgroup.memory.limit", CGROUP) == [1 << 30]
    assert host.find("stagescope.cgroup.memory.usage", CGROUP) == [1 << 29]
    assert [s.pid for s in host.samples if s.name == "stagescope.process.cgroup"] == [PID]


def test_no_limit_is_no_sample(tmp_path: Path) -> None:
    """`max` is no number: where nothing is limited, the limit is absent."""
    plant(tmp_path, host_files() | {f"{GROUP}/cpu.max": "max 100000", f"{GROUP}/memory.max": "max"})
    with planted(tmp_path) as host:
        host.collect()

        assert host.find("stagescope.cgroup.cpu.limit") == []
        assert host.find("stagescope.cgroup.memory.limit") == []
        assert host.find("stagescope.cgroup.memory.usage") == [1 << 29]


def test_a_cgroup_around_it_with_a_limit_is_told_too(tmp_path: Path) -> None:
    """The quota that throttles may be the pod's; one without limits is not told."""
    plant(tmp_path, host_files() | {"sys/fs/cgroup/pods/memory.max": "2147483648"})
    with planted(tmp_path) as host:
        host.collect()

        assert host.find("stagescope.cgroup.memory.limit", "/pods") == [2 << 30]
        assert host.find("stagescope.cgroup.memory.limit", "/") == []


def test_out_of_memory_is_counted(host: Planted) -> None:
    """Kills and limit hits are those between two readings, not those of before."""
    host.collect()
    plant(host.root, {f"{GROUP}/memory.events": "low 0\nhigh 0\nmax 9\noom 2\noom_kill 3\n"})
    host.collect()

    assert host.find("stagescope.cgroup.memory.oom_kill") == [2]
    assert host.find("stagescope.cgroup.memory.oom") == [1]
    assert host.find("stagescope.cgroup.memory.limit_hits") == [4]


def test_pressure_of_host_and_cgroup(host: Planted) -> None:
    """`total` is an amount of seconds; the host's has no cgroup; what has no file is absent."""
    host.collect()
    plant(
        host.root,
        {
            "proc/pressure/memory": pressure_text(2_250_000, 600_000),
            f"{GROUP}/cpu.pressure": pressure_text(3_500_000, 1_000_000),
        },
    )
    host.collect()

    assert host.find("stagescope.pressure.memory.some", "") == [pytest.approx(0.25)]
    assert host.find("stagescope.pressure.memory.full", "") == [pytest.approx(0.1)]
    assert host.find("stagescope.pressure.cpu.some", CGROUP) == [pytest.approx(0.5)]
    assert host.find("stagescope.pressure.cpu.full", CGROUP) == [0.0]
    assert host.find("stagescope.pressure.io.some") == []


def test_figures_of_a_process(host: Planted) -> None:
    """Ticks, pages and bytes become seconds and bytes, whatever the process calls itself."""
    host.collect()
    plant(
        host.root,
        {
            f"proc/{PID}/stat": stat_line(user=130, system=60),
            f"proc/{PID}/io": "read_bytes: 5096\nwrite_bytes: 8192\n",
        },
    )
    host.collect()

    assert host.find("process.cpu.time", "user") == [pytest.approx(30 * TICK_S)]
    assert host.find("process.cpu.time", "system") == [pytest.approx(10 * TICK_S)]
    assert host.find("process.memory.usage") == [2560 * PAGE_BYTES] * 2
    assert host.find("process.disk.io", "read") == [1000]
    assert host.find("process.disk.io", "write") == [0]


def test_open_files_are_listed_where_the_kernel_does_not_count_them(host: Planted) -> None:
    """Before Linux 6.2 the folder has to be listed, so that is done at one reading in ten."""
    for _ in range(20):
        host.collect()

    assert host.find("process.unix.file_descriptor.count") == [2, 2]


def test_a_pid_that_is_another_process_now_is_absent(host: Planted) -> None:
    """The start time tells: what runs under the pid now is not the process that served."""
    host.collect()
    plant(host.root, {f"proc/{PID}/stat": stat_line(user=5000, start=999)})
    host.collect()

    assert host.find("process.cpu.time") == []
    assert len(host.find("process.memory.usage")) == 1


def test_a_zombie_is_absent(host: Planted) -> None:
    """A process that ended and was not waited for uses nothing."""
    plant(host.root, {f"proc/{PID}/stat": stat_line().replace(" S ", " Z ")})
    host.collect()

    assert host.find("process.memory.usage") == []


def test_what_is_denied_is_absent(host: Planted) -> None:
    """Another user's process shows its CPU and memory; storage and files are absent, not 0."""
    (host.root / f"proc/{PID}/io").unlink()
    for name in ("0", "1"):
        (host.root / f"proc/{PID}/fd/{name}").unlink()
    (host.root / f"proc/{PID}/fd").rmdir()
    for _ in range(20):
        host.collect()

    assert len(host.find("process.memory.usage")) == 20
    assert host.find("process.disk.io") == []
    assert host.find("process.unix.file_descriptor.count") == []


def test_a_counter_that_fell_gives_nothing(host: Planted) -> None:
    """A counter that began anew has no growth; from then on it has."""
    host.collect()
    for usage in (100, 300):
        plant(host.root, {f"{GROUP}/cpu.stat": f"usage_usec {usage}\n"})
        host.collect()

    assert host.find("stagescope.cgroup.cpu.time") == [pytest.approx(200e-6)]


def test_a_process_of_another_container_is_found_by_its_lock(tmp_path: Path) -> None:
    """In its own container it is process 4242, from here it is 9: the lock's owner tells."""
    files = host_files()
    here = {name.replace(f"/{PID}/", "/9/"): text for name, text in files.items()}
    here = {name: text for name, text in here.items() if not name.startswith(f"proc/{PID}")}
    here["proc/9/stat"] = stat_line(pid=9)
    here["proc/9/status"] = f"Name:\tpython\nNSpid:\t9\t{PID}\n"
    here[f"proc/{PID}/stat"] = stat_line(start=5)  # somebody else's here
    here[f"proc/{PID}/status"] = f"Name:\tother\nNSpid:\t{PID}\n"
    ring = tmp_path / "planted.ring"
    ring.touch()
    here["proc/locks"] = f"1: FLOCK  ADVISORY  WRITE 9 fe:00:{ring.stat().st_ino} 0 EOF\n"
    plant(tmp_path, here)
    with planted(tmp_path) as host:
        host.collect()

        assert host.find("process.memory.usage") == [2560 * PAGE_BYTES]
        assert {s.pid for s in host.samples if s.name.startswith("process.")} == {PID}


def test_a_process_that_cannot_be_told_is_absent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process by its pid, that has not its file, is not taken for it; logged once."""
    caplog.set_level("INFO")
    plant(tmp_path, host_files() | {f"proc/{PID}/maps": "nothing of ours\n"})
    with planted(tmp_path) as host:
        for _ in range(20):
            host.collect()

        assert host.find("process.memory.usage") == []
        assert len([r for r in caplog.records if "another pid namespace" in r.message]) == 1


def test_a_process_with_very_many_threads_has_no_switches(tmp_path: Path) -> None:
    """To read them all would hold up the agent: they are absent."""
    task = "voluntary_ctxt_switches:\t1\nnonvoluntary_ctxt_switches:\t1\n"
    many = {f"proc/{PID}/task/{tid}/status": task for tid in range(5000, 5000 + MOST_THREADS)}
    plant(tmp_path, host_files() | many)
    with planted(tmp_path) as host:
        for _ in range(21):
            host.collect()

        assert host.find("process.context_switches") == []


def test_switches_of_threads_that_come_and_go(host: Planted) -> None:
    """A new thread brings its own, one that ended takes none away."""
    task = "voluntary_ctxt_switches:\t{}\nnonvoluntary_ctxt_switches:\t{}\n"
    for _ in range(10):
        host.collect()
    (host.root / f"proc/{PID}/task/4243/status").unlink()
    plant(
        host.root,
        {
            f"proc/{PID}/task/{PID}/status": task.format(15, 1),
            f"proc/{PID}/task/4244/status": task.format(3, 2),
        },
    )
    for _ in range(10):
        host.collect()

    assert host.find("process.context_switches", "voluntary") == [8]
    assert host.find("process.context_switches", "involuntary") == [2]


@pytest.mark.parametrize(
    ("top", "cgroup", "place"),
    [
        ("/", "/a/b", "a/b"),
        ("/a", "/a/b", "b"),
        ("/a", "/a", ""),
        ("/a", "/ab", None),
        ("/", "/../x", None),
        ("/", "/gone", None),
    ],
)
def test_where_a_cgroup_has_its_files(
    tmp_path: Path, top: str, cgroup: str, place: str | None
) -> None:
    """What is mounted may be a part of the tree; what lies outside of it has no place."""
    folders = ("", "a/", "a/b/", "ab/", "b/", "x/")
    plant(tmp_path, {f"cg/{name}cgroup.events": "populated 1\n" for name in folders})
    folder = f"{tmp_path}/cg"

    found = Mount(folder, top).place(cgroup)
    assert found == (None if place is None else f"{folder}/{place}".rstrip("/"))


def test_the_cgroup_of_the_whole_host_is_the_host(tmp_path: Path) -> None:
    """What is in no cgroup of its own has none told: the host's figures are its."""
    files = host_files() | {f"proc/{PID}/cgroup": "0::/\n"}
    plant(tmp_path, files | {"sys/fs/cgroup/cpu.pressure": pressure_text(1, 1)})
    with planted(tmp_path) as host:
        host.collect()
        host.collect()

        assert host.find("stagescope.process.cgroup") == []
        assert [s.detail for s in host.samples if "pressure.cpu.some" in s.name] == [""]


def test_an_empty_root_gives_no_processes_and_no_fault(tmp_path: Path) -> None:
    """On a system without /proc only what psutil reads is told."""
    with planted(tmp_path) as host:
        host.collect()
        host.collect()

        assert all(sample.pid == 0 for sample in host.samples)
        assert host.find("stagescope.pressure.cpu.some") == []


RUBBISH = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([b"", b"max", b"-1", b"9" * 30, b"total=\nsome", b"0::", b"a: b\nc: 1e9\n"]),
)


@pytest.mark.filterwarnings("ignore:.*memory stats couldn't be determined:RuntimeWarning")
@settings(max_examples=60)
@given(st.data())
def test_rubbish_in_any_file_is_absence(data: st.DataObject) -> None:
    """Whatever stands in the files, or whichever of them are missing, nothing is raised."""
    files: dict[str, str | bytes] = dict(host_files())
    more = ["proc/stat", "proc/meminfo", "proc/net/dev", "proc/diskstats", "proc/locks"]
    for name in data.draw(st.sets(st.sampled_from([*files, *more]), min_size=1)):
        text = files.pop(name, b"")
        whole = text if isinstance(text, bytes) else text.encode()
        cut = st.sampled_from([whole[:n] for n in range(0, len(whole), 7)] or [b""])
        spoiled = data.draw(st.one_of(st.none(), RUBBISH, cut))
        if spoiled is not None:
            files[name] = spoiled
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(memory, "FIRST_NS", 0),
        patch.object(processes, "SLOW_EVERY", 1),
        patch.object(psutil, "PROCFS_PATH", f"{folder}/proc"),
    ):
        plant(Path(folder), files)
        with planted(Path(folder)) as host:
            for _ in range(3):
                host.collect()
        for sample in host.samples:
            assert math.isfinite(sample.value)
            assert sample.value >= 0
            assert 0 < sample.start_ns <= sample.end_ns
