"""What is read by NVML, through the real bindings and a library that a test tells what to answer."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from stagescope.sample_names import SAMPLE_NAMES
from stagescope.samples import AMOUNT, Sample
from tests.support.nvml import (
    DRIVER_NOT_LOADED,
    GPU_IS_LOST,
    NO_PERMISSION,
    NOT_SUPPORTED,
    UNKNOWN,
    StandIn,
    compile_stand_in,
)
from tests.support.nvml.polling import Polling, polling

GPU = "GPU-00000000"
OTHER = "GPU-00000001"
KINDS = {name.name: name.kind for name in SAMPLE_NAMES}


@pytest.fixture
def probe(stand_in: StandIn, tmp_path: Path) -> Iterator[Polling]:
    """The probe, in a process that loads the stand-in; it looks for devices at every poll."""
    with polling(stand_in.environment(), tmp_path, look_again_s=0) as started:
        assert not started.no_gpu
        yield started


def found(samples: list[Sample], name: str, detail: str = "", device: str = GPU) -> list[Sample]:
    """Pick the samples of one series of each process."""
    return [one for one in samples if (one.name, one.detail, one.device) == (name, detail, device)]


def value(samples: list[Sample], name: str, detail: str = "", device: str = GPU) -> float:
    """Return the one value of a series."""
    values = {round(one.value, 9) for one in found(samples, name, detail, device)}
    assert len(values) == 1, (name, detail, values)
    return values.pop()


def test_every_reading_of_a_device(stand_in: StandIn, probe: Polling) -> None:
    """Each figure comes under its name, in its unit, from the call that has it."""
    stand_in.tell("utilization 0 40", "memory_busy 0 20", "power 0 250000", "clock 0 1410")
    samples = probe.both(times=3)
    assert [(one.id, one.vendor, one.total_bytes) for one in probe.devices()] == [
        (GPU, "NVIDIA", 80_000_000_000)
    ]
    assert value(samples, "hw.gpu.memory.usage") == 2e9
    assert value(samples, "model_server.gpu.memory.reserved") == 5e8
    assert value(samples, "hw.gpu.memory.limit") == 8e10
    assert value(samples, "hw.temperature", "gpu") == 55
    assert value(samples, "hw.temperature", "memory") == 61
    shares = ("sm.active", "sm.occupancy", "tensor.active", "dram.active")
    assert [value(samples, f"model_server.gpu.{name}") for name in shares] == [
        0.02, 0.03, 0.05, 0.1,
    ]  # fmt: skip
    assert value(samples, "hw.errors", "corrected") == 0
    assert {one.name for one in samples} <= KINDS.keys()
    assert not [one for one in samples if one.end_ns < one.start_ns or one.value < 0]


def test_the_drivers_buffers_are_read_from_where_they_were_left(
    stand_in: StandIn, probe: Polling
) -> None:
    """Samples of one buffer follow each other without gap or overlap, at the driver's times."""
    stand_in.tell("utilization 0 40", "power 0 250000", "clock 0 1410")
    samples: list[Sample] = []
    while len(found(samples, "hw.gpu.utilization")) < 4:
        samples += probe.poll()
    for name, detail, level in (
        ("hw.gpu.utilization", "", 0.4),
        ("hw.power", "", 250.0),
        ("model_server.gpu.clock", "sm", 1.41e9),
    ):
        series = found(samples, name, detail)
        assert value(samples, name, detail) == level
        assert len(series) > 1
        for before, after in pairwise(series):
            assert before.start_ns < before.end_ns == after.start_ns
        assert 0 <= time.monotonic_ns() - series[-1].end_ns < 10_000_000_000


def test_counters_become_amounts(probe: Polling) -> None:
    """What a counter grew by from one poll to the next is the sample, over just that stretch."""
    first = probe.poll()
    assert not [one for one in first if KINDS[one.name] == AMOUNT]  # nothing to compare with
    samples = probe.poll()
    while samples[-1].end_ns - samples[0].start_ns < 500_000_000:
        samples += probe.poll()
    for name, detail, a_second in (
        ("hw.energy", "", 300),
        ("hw.gpu.io", "transmit", 4000),
        ("hw.gpu.io", "receive", 8000),
        ("model_server.gpu.nvlink.io", "transmit", 1000 * 1024),
        ("model_server.gpu.nvlink.io", "receive", 2000 * 1024),
        ("model_server.gpu.throttle.time", "sw_power_cap", 0.25),
    ):
        series = found(samples, name, detail)
        lasted_s = (series[-1].end_ns - series[0].start_ns) / 1e9
        assert all(before.end_ns == after.start_ns for before, after in pairwise(series))
        rate = sum(one.value for one in series) / lasted_s
        assert rate == pytest.approx(a_second, rel=0.5), (name, detail)


