"""Device time of stages, on a simulated device."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.middleware.batch import batch
from stagescope.middleware.recording.names import intern
from stagescope.middleware.recording.timeline import current
from stagescope.middleware.recording.timeline_group import TimelineGroup
from stagescope.middleware.runtime.observers import leave, observe
from stagescope.middleware.stage import stage
from stagescope.middleware.torch import device_time as device_times
from stagescope.middleware.torch.device_events import TorchClock, in_use, possible
from stagescope.middleware.torch.device_time import MAX_MARKS, DeviceTime, asked_stages, device_time
from stagescope.stages import partition
from stagescope.testing.clock import HandClock
from stagescope.testing.recording import Recording
from tests.support.devices import UUID, Device, SimulatedTorch, Stream

MS = 1_000_000
INFERENCE, FORWARD = intern("inference"), intern("inference.forward")
GPU = f"GPU-{UUID.format(0)}"


@pytest.fixture
def clock() -> HandClock:
    """The device's and the recorder's clock."""
    return HandClock()


@pytest.fixture
def device(clock: HandClock) -> Device:
    """A device in use."""
    return Device(clock)


@pytest.fixture
def recording(tmp_path: Path, clock: HandClock) -> Iterator[Recording]:
    """Somewhere to write to."""
    made = Recording(tmp_path, clock=clock)
    yield made
    made.close()


@pytest.fixture
def times(device: Device) -> Iterator[DeviceTime]:
    """Device time of inference, taken."""
    made = DeviceTime(TorchClock("cuda", device), ["inference"])
    observe(made)
    yield made
    leave(made)


def measured(times: DeviceTime) -> dict[str, tuple[int, int, int]]:
    """Return openings, those timed, and ns by stage."""
    return {
        one["stage"]: (one["opened"], one["timed"], one["ns"]) for one in times.sums()["stages"]
    }


def capture(device: Device) -> None:
    """Capture a graph."""
    graph = device.CUDAGraph()
    graph.capture_begin()
    graph.capture_end()


def settle(recording: Recording, times: DeviceTime, clock: HandClock) -> None:
    """Open and close stages until the device has come to all marks before."""
    clock.tick(10_000 * MS)
    for _ in range(200):
        with recording.request(), stage("inference"):
            clock.tick(0)
        if times.sums()["pending"] <= 1:
            return


def test_a_stage_has_the_time_that_its_work_takes(
    recording: Recording, device: Device, clock: HandClock, times: DeviceTime
) -> None:
    """It is known when the device has come to the end, at a later stage; nothing waits for it."""
    with recording.request(), stage("inference"):
        device.stream(0).launch(7 * MS)
    assert measured(times) == {"inference": (1, 0, 0)}
    clock.tick(20 * MS)
    with recording.request(), stage("inference"):
        pass
    assert measured(times)["inference"][1:] == (2, 7 * MS)
    assert times.sums()["stages"][0]["device"] == GPU


def test_other_stages_cost_no_event(
    recording: Recording, device: Device, times: DeviceTime
) -> None:
    """A stage that is not asked for puts nothing on the stream."""
    with recording.request(), stage("preprocess"):
        device.stream(0).launch(MS)
    assert device.calls == {"record": 0, "query": 0}
    assert measured(times) == {}


def test_nested_stages_are_charged_the_innermost(
    recording: Recording, device: Device, clock: HandClock, times: DeviceTime
) -> None:
    """What passes inside the inner one is its own alone; together they have all of it."""
    with recording.request(), stage("inference"):
        device.stream(0).launch(2 * MS)
        with stage("inference.forward"):
            device.stream(0).launch(5 * MS)
        device.stream(0).launch(1 * MS)
    settle(recording, times, clock)
    found = measured(times)
    assert found["inference"][2] == 3 * MS
    assert found["inference.forward"] == (1, 1, 5 * MS)


def test_two_threads_on_one_stream_do_not_count_it_twice(
    recording: Recording, device: Device, clock: HandClock, times: DeviceTime
) -> None:
    """Two requests at once on the default stream have its busy time between them, not each."""
    begun, go_on = threading.Event(), threading.Event()

    def other() -> None:
        with recording.request(), stage("inference"):
            device.stream(0).launch(4 * MS)
            begun.set()
            go_on.wait(10)

    thread = threading.Thread(target=other)
    with recording.request(), stage("inference"):
        device.stream(0).launch(3 * MS)
        thread.start()
        begun.wait(10)
    go_on.set()
    thread.join()
    settle(recording, times, clock)
    assert measured(times)["inference"][2] == 7 * MS


def test_idle_time_between_stages_is_nobodys(
    recording: Recording, device: Device, clock: HandClock, times: DeviceTime
) -> None:
    """What passes on the stream outside of stages is charged to none, work or not."""
    for _ in range(3):
        with recording.request(), stage("inference"):
            device.stream(0).launch(MS)
        device.stream(0).launch(50 * MS)
        clock.tick(100 * MS)
    settle(recording, times, clock)
    assert measured(times)["inference"][2] == 3 * MS


def test_a_batch_is_timed_once_and_knows_its_device_time(
    recording: Recording, device: Device, clock: HandClock, times: DeviceTime
) -> None:
    """Once for all its members; its record has the time where the device was done by its end."""
    with recording.request():
        tickets = [batch.enqueue() for _ in range(4)]
        with batch(clock=clock) as formed:
            formed.add(*tickets)
            with formed.inference():
                device.stream(0).launch(6 * MS)
                clock.tick(8 * MS)  # the result is fetched
    (record,) = recording.batches
    assert record.device_ns == 8 * MS  # a span on the stream, its idle end included
    assert measured(times)["inference"] == (1, 1, 8 * MS)


def test_a_batch_has_the_time_of_the_stages_inside_it(
    recording: Recording, device: Device, clock: HandClock, times: DeviceTime
) -> None:
    """Its record has all of it; of the sums each stage has its own part."""
    with recording.request():
        ticket = batch.enqueue()
        with batch(clock=clock) as formed:
            formed.add(ticket)
            with formed.inference():
                device.stream(0).launch(2 * MS)
                with stage("inference.forward"):
                    device.stream(0).launch(5 * MS)
                clock.tick(7 * MS)
    assert recording.batches[0].device_ns == 7 * MS
    found = measured(times)
    assert (found["inference"][2], found["inference.forward"][2]) == (2 * MS, 5 * MS)


def test_a_batch_that_the_device_is_behind_with_has_no_device_time(
    recording: Recording, device: Device, clock: HandClock, times: DeviceTime
) -> None:
    """Its record says 0; the sums have it later."""
    with recording.request():
        ticket = batch.enqueue()
        with batch(clock=clock) as formed:
            formed.add(ticket)
            with formed.inference():
                device.stream(0).launch(6 * MS)
    assert recording.batches[0].device_ns == 0
    settle(recording, times, clock)
    assert measured(times)["inference"][2] == 6 * MS


def test_stages_of_many_at_once_are_timed_once(
    recording: Recording, device: Device, clock: HandClock, times: DeviceTime
) -> None:
    """Code that works for all members of a batch opens its stage once."""
    with recording.request() as first, recording.request() as second:
        token = current.set(TimelineGroup([first, second]))
        with stage("inference.forward"):
            device.stream(0).launch(6 * MS)
        current.reset(token)
    settle(recording, times, clock)
    assert measured(times)["inference.forward"] == (1, 1, 6 * MS)


def test_nothing_is_put_or_asked_under_capture(
    recording: Recording, device: Device, clock: HandClock, times: DeviceTime
) -> None:
    """A stage that opens or closes while a graph is captured, in any thread, is counted as missed.

    The stand-in raises where an event meets a capture, and our faults are raised under tests.
    """
    with recording.request():
        graph = device.CUDAGraph()
        graph.capture_begin()
        with stage("inference"):
            pass
        graph.capture_end()
        with stage("inference"):
            device.stream(0).launch(3 * MS)
            with stage("inference.forward"):
                device.stream(0).launch(2 * MS)
                graph.capture_begin()
            graph.capture_end()
        with stage("inference"):
            capture(device)
            device.stream(0).launch(4 * MS)
    assert times.sums()["missed"]["capture"] == 2
    settle(recording, times, clock)
    found = measured(times)
    assert found["inference.forward"] == (1, 0, 0)
    assert found["inference"][2] == 9 * MS  # what is around has the time of what was spoiled
    assert not times.failure


def test_a_capture_that_fails_is_over(device: Device) -> None:
    """One that could not begin is none, one that could not end has ended."""

    def fail(self: object) -> None:
        raise RuntimeError("planted")

    for name in ("capture_begin", "capture_end"):
        other = Device(device.clock)
        setattr(other.CUDAGraph, name, fail)
        clock = TorchClock("cuda", other)
        with pytest.raises(RuntimeError, match="planted"):
            capture(other)
        assert not clock.capturing()


def test_a_device_that_hangs_costs_a_bounded_number_of_events(
    recording: Recording, device: Device, clock: HandClock, times: DeviceTime
) -> None:
    """Beyond it the newest are not timed, and counted; what came before is kept."""
    with recording.request(), stage("inference"):
        device.stream(0).launch(MS)
    settle(recording, times, clock)
    before = measured(times)["inference"]
    device.stream(0).hang()
    for _ in range(2000):
        with recording.request(), stage("inference"):
            pass
    sums = times.sums()
    assert MAX_MARKS <= sums["pending"] <= MAX_MARKS + 2
    opened, timed, ns = measured(times)["inference"]
    assert (timed, ns) == before[1:]
    assert opened == before[0] + 2000
    assert sums["missed"]["full"] == 2000 - MAX_MARKS // 2


def test_a_request_that_ends_first_takes_its_open_stage_along(
    recording: Recording, device: Device, clock: HandClock, times: DeviceTime
) -> None:
    """A stage that nobody closes is charged nothing of what comes after, and is forgotten."""
    with recording.request():
        left = stage("inference")
        left.__enter__()
        device.stream(0).launch(MS)
    clock.tick(60_000 * MS)
    settle(recording, times, clock)
    assert measured(times)["inference"][2] == 0
    assert times.sums()["missed"]["unclosed"] == 1
    left.__exit__(None, None, None)
    assert not times._open


def test_a_device_that_fails_is_left_alone(
    recording: Recording, device: Device, times: DeviceTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error of the device's nothing is asked of it any more; the server sees the error."""

    def fail() -> Stream:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(times._clock, "stream", fail)
    plain = stage.__enter__
    with recording.request(), stage("inference"):
        pass
    assert times.failure == "CUDA error: an illegal memory access was encountered"
    assert stage.__enter__ is not plain


