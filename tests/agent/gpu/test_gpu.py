"""The GPU sampler: its threads, what it keeps, and the agent as a process with a driver or none."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.agent.api.client import AgentClient
from stagescope.agent.events import Notice
from stagescope.agent.gpu import select
from stagescope.agent.gpu.probe import THROTTLE_BEGAN, XID, Device, DeviceEvent, GpuProbe, NoGpu
from stagescope.agent.gpu.replay import HEAD, Recording, ReplayProbe, read_recording
from stagescope.agent.gpu.sampler import GpuSampler
from stagescope.agent.gpu.select import make
from stagescope.agent.loop import Agent
from stagescope.agent.store.telemetry import TelemetryBuffer
from stagescope.errors import UsageError
from stagescope.samples import Sample
from stagescope.testing import wait_until
from stagescope.testing.clock import HandClock
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses
from tests.support.nvml import DRIVER_NOT_LOADED, StandIn

MS = 1_000_000
RECORDING = Recording(
    (Device("GPU-1", "H0", "NVIDIA", 0, 80, replay=True),),
    (Sample("hw.power", 0, 10 * MS, 300.0, device="GPU-1"),),
    (
        DeviceEvent(10 * MS, "GPU-1", XID, "79"),
        DeviceEvent(11 * MS, "GPU-1", THROTTLE_BEGAN, "sw_power_cap"),
        DeviceEvent(12 * MS, "GPU-1", THROTTLE_BEGAN, "hw_thermal_slowdown"),
    ),
)


def replay() -> GpuProbe:
    """A probe that gives something each second."""
    return ReplayProbe(RECORDING)


@pytest.fixture
def evidence() -> TelemetryBuffer:
    """Where samples go."""
    return TelemetryBuffer()


def test_samples_events_and_notices_are_kept(evidence: TelemetryBuffer) -> None:
    """What a probe gives lands in the evidence; a fault and heat are noticed, a power cap is not."""
    notices: list[Notice] = []
    sampler = GpuSampler(replay, evidence, notices.append, fast_s=0.01)
    sampler.collect()
    wait_until(lambda: len(notices) == 2)
    wait_until(lambda: evidence.samples.latest(0))
    sampler.close()
    assert [(one.kind, one.device) for one in notices] == [
        ("xid", "GPU-1"),
        ("throttle", "GPU-1"),
    ]
    assert notices[0].sentence == "the driver reported XID 79 on H0 GPU-1"
    kept = {sample.name: (sample, total) for sample, total in evidence.samples.latest(0)}
    assert kept["hw.power"][0].value == 300
    assert kept["model_server.gpu.xid"][1] == 1
    assert kept["model_server.gpu.xid"][0].detail == "79"
    assert evidence.counts["device_events_added"] == 3
    assert evidence.devices["GPU-1"].replay
    assert sampler.children_cpu_s() > 0


def test_started_and_ended_twenty_times(evidence: TelemetryBuffer) -> None:
    """No thread is left of it, and it ends at once."""
    before = threading.active_count()
    for _ in range(20):
        sampler = GpuSampler(replay, evidence, fast_s=0.001)
        sampler.collect()
        wait_until(lambda made=sampler: made._probe is not None)  # type: ignore[misc]
        sampler.close()
        assert threading.active_count() == before


def test_one_that_was_never_begun_ends(evidence: TelemetryBuffer) -> None:
    """An agent may end before its loop ever called it."""
    GpuSampler(replay, evidence).close()


def test_no_gpu_is_said_once_and_tried_again(
    evidence: TelemetryBuffer, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver that comes later is read; until then it is one sentence, however often."""
    tries: list[int] = []

    def late() -> GpuProbe:
        tries.append(1)
        if len(tries) < 4:
            raise NoGpu("there is none yet")
        return replay()

    sampler = GpuSampler(late, evidence, fast_s=0.01, retry_s=0.01)
    sampler.collect()
    wait_until(lambda: evidence.devices)
    sampler.close()
    assert [one.getMessage() for one in caplog.records] == [
        "gpu: no GPU is read: there is none yet; tried again every 0.01 s"
    ]