def test_a_counter_that_begins_anew_tells_nothing(stand_in: StandIn, probe: Polling) -> None:
    """A counter that fell gives no sample, and the next growth is counted from there."""
    seen = []
    for energy in (5_000, 9_000, 1_000, 3_500):
        stand_in.tell(f"field 83 0 {energy}")
        seen += [one.value for one in found(probe.poll(), "hw.energy")]
    assert seen == [4.0, 2.5]


def test_a_field_that_fails_is_left_out_alone(stand_in: StandIn, probe: Polling) -> None:
    """Each field has an outcome of its own: one is not known, one has nothing now, others read."""
    stand_in.tell(f"nofield 82 0 {NOT_SUPPORTED}", "nofield 197 0 21")
    samples = probe.poll(times=2)
    assert not found(samples, "hw.temperature", "memory")
    assert not found(samples, "hw.gpu.io", "transmit")
    assert found(samples, "hw.gpu.io", "receive")
    stand_in.tell()
    later = probe.poll(times=2)
    assert not found(later, "hw.temperature", "memory")  # it never will
    assert found(later, "hw.gpu.io", "transmit")


def test_traffic_comes_from_hardware_counters_where_no_field_has_it(
    stand_in: StandIn, probe: Polling
) -> None:
    """Bytes over the bus and NVLink are rates of GPM, made amounts, where fields lack them."""
    stand_in.tell(*(f"nofield {number} 0 {NOT_SUPPORTED}" for number in (197, 198, 138, 139)))
    samples = probe.poll(times=3)
    for name, detail, rate in (
        ("hw.gpu.io", "transmit", 20),
        ("hw.gpu.io", "receive", 21),
        ("model_server.gpu.nvlink.io", "receive", 60),
        ("model_server.gpu.nvlink.io", "transmit", 61),
    ):
        series = found(samples, name, detail)
        assert len(series) == 2
        assert series[0].value == pytest.approx(
            rate * 2**20 * (series[0].end_ns - series[0].start_ns) / 1e9
        )


def test_hardware_counters_are_left_out_where_there_are_none(
    stand_in: StandIn, probe: Polling
) -> None:
    """Before Hopper there is no GPM; it is asked once, and nothing else suffers."""
    stand_in.tell("gpm 0 0")
    samples = probe.poll(times=4)
    assert not found(samples, "model_server.gpu.sm.active")
    assert found(samples, "hw.energy")
    assert stand_in.calls()["nvmlGpmQueryDeviceSupport"] == 1
    assert not stand_in.calls()["nvmlGpmSampleGet"]


def test_one_hardware_counter_may_be_missing(stand_in: StandIn, probe: Polling) -> None:
    """A counter that the device lacks is absent, not 0; those beside it read."""
    stand_in.tell("notensor 0 1")
    samples = probe.poll(times=2)
    assert not found(samples, "model_server.gpu.tensor.active")
    assert value(samples, "model_server.gpu.sm.active") == 0.02


def test_hardware_counters_are_shed(stand_in: StandIn, probe: Polling) -> None:
    """Where they are forbidden they are not read; allowed again, the gap is not made a sample."""
    probe.poll(times=2)
    probe.ask("allow", False)
    before = stand_in.calls()["nvmlGpmSampleGet"]
    assert not found(probe.poll(times=2), "model_server.gpu.sm.active")
    assert stand_in.calls()["nvmlGpmSampleGet"] == before
    probe.ask("allow", True)
    assert not found(probe.poll(), "model_server.gpu.sm.active")
    assert found(probe.poll(), "model_server.gpu.sm.active")


def test_an_idle_buffer_is_no_error(stand_in: StandIn, probe: Polling) -> None:
    """`NOT_FOUND` means that there is nothing new: no sample, no word, and it is asked again."""
    stand_in.tell("idle 0 1")
    assert not found(probe.poll(times=3), "hw.gpu.utilization")
    assert probe.said() == []
    stand_in.tell()
    samples = probe.poll()
    while not found(samples, "hw.gpu.utilization"):
        samples += probe.poll()


