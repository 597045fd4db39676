"""Which series of samples are metrics, and for how long."""

from __future__ import annotations

import pytest

from stagescope.exporters import sample_series
from stagescope.exporters.sample_series import GONE_NS, MAX_SERIES, STALE_NS, Series, shown
from stagescope.samples import AMOUNT, LEVEL, SampleName
from tests.support.evidence import sample

NOW_NS = 10_000 * 10**9
HEIGHT = SampleName("test.height", "By", LEVEL, "A level.")
AMOUNT_OF = SampleName("test.time", "s", AMOUNT, "An amount.", detail="test.mode")


@pytest.fixture(autouse=True)
def _names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of our own, whatever the samplers' are."""
    named = {one.name: one for one in (HEIGHT, AMOUNT_OF)}
    monkeypatch.setattr(sample_series, "_NAMED", named)


def names_after(age_ns: int, *, pid: int) -> list[str]:
    """Return what is shown of a level and an amount whose last samples are so old."""
    end = NOW_NS - age_ns
    latest = [
        (sample(name=name, pid=pid, start_ns=end - 1, end_ns=end), 7.0)
        for name in ("test.height", "test.time")
    ]
    return [one.named.name for one in shown(latest, {11: "api"}, NOW_NS).series]


def test_a_process_that_has_gone_is_shown_for_a_minute() -> None:
    """Its counters and its gauges go together."""
    assert names_after(GONE_NS, pid=12) == ["test.height", "test.time"]
    assert names_after(GONE_NS + 1, pid=12) == []


@pytest.mark.parametrize("pid", [0, 11])
def test_what_lives_keeps_its_counters(pid: int) -> None:
    """A counter that nothing was added to does not change; a level that nobody reads is not known."""
    assert names_after(STALE_NS, pid=pid) == ["test.height", "test.time"]
    assert names_after(STALE_NS + 1, pid=pid) == ["test.time"]


def test_values_and_what_tells_them_apart() -> None:
    """A gauge is the newest level, a counter the total; services come by pid."""
    fresh = {"start_ns": NOW_NS, "end_ns": NOW_NS}
    latest = [
        (sample(name="test.height", value=3.0, pid=11, detail="", **fresh), 99.0),
        (sample(name="test.time", value=3.0, device="GPU-1", detail="user", **fresh), 99.0),
    ]
    level, amount = shown(latest, {11: "api"}, NOW_NS).series

    assert (level.service, level.value, level.attributes()) == ("api", 3.0, {"process.pid": 11})
    assert (amount.service, amount.value) == ("", 99.0)
    assert amount.attributes() == {"hw.id": "GPU-1", "test.mode": "user"}


def test_series_without_end_are_bounded_and_counted() -> None:
    """The first ones stay; the rest, and names that nobody published, are counted."""
    latest = [
        (sample(name="test.time", detail=str(number), start_ns=NOW_NS, end_ns=NOW_NS), 1.0)
        for number in range(MAX_SERIES + 5)
    ]
    unknown = (sample(name="test.unknown", start_ns=NOW_NS, end_ns=NOW_NS), 1.0)
    found = shown([unknown, *latest], {}, NOW_NS)

    assert [one.newest.detail for one in found.series] == [str(n) for n in range(MAX_SERIES)]
    assert found.left_out == 6
    assert isinstance(found.series[0], Series)