def test_a_driver_that_goes_is_opened_again(
    evidence: TelemetryBuffer, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a poll finds no driver any more, the probe is closed and a new one opened."""
    opened: list[GpuProbe] = []

    class Going(ReplayProbe):
        def poll(self, tier: object) -> list[Sample]:
            raise NoGpu("the driver is gone")

    def open_probe() -> GpuProbe:
        opened.append(Going(RECORDING) if len(opened) < 2 else ReplayProbe(RECORDING))
        return opened[-1]

    sampler = GpuSampler(open_probe, evidence, fast_s=0.01, retry_s=0.01)
    sampler.collect()
    wait_until(lambda: evidence.devices)
    sampler.close()
    assert len(opened) == 3
    assert [one.getMessage() for one in caplog.records] == [
        "gpu: the driver is gone; tried again every 0.01 s"
    ]


def test_a_fault_of_ours_reaches_the_loops_guard(evidence: TelemetryBuffer) -> None:
    """What goes wrong in a thread is raised by the next `collect`, where it is counted."""

    def broken() -> GpuProbe:
        raise ValueError("ours")

    sampler = GpuSampler(broken, evidence)

    def raised() -> bool:
        try:
            sampler.collect()
        except ValueError:
            return True
        return False

    wait_until(raised)
    sampler.close()


def test_a_driver_that_holds_a_call_keeps_nobody_up(
    evidence: TelemetryBuffer, caplog: pytest.LogCaptureFixture
) -> None:
    """That samples are missing is said, once; `close` leaves the thread behind, and says that."""
    called, held = threading.Event(), threading.Event()

    class Holding(ReplayProbe):
        def poll(self, tier: object) -> list[Sample]:
            called.set()
            held.wait()
            return []

    clock = HandClock()
    sampler = GpuSampler(lambda: Holding(RECORDING), evidence, clock=clock)
    sampler.collect()
    assert called.wait(10)
    for _ in range(3):
        clock.tick(6_000 * MS)
        sampler.collect()
    sampler.close()
    assert [one.getMessage() for one in caplog.records] == [
        "gpu: the driver has not answered for 5 s; samples are missing until it does",
        "gpu: the driver blocks a call; its thread ends with the agent",
    ]
    held.set()


def test_settings_that_are_none(tmp_path: Path) -> None:
    """They are told in one sentence each, before anything begins."""
    agent = Agent(tmp_path, {})
    for setting, told in (
        ({"STAGESCOPE_GPU_REPLAY": str(tmp_path / "none")}, "cannot be read"),
        (
            {"STAGESCOPE_GPU": "nvml", "STAGESCOPE_GPU_RECORD": str(tmp_path / "no" / "file")},
            "cannot be written",
        ),
    ):
        with pytest.raises(UsageError, match=told):
            make(agent, setting)
    assert make(agent, {"STAGESCOPE_GPU": "off"}) == ()
    agent.close()


def test_where_there_is_no_gpu_there_is_no_sampler(tmp_path: Path) -> None:
    """No library and no device file: it is said, and nothing is begun."""
    (tmp_path / "libnvidia-ml.so.1").write_text("not a library")
    script = (
        "import logging, pathlib, sys; logging.basicConfig(level=logging.INFO)\n"
        "from stagescope.agent.gpu import select as gpu; from stagescope.agent.loop import Agent\n"
        "gpu.OTHER_DEVICES = ()\n"
        "print(gpu.make(Agent(pathlib.Path(sys.argv[1]), {})), 'pynvml' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={"PYTHONPATH": str(Path(select.__file__).parents[2]), "LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "() False\n"
    assert "no GPU here: neither NVIDIA's libnvidia-ml.so.1 nor" in done.stderr


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    monkeypatch.setenv("STAGESCOPE_SAMPLERS", "gpu")
    with short_spool() as folder:
        yield folder


def use(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have processes that are started find the stand-in."""
    for name, text in stand_in.environment().items():
        monkeypatch.setenv(name, text)


def end(process: subprocess.Popen[str]) -> str:
    """End an agent by SIGTERM, and give what it printed."""
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    return out + err


def test_an_agent_reads_a_driver(
    spool: Path, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: the agent as a process, its samples, its events, and an orderly end."""
    use(stand_in, monkeypatch)
    recorded = tmp_path / "gpu.ndjson"
    monkeypatch.setenv("STAGESCOPE_GPU_RECORD", str(recorded))
    stand_in.tell("mig 0 1", "event 0 8 79")
    with AgentProcesses() as start:
        process = start(spool)
        client = AgentClient(spool / "agent.sock")
        wait_until(lambda: client.counters().get("device_events_added", 0) == 1)
        wait_until(lambda: stand_in.calls()["nvmlGpmMetricsGet"] >= 4)
        assert client.counters()["samples"] > 20
        assert client.counters()["faults"] == 0
        end(process)
    recording = read_recording(recorded)
    assert [one.id for one in recording.devices] == ["GPU-00000000", "MIG-00000000-0"]
    assert [one.detail for one in recording.events] == ["79"]
    assert {"hw.power", "model_server.gpu.sm.active"} <= {one.name for one in recording.samples}
    calls = stand_in.calls()
    assert calls["nvmlInitWithFlags"] == calls["nvmlShutdown"] == 1
    assert calls["nvmlEventSetCreate"] == calls["nvmlEventSetFree"]


def test_an_agent_without_a_driver_runs_on(
    spool: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver does not answer: said once, and everything else works."""
    use(stand_in, monkeypatch)
    stand_in.tell(f"init 0 {DRIVER_NOT_LOADED}")
    with AgentProcesses() as start:
        process = start(spool)
        wait_until(lambda: stand_in.calls()["nvmlInitWithFlags"])
        assert AgentClient(spool / "agent.sock").health()["status"] == "ok"
        printed = end(process)
    sentence = "gpu: no GPU is read: NVIDIA's driver does not answer: Driver Not Loaded"
    assert printed.count(sentence) == 1


def test_an_agent_ends_while_the_driver_holds_a_call(
    spool: Path, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that lasts a minute delays neither its answers nor its end, and is named."""
    use(stand_in, monkeypatch)
    stand_in.tell("slow nvmlDeviceGetFieldValues * 60000")
    with AgentProcesses() as start:
        process = start(spool)
        wait_until(lambda: stand_in.calls()["nvmlDeviceGetFieldValues"])
        assert AgentClient(spool / "agent.sock").health()["status"] == "ok"
        printed = end(process)
    assert "the driver blocks a call; its thread ends with the agent (in nvmlDeviceGetF" in printed


def test_an_agent_replays_a_recording(
    spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU and without torch: a file stands for it; one that is none is exit code 2."""
    path = tmp_path / "gpu.ndjson"
    sample = {"kind": "sample", "name": "hw.power", "start_ns": 0, "end_ns": 5 * MS, "value": 1.0}
    path.write_text("\n".join(map(json.dumps, (HEAD, sample))))
    monkeypatch.setenv("STAGESCOPE_GPU_REPLAY", str(path))
    with AgentProcesses() as start:
        process = start(spool)
        wait_until(lambda: AgentClient(spool / "agent.sock").counters()["samples"] >= 1)
        end(process)
        path.write_text("nonsense")
        failed = start(spool, answers=False)
        _, err = failed.communicate(timeout=20)
        assert failed.returncode == 2
        assert f"{path}, line 1" in err
        assert err.count("\n") == 1