@pytest.mark.parametrize("code", [NOT_SUPPORTED, NO_PERMISSION])
def test_a_call_that_is_refused_is_switched_off_alone(
    stand_in: StandIn, probe: Polling, code: int
) -> None:
    """It is called once and never again; only a missing right is said, for it can be mended."""
    stand_in.tell(
        f"fail nvmlDeviceGetCurrentClocksEventReasons 0 {code}",
        f"fail nvmlDeviceGetCurrentClocksThrottleReasons 0 {code}",
    )
    samples = probe.poll(times=4)
    assert stand_in.calls()["nvmlDeviceGetCurrentClocksThrottleReasons"] == 1
    assert found(samples, "hw.energy")
    assert not found(samples, "model_server.gpu.throttle.time", "hw_slowdown")
    told = ["gpu: no permission for nvmlDeviceGetCurrentClocksThrottleReasons, so it is left out"]
    assert probe.said() == (told if code == NO_PERMISSION else [])


def test_an_unknown_error_is_said_once_and_rests(stand_in: StandIn, probe: Polling) -> None:
    """After three in a row a call rests; what it reads is missing, and all else goes on."""
    stand_in.tell(f"fail nvmlDeviceGetMemoryInfo_v2 0 {UNKNOWN}")
    before = stand_in.calls()["nvmlDeviceGetMemoryInfo_v2"]
    samples = probe.poll(times=6)
    assert not found(samples, "hw.gpu.memory.usage")
    assert found(samples, "hw.energy")
    assert stand_in.calls()["nvmlDeviceGetMemoryInfo_v2"] - before == 3
    assert len(probe.said()) == 1
    assert "nvmlDeviceGetMemoryInfo_v2 of GPU-00000000 fails" in probe.said()[0]


def test_a_lost_device_is_dropped(stand_in: StandIn, tmp_path: Path) -> None:
    """One of two GPUs goes: that is logged once, and the other is read on."""
    stand_in.tell("devices 0 2")
    with polling(stand_in.environment(), tmp_path) as probe:
        assert len({one.device for one in probe.poll()}) == 2
        stand_in.tell("devices 0 2", f"fail nvmlDeviceGetSamples 1 {GPU_IS_LOST}")
        samples = probe.poll(times=3)
        assert [device.id for device in probe.devices()] == [GPU]
        assert {one.device for one in samples} == {GPU}
        assert probe.said() == [
            f"gpu: Stand-in H0 {OTHER} is gone: GPU is lost; looked for every 60 s"
        ]


def test_a_lost_device_that_is_back_is_read_again(stand_in: StandIn, probe: Polling) -> None:
    """While a GPU gives no handle the others are read; once it does, it is read too."""
    stand_in.tell("devices 0 2", f"fail nvmlDeviceGetHandleByIndex_v2 1 {GPU_IS_LOST}")
    probe.poll(times=3)
    assert [device.id for device in probe.devices()] == [GPU]
    assert probe.said() == ["gpu: GPU 1 does not answer: GPU is lost; asked again every 0 s"]
    stand_in.tell("devices 0 2")
    assert found(probe.poll(times=2), "hw.energy", device=OTHER)


def test_a_driver_that_goes_is_told(stand_in: StandIn, probe: Polling) -> None:
    """Where the driver itself answers no more, the poll says so in one sentence."""
    probe.poll()
    stand_in.tell(f"fail nvmlDeviceGetCount_v2 * {DRIVER_NOT_LOADED}")
    assert probe.ask("poll", "fast") == {
        "no_gpu": "NVIDIA's driver does not answer: Driver Not Loaded"
    }


def test_no_driver_is_told(stand_in: StandIn, tmp_path: Path) -> None:
    """The library is there and the driver is not: one sentence."""
    stand_in.tell(f"init 0 {DRIVER_NOT_LOADED}")
    with polling(stand_in.environment(), tmp_path) as started:
        assert started.no_gpu == "NVIDIA's driver does not answer: Driver Not Loaded"


def test_no_library_is_told(tmp_path: Path) -> None:
    """A library that cannot be loaded: one sentence."""
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    with polling({"LD_LIBRARY_PATH": str(tmp_path)}, tmp_path) as started:
        assert started.no_gpu == "NVIDIA's driver does not answer: NVML Shared Library Not Found"


