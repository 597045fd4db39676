"""What each stage used: planted runs, and runs in which evidence is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stagescope.analysis.build import build_report
from stagescope.analysis.resources.model import Resources, StageUse
from stagescope.analysis.resources.table import resources_lines
from stagescope.runfolder.schema import BATCHES, EVIDENCE, SAMPLES, SERVER, STACKS
from tests.support.planted_run import APP, BEGIN_NS, KERNEL, planted_run, samples, stacks
from tests.support.runs import (
    MS,
    amount_row,
    batch_row,
    client_row,
    level_row,
    server_row,
    stack_row,
    write_run_folder,
    write_table,
)


def resources(folder: Path) -> Resources:
    """Return what the run in *folder* used."""
    found = build_report(folder).resources
    assert found is not None
    return found


def stage(found: Resources, name: str) -> StageUse:
    """Return one stage or sub-stage."""
    every = [each for use in found.stages for each in (use, *use.sub_stages)]
    return next(each for each in every if each.stage == name)


def cpu_s(found: Resources, name: str) -> float:
    """Return the CPU seconds of one stage."""
    cpu = stage(found, name).cpu
    assert cpu is not None
    return cpu.cpu_s


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Resources:
    """Return what the planted run used."""
    return resources(planted_run(tmp_path_factory.mktemp("planted")))


def test_cpu_seconds(planted: Resources) -> None:
    """Each stage has its samples' share of the process's time, and the rows are the total."""
    total = planted.cpu
    assert total is not None
    assert total.cpu_s == pytest.approx(6.0, rel=0.01)
    assert (total.processes, total.samples, total.unsampled_s) == (1, 100, 0.0)
    assert total.known_by == {"marker": 70, "none": 20, "block": 10}
    for name, share in (("preprocess", 0.5), ("inference", 0.3), ("other", 0.2), ("queue", 0.0)):
        assert cpu_s(planted, name) == pytest.approx(share * total.cpu_s)
    assert cpu_s(planted, "preprocess.parse") == cpu_s(planted, "preprocess")
    assert sum(cpu_s(planted, use.stage) for use in planted.stages) == pytest.approx(total.cpu_s)


def test_a_hot_function_is_the_top_of_its_own_stage_alone(planted: Resources) -> None:
    """The planted function leads `preprocess`, and stands in no other stage's list."""
    hot = f"hot ({APP}:41)"
    tops = {use.stage: [stack.frame for stack in use.stacks] for use in planted.stages}

    assert tops["preprocess"][0] == hot
    assert stage(planted, "preprocess").stacks[0].share == 0.8
    assert all(hot not in frames for name, frames in tops.items() if name != "preprocess")


def test_a_package_s_frames_give_way_to_the_user_s(planted: Resources) -> None:
    """The place is the user's innermost line; where the time went inside it is beside; waits say so."""
    ran, waited = stage(planted, "inference").stacks

    assert (ran.frame, ran.leaf, ran.running) == (f"predict ({APP}:60)", "forward", True)
    assert (ran.samples, ran.share) == (30, 0.6)
    assert (waited.running, waited.samples) == (False, 20)


def test_device_time_and_coverage(planted: Resources) -> None:
    """Device seconds are the samples' sum, with the share of openings that have one."""
    assert planted.device is not None
    assert planted.device.coverage == pytest.approx(0.9)
    assert stage(planted, "inference").device_s == pytest.approx(4.0, rel=0.01)
    assert stage(planted, "preprocess").device_s is None


def test_the_gpu_while_a_stage_ran(planted: Resources) -> None:
    """The device is busy while `inference` runs, and the means tell the stages apart."""
    assert stage(planted, "inference").gpu_busy == pytest.approx(0.8)
    assert stage(planted, "preprocess").gpu_busy == pytest.approx(0.1)
    assert not stage(planted, "inference").gpu_coarse
    assert stage(planted, "inference").gpu_memory_bytes == pytest.approx(20e9)
    assert planted.gpu_window_s == pytest.approx(0.01)


def test_memory(planted: Resources) -> None:
    """RSS is that of the process while the stage ran, and over the run; 12 s prove no leak."""
    assert planted.memory is not None
    assert planted.memory.rss_first_bytes == 100e6
    assert planted.memory.rss_last_bytes == 122e6
    assert planted.memory.slope_bytes_per_s is None
    assert stage(planted, "inference").rss_bytes == pytest.approx(111e6, rel=0.01)


def test_a_leak_has_a_slope(tmp_path: Path) -> None:
    """A process that grows for two minutes is told with bytes a second."""
    clients = [client_row(seq) for seq in range(1_200)]
    server = [server_row(row, {"inference": 10 * MS}) for row in clients[::50]]
    growing = [
        level_row("process.memory.usage", 1e8 + 1e6 * s, BEGIN_NS + s * 1_000 * MS)
        for s in range(118)
    ]

    found = resources(write_run_folder(tmp_path, clients, server, samples=growing)).memory

    assert found is not None
    assert found.slope_bytes_per_s == pytest.approx(1e6)


def test_kernels(planted: Resources) -> None:
    """What the device did leads, in order of its time; the stage's own row says what binds it."""
    use = stage(planted, "inference")

    assert [(each.name, each.launches) for each in use.kernels] == [
        (KERNEL, 48),
        ("Memcpy HtoD (Pageable -> Device)", 2),
    ]
    assert use.kernels[0].share == 0.75
    assert use.launches is not None
    assert (use.launches.bound, use.launches.busy_s) == ("launch", 0.008)