def test_it_comes_once_where_a_device_is_in_use(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking does not begin to use a device; a second question finds the same."""
    torch = SimulatedTorch(device)
    device.initialized = False
    assert in_use(torch) is None
    assert possible(torch)
    device.initialized = True
    assert in_use(torch) == ("cuda", device)
    plain = stage.__enter__
    try:
        made = device_time("cuda", device)
        assert made is device_time("cuda", device)
        assert stage.__enter__ is not plain
    finally:
        device_times.end()
    assert stage.__enter__ is plain
    monkeypatch.setenv("STAGESCOPE_DEVICE_STAGES", "off")
    assert device_time("cuda", device) is None


def test_the_torch_at_hand_has_no_device() -> None:
    """A build for CPUs has none to use, and is told apart without asking a driver."""
    import torch

    assert in_use(torch) is None
    assert possible(torch) == bool(torch.version.cuda)


def test_which_stages_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable names stages, each with its sub-stages; `off` is none."""
    assert asked_stages() == ["inference"]
    monkeypatch.setenv("STAGESCOPE_DEVICE_STAGES", "inference, preprocess.h2d")
    assert asked_stages() == ["inference", "preprocess.h2d"]
    monkeypatch.setenv("STAGESCOPE_DEVICE_STAGES", "off")
    assert asked_stages() == []


def test_a_forked_child_takes_none(device: Device) -> None:
    """A device cannot be used after a fork: the child's stages are the plain ones again."""
    plain = stage.__enter__
    device_time("cuda", device)
    try:
        child = os.fork()
        if child == 0:
            clean = stage.__enter__ is plain and device_times._present is None
            os._exit(0 if clean else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        device_times.end()


STEPS = st.lists(
    st.tuples(st.sampled_from("oocclt"), st.integers(0, 3), st.integers(1, 50)), max_size=60
)


@given(steps=STEPS, seed=st.integers(0, 1000), late=st.integers(0, 200))
def test_device_times_are_a_partition(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, int, int]],
    seed: int,
    late: int,
) -> None:
    """Each stage has what `partition` gives it of its stream's time, whenever events are seen.

    Stages open and close in any order on four streams, two of them of another device; so the sum
    over all stages of a stream is the union of their times, and nothing is lost.
    """
    clock, random = HandClock(), Random(seed)
    device = Device(clock)
    device.seen_after_ns = lambda: random.randrange(late + 1) * 1000
    times = DeviceTime(TorchClock("cuda", device), ["inference"])
    recording = Recording(tmp_path_factory.mktemp("spool"), clock=clock)
    streams = [device.stream(number % 2, number // 2) for number in range(4)]
    spans: list[dict[int, tuple[str, int, int]]] = [{} for _ in streams]
    opened: list[tuple[int, int, int]] = []
    with recording.request() as timeline:

        def close(stream: int, index: int, code: int) -> None:
            name, start, _ = spans[stream][index]
            spans[stream][index] = name, start, max(streams[stream].free_ns, clock())
            times.closed(timeline, index, code)

        for index, (step, stream, amount) in enumerate(steps):
            if step == "o":
                code, name = random.choice(
                    [(INFERENCE, "inference"), (FORWARD, "inference.forward")]
                )
                spans[stream][index] = name, max(streams[stream].free_ns, clock()), 0
                with device.on(streams[stream]):
                    times.opened(timeline, index, code)
                opened.append((stream, index, code))
            elif step == "c" and opened:
                close(*opened.pop(random.randrange(len(opened))))
            elif step == "l":
                streams[stream].launch(amount * 1000)
            elif step == "t":
                clock.tick(amount * 1000)
        while opened:
            close(*opened.pop())
        expected: dict[tuple[int, str], int] = {}
        for stream, of_stream in enumerate(spans):
            intervals = [(start, end) for _, start, end in of_stream.values()]
            charged, _ = partition(intervals, 1 << 62)
            for (name, _, _), ns in zip(of_stream.values(), charged, strict=True):
                key = stream // 2, name
                expected[key] = expected.get(key, 0) + ns
        clock.tick(10**9)
        device.seen_after_ns = lambda: 0
        for number, stream_now in enumerate(streams):
            for extra in range(40):
                with device.on(stream_now):
                    place = 1000 + number * 100 + extra
                    times.opened(timeline, place, INFERENCE)
                    times.closed(timeline, place, INFERENCE)
        sums = times.sums()
        assert sums["pending"] == 0
        assert not times._open
        found = {
            (int(one["device"][-1]), one["stage"]): one["ns"]
            for one in sums["stages"]
            if one["ns"] or (int(one["device"][-1]), one["stage"]) in expected
        }
        for key, ns in expected.items():
            assert abs(found.get(key, 0) - ns) <= len(steps) + ns * 1e-6
        assert all(one["opened"] == one["timed"] for one in sums["stages"])
    recording.close()


def test_stages_in_one_thread_do_not_spoil_captures_in_another(
    recording: Recording, device: Device, times: DeviceTime
) -> None:
    """No event is put or asked between a capture's begin and its end, however the threads meet.

    The stand-in raises where one is, and then device times would have stepped aside.
    """
    stop = threading.Event()
    device.pause = lambda: time.sleep(0.0001)

    def serve() -> None:
        while not stop.is_set():
            with recording.request(), stage("inference"):
                pass

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        graph = device.CUDAGraph()
        graph.capture_begin()
        time.sleep(0.0005)
        graph.capture_end()
    stop.set()
    for thread in threads:
        thread.join()
    assert times.sums()["missed"]["capture"]
    assert not times.failure


def test_more_streams_than_are_timed_are_counted(
    recording: Recording, device: Device, times: DeviceTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server with a new stream for each request has the first ones timed, and says so."""
    monkeypatch.setattr(device_times, "MAX_LANES", 3)
    for number in range(10):
        with device.on(device.stream(number)), recording.request(), stage("inference"):
            pass
    sums = times.sums()
    assert sums["missed"]["full"] == 7
    assert sums["untold"] == {"inference": 7}
    assert measured(times)["inference"][0] == 3