def test_no_devices_is_nothing_to_read(stand_in: StandIn, probe: Polling) -> None:
    """A driver without a GPU gives nothing, and one that appears is read."""
    stand_in.tell("devices 0 0")
    assert [one for one in probe.both() if one.device] == []
    stand_in.tell("devices 0 1")
    assert found(probe.poll(), "hw.gpu.memory.usage")


def test_older_calls_stand_in_for_missing_ones(tmp_path: Path) -> None:
    """With an older driver's library each newer function has an older one in its place."""
    newer = (
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetSamples",
        "nvmlDeviceGetCurrentClocksEventReasons",
        "nvmlDeviceGetTemperatureV",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlGpmQueryDeviceSupport",
    )
    library = compile_stand_in(tmp_path / "older", without=newer)
    stand_in = StandIn(library, tmp_path / "control")
    stand_in.tell(f"process 0 {os.getpid()} 1000 5", "reasons 0 8")
    with polling(stand_in.environment(), tmp_path) as probe:
        samples = probe.both(times=2)
        assert value(samples, "hw.gpu.memory.usage") == 2.5e9  # the reserve is in it
        assert value(samples, "hw.gpu.utilization") == 0.5
        assert value(samples, "hw.power") == 310
        assert value(samples, "hw.temperature", "gpu") == 54
        assert value(samples, "model_server.gpu.process.memory") == 1000
        assert found(samples, "model_server.gpu.throttle.time", "hw_slowdown")
        assert not found(samples, "model_server.gpu.memory.reserved")
        assert probe.said() == []


def test_a_library_without_field_values_reads_the_rest(tmp_path: Path) -> None:
    """A function that is absent and has none in its place switches off what it alone reads."""
    library = compile_stand_in(
        tmp_path / "older", without=("nvmlDeviceGetFieldValues", "nvmlDeviceGetMigMode")
    )
    stand_in = StandIn(library, tmp_path / "control")
    stand_in.tell("reasons 0 4")
    with polling(stand_in.environment(), tmp_path) as probe:
        samples = probe.poll(times=3)
        assert not found(samples, "hw.energy")
        assert found(samples, "hw.gpu.memory.usage")
        capped = found(samples, "model_server.gpu.throttle.time", "sw_power_cap")
        assert [one.value for one in capped] == [
            pytest.approx((one.end_ns - one.start_ns) / 1e9) for one in capped
        ]  # estimated: it held at both ends
        assert len(capped) == 2


def test_mig_instances_are_devices_of_their_own(stand_in: StandIn, probe: Polling) -> None:
    """Each has its UUID, its parent, its memory and its counters; the GPU's own rates are not."""
    stand_in.tell("mig 0 2", f"fail nvmlDeviceGetSamples 0 {NOT_SUPPORTED}",
                  f"fail nvmlDeviceGetUtilizationRates 0 {NOT_SUPPORTED}")  # fmt: skip
    samples = probe.both(times=2)
    instances = [one for one in probe.devices() if one.parent]
    assert [(one.id, one.parent, one.total_bytes) for one in instances] == [
        (f"MIG-00000000-{number}", GPU, 8_000_000_000) for number in (0, 1)
    ]
    for instance in instances:
        assert value(samples, "hw.gpu.memory.usage", device=instance.id) == 2e8
        assert value(samples, "model_server.gpu.sm.active", device=instance.id) == 0.02
        assert value(samples, "hw.gpu.utilization", device=instance.id) == 0.01
        assert not found(samples, "hw.power", device=instance.id)
    assert not found(samples, "hw.gpu.utilization")
    assert value(samples, "hw.power") == 310  # the buffer is not there, the field is
    assert stand_in.calls()["nvmlGpmMigSampleGet"] == 4


def test_mig_instances_come_and_go(stand_in: StandIn, probe: Polling) -> None:
    """A GPU that is partitioned anew has its new instances at the next look."""
    probe.poll()
    stand_in.tell("mig 0 3")
    probe.poll()
    assert len(probe.devices()) == 4
    stand_in.tell("mig 0 1")
    probe.poll()
    assert [one.id for one in probe.devices()] == [GPU, "MIG-00000000-0"]


