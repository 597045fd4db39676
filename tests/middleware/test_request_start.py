"""The stamp of a proxy: its forms, and what is not believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.middleware.request_start import LONGEST_NS, waited_ns

NOW = 1_700_000_000_250_000_000


@pytest.mark.parametrize(
    ("stamp", "waited"),
    [
        (b"t=1700000000.000", 250_000_000),
        (b"1700000000.249999", 1_000),
        (b"1700000000", 250_000_000),
        (b"1700000000000", 250_000_000),
        (b"t=1700000000249999", 1_000),
        (b"1700000000249999999", 1),
        (b" t=1700000000.2 ", 50_000_000),
    ],
)
def test_the_common_forms(stamp: bytes, waited: int) -> None:
    """Seconds, ms, µs and ns are told apart by their size, to the nanosecond."""
    assert waited_ns(stamp, NOW) == waited


@pytest.mark.parametrize(
    "stamp",
    [
        b"", b"t=", b"now", b"-5", b"1e9", b"nan", b"17000000\xff\xff", b"1700000000.", b"1.2.3",
        b"1700000001", b"1600000000", b"1699999989", b"5", b"9" * 33, b"t=t=1700000000", "१७००००००००".encode(),
    ],
)  # fmt: skip
def test_what_is_not_believed(stamp: bytes) -> None:
    """Malformed, in the future, too long ago, or no time at all: no wait, and no error."""
    assert waited_ns(stamp, NOW) == 0


@given(st.binary(max_size=40))
def test_no_bytes_do_harm(stamp: bytes) -> None:
    """Whatever a client sends, the wait is within its bounds."""
    assert 0 <= waited_ns(stamp, NOW) <= LONGEST_NS