def test_stalls_chunks_and_collectors(planted: Resources) -> None:
    """Stalls go by stage and cause; chunk gaps are of all streams; collectors cost what they say."""
    assert stage(planted, "queue").stalls_s == {"loop": 0.6}
    assert stage(planted, "inference").stalls_s == {"gc": 0.24}
    assert planted.streams is not None
    assert (planted.streams.requests, planted.streams.gaps) == (120, 480)
    assert (planted.streams.mean_ms, planted.streams.max_ms) == (10.0, 13.0)
    (host,) = planted.collectors
    assert host.collector == "host"
    assert host.core_share == pytest.approx(0.002)


def test_without_stacks_there_is_only_a_total(tmp_path: Path) -> None:
    """CPU time that cannot be shared out is told as a whole."""
    found = resources(planted_run(tmp_path, stacks=None))

    assert found.cpu is not None
    assert found.cpu.cpu_s == pytest.approx(6.0, rel=0.01)
    assert found.cpu.samples == 0
    assert all(use.cpu is None and not use.stacks for use in found.stages)


def test_shares_of_almost_nothing_are_not_claimed(tmp_path: Path) -> None:
    """Three samples of a run tell no stage's CPU time; how many there were is told."""
    few = [row for row in stacks() if row["running"]][:3]
    found = resources(planted_run(tmp_path, stacks=[{**row, "samples": 1} for row in few]))

    assert found.cpu is not None
    assert (found.cpu.samples, found.cpu.shared_out) == (3, False)
    assert all(use.cpu is None for use in found.stages)
    assert "not split by stage: 3 running stack samples" in resources_lines(found)["CPU"]


def test_workers_count(tmp_path: Path) -> None:
    """A worker's CPU time is its own to share out; one without samples is apart; others are none."""
    second = (BEGIN_NS, BEGIN_NS + 1_000 * MS)
    more = [
        amount_row("process.cpu.time", 2.0, *second, pid=2),
        amount_row("process.cpu.time", 3.0, *second, pid=3),
        level_row("stagescope.process.works_for", 1.0, BEGIN_NS, pid=3, detail="1"),
    ]
    seen = stack_row("inference", BEGIN_NS, f"predict ({APP}:60)", pid=2)
    found = resources(planted_run(tmp_path, samples=[*samples(), *more], stacks=[*stacks(), seen]))

    assert found.cpu is not None
    assert (found.cpu.processes, found.cpu.unsampled_s) == (3, 3.0)
    assert found.cpu.cpu_s == pytest.approx(11.0, rel=0.01)
    assert cpu_s(found, "inference") == pytest.approx(1.8 + 2.0, rel=0.01)


def test_coverage_by_batches(tmp_path: Path) -> None:
    """Where openings were not counted, batches with a device time tell the coverage."""
    folder = planted_run(tmp_path, samples=[], stacks=None, kernels=None)
    batches = [batch_row(n, size=1, start_ns=BEGIN_NS + n, inference=MS) for n in range(4)]
    write_table(folder, BATCHES, [batches[0] | {"device_ns": MS}, *batches[1:]])

    found = resources(folder)

    assert found.device is not None
    assert (found.device.device_s, found.device.coverage) == (None, 0.25)


def test_no_evidence_no_resources(tmp_path: Path) -> None:
    """A run of which nothing was sampled has no resources, whether files lack or hold no row."""
    clients = [client_row(seq) for seq in range(3)]
    server = [server_row(row, {"inference": MS}) for row in clients]

    assert build_report(write_run_folder(tmp_path / "lacks", clients, server)).resources is None
    folder = write_run_folder(
        tmp_path / "empty", clients, server, samples=[], stacks=[], kernels=[]
    )
    assert build_report(folder).resources is None


@pytest.mark.parametrize("table", EVIDENCE, ids=lambda table: table.name)
def test_any_table_may_be_missing(table: Any, tmp_path: Path) -> None:
    """Each table is a gain of its own: without one the others' figures stand."""
    folder = planted_run(tmp_path)
    (folder / table.file_name).unlink()

    found = resources(folder)

    assert (found.memory is None) == (table is SAMPLES)
    assert any(use.stacks for use in found.stages) == (table is not STACKS)


def test_nulls_and_old_columns(tmp_path: Path) -> None:
    """Rows with nulls, and a server table of before stalls and profiles, cost their own figures."""
    odd = {"value": None, "name": "process.cpu.time", "start_ns": BEGIN_NS, "end_ns": BEGIN_NS + 1}
    stack = {"start_ns": BEGIN_NS, "end_ns": BEGIN_NS + MS, "frames": None}
    folder = planted_run(
        tmp_path,
        samples=[*samples(), odd, odd | {"value": 1.0}],
        stacks=[*stacks(), stack, stack | {"pid": 1}, stack | {"pid": 1, "running": True}],
    )
    file = folder / SERVER.file_name
    columns = ["stalls", "profiled", "chunk_gaps", "pid"]
    pq.write_table(pq.read_table(file).drop_columns(columns), file)

    found = resources(folder)

    assert found.streams is None
    assert all(not use.stalls_s for use in found.stages)
    assert stage(found, "inference").gpu_busy == pytest.approx(0.8)


def test_without_times_of_the_server_there_are_none(tmp_path: Path) -> None:
    """Rows of the response header lie on no clock: nothing can be laid over them."""
    clients = [client_row(seq) for seq in range(3)]
    header = {"source": "server-timing", "start_ns": 0, "stages": []}
    server = [server_row(row, {"inference": MS}) | header for row in clients]

    folder = write_run_folder(tmp_path, clients, server, samples=samples(), stacks=stacks())

    assert build_report(folder).resources is None