def test_processes_are_named_where_proc_knows_them(stand_in: StandIn, probe: Polling) -> None:
    """A PID of this host has its row; those that are nobody's here are one row together."""
    nobody = 2**22 + 1  # above what Linux gives
    stand_in.tell(
        f"process 0 {os.getpid()} 5000 30",
        f"process 0 {nobody} 700 1",
        f"process 0 {nobody + 1} 70 1",
    )
    samples = probe.both(times=2)
    memory = [one for one in samples if one.name == "model_server.gpu.process.memory"]
    assert {(one.pid, one.detail, one.value) for one in memory} == {
        (os.getpid(), "", 5000.0),
        (0, "unknown process", 770.0),
    }
    shares = [one for one in samples if one.name == "model_server.gpu.process.utilization"]
    assert [(one.pid, one.value) for one in shares] == [(os.getpid(), 0.3)]


def test_a_slow_call_is_made_rarer_and_that_is_said_once(stand_in: StandIn, probe: Polling) -> None:
    """A slow call halves its own rate, and again while it is slow; the others keep theirs."""
    stand_in.tell("slow nvmlDeviceGetCurrentClocksEventReasons 0 120")
    before = stand_in.calls()
    probe.poll(times=20)
    made: Counter[str] = stand_in.calls() - before
    assert made["nvmlDeviceGetFieldValues"] == 20
    # Each of five turns; of nine turns every second one; then every fourth one.
    assert made["nvmlDeviceGetCurrentClocksEventReasons"] == 5 + 5 + 2
    assert len(probe.said()) == 1
    assert "nvmlDeviceGetCurrentClocksEventReasons takes 1" in probe.said()[0]
    costs = {one.detail: one for one in probe.poll("slow") if "call_time" in one.name}
    assert costs["nvmlDeviceGetCurrentClocksEventReasons"].value > 0.12
    assert costs["nvmlDeviceGetFieldValues.fast"].value > 0


def test_costly_calls_are_never_made(stand_in: StandIn, probe: Polling) -> None:
    """Neither the fan nor the throughput that is read for 20 ms, which the stand-in lacks too."""
    probe.both(times=2)
    assert not [name for name in stand_in.calls() if "Fan" in name or "Throughput" in name]


def test_faults_are_told_as_they_happen(stand_in: StandIn, probe: Polling) -> None:
    """An XID and an ECC error come with their device and their number."""
    stand_in.tell("devices 0 2")
    probe.poll()
    stand_in.tell("devices 0 2", "event 1 8 79", "event 0 2 0")
    xid, ecc = probe.event(), probe.event()
    assert (xid.device, xid.kind, xid.detail) == (OTHER, "xid", "79")
    assert (ecc.device, ecc.kind) == (GPU, "ecc")
    assert xid.at_ns <= ecc.at_ns <= time.monotonic_ns()


def test_a_device_without_ecc_tells_of_xids(stand_in: StandIn, probe: Polling) -> None:
    """Where ECC events cannot be had, XIDs can."""
    stand_in.tell("noecc 0 1", "event 0 8 31")
    probe.poll()
    assert probe.event().detail == "31"


def test_edges_of_throttling_are_events(stand_in: StandIn, probe: Polling) -> None:
    """A reason that comes is one event, and one when it goes; idling is none."""
    stand_in.tell("reasons 0 1")
    probe.poll()
    stand_in.tell("reasons 0 65")
    probe.poll(times=2)
    stand_in.tell("reasons 0 0")
    probe.poll(times=2)
    edges = [probe.event(), probe.event()]
    assert [(one.kind, one.detail) for one in edges] == [
        ("throttle_began", "hw_thermal_slowdown"),
        ("throttle_ended", "hw_thermal_slowdown"),
    ]


def test_nothing_is_left_of_it(stand_in: StandIn, probe: Polling) -> None:
    """Closed, it has freed every reading of counters and every set of events, and shut down."""
    stand_in.tell("mig 0 2", "event 0 8 31")
    probe.poll(times=3)
    probe.event()
    assert probe.ask("close") == 1
    calls = stand_in.calls()
    assert calls["nvmlGpmSampleAlloc"] == calls["nvmlGpmSampleFree"] == 6
    assert calls["nvmlEventSetCreate"] == calls["nvmlEventSetFree"]
    assert calls["nvmlInitWithFlags"] == calls["nvmlShutdown"] == 1
