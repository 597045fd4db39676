"""The driver's buffers as stretches of time, whatever the driver gives."""

from itertools import pairwise
from types import ModuleType, SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from stagescope.agent.gpu.nvml_calls import Calls
from stagescope.agent.gpu.nvml_counters import GPU, GRAIN_NS, LONGEST_NS, Buffer
from stagescope.agent.gpu.nvml_readings import Moment
from stagescope.agent.log_once import LogOnce
from stagescope.samples import Sample

BOOT_US = 1_700_000_000_000_000
"""When the monotonic clock of these tests began."""

Stamped = tuple[int, int]
"""When, in µs since 1970, and percent."""


def read(polls: list[list[Stamped]], steps_us: list[int]) -> list[Sample]:
    """Read a buffer to which each poll has added; the wall clock steps before each."""
    held: list[Stamped] = []
    driver = ModuleType("pynvml")

    def samples(handle: object, kind: int, since_us: int) -> tuple[int, list[SimpleNamespace]]:
        return 1, [
            SimpleNamespace(timeStamp=stamp, sampleValue=SimpleNamespace(uiVal=value))
            for stamp, value in held
            if stamp > since_us
        ]

    vars(driver)["nvmlDeviceGetSamples"] = samples
    buffer = Buffer(Calls(driver, LogOnce("gpu: ")), object(), "GPU-1", GPU)
    found: list[Sample] = []
    now_us = BOOT_US
    for news, step_us in zip(polls, steps_us, strict=False):
        held += news
        now_us = max([now_us, *(stamp for stamp, _ in news)])
        found += buffer.read(Moment((now_us - BOOT_US) * 1000, (now_us + step_us) * 1000))
    return found


@st.composite
def polls_of_readings(draw: st.DrawFn) -> list[list[Stamped]]:
    """Make some polls, each with what the driver measured since the one before."""
    gaps = st.tuples(st.integers(1_000, 3_000_000), st.integers(0, 100))
    stamp, polls = BOOT_US, []
    for news in draw(st.lists(st.lists(gaps, max_size=8), min_size=1, max_size=6)):
        poll = []
        for gap, value in news:
            stamp += gap
            poll.append((stamp, value))
        polls.append(poll)
    return polls


@given(polls_of_readings())
def test_stretches_hold_what_the_driver_measured(polls: list[list[Stamped]]) -> None:
    """Nothing overlaps, each reading counts for its time, and a gap that is too long is left out."""
    samples = read(polls, [0] * len(polls))
    readings = [one for poll in polls for one in poll]
    first = next((poll[-1] for poll in polls if poll), None)
    told = readings[readings.index(first) :] if first else []
    lasted = [min((b - a) * 1000, LONGEST_NS) for (a, _), (b, _) in pairwise(told)]
    area = sum(ns * value / 100 for ns, (_, value) in zip(lasted, told[1:], strict=True))
    assert sum(one.end_ns - one.start_ns for one in samples) == sum(lasted)
    measured = sum((one.end_ns - one.start_ns) * one.value for one in samples)
    assert abs(measured - area) <= 1e-6 * max(1.0, area)
    for before, after in pairwise(samples):
        assert before.start_ns < before.end_ns <= after.start_ns
    assert len(samples) <= sum(lasted) / GRAIN_NS + 2 * len(polls) + len(lasted)


@given(polls_of_readings(), st.data())
def test_a_wall_clock_that_is_set_disorders_nothing(
    polls: list[list[Stamped]], data: st.DataObject
) -> None:
    """The driver's stamps are the wall clock's: where that jumps, stretches still do not overlap."""
    steps = st.integers(-5_000_000, 5_000_000)
    samples = read(polls, data.draw(st.lists(steps, min_size=len(polls), max_size=len(polls))))
    for before, after in pairwise(samples):
        assert before.end_ns <= after.start_ns < after.end_ns
