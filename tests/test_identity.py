"""Trace context and baggage: what is valid is read, what is not counts as absent, nothing raises."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.identity import (
    MAX_BAGGAGE_BYTES,
    RUN_ID,
    format_run,
    format_traceparent,
    parse_run,
    parse_traceparent,
)

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
VALID = re.compile(
    rb"(?!ff)(?!00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}"
    rb"-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.+)?",
    re.DOTALL,
)
"""The specification, as a pattern."""


@given(st.binary(min_size=16, max_size=16), st.binary(min_size=8, max_size=8), st.booleans())
def test_what_is_formatted_is_parsed(trace: bytes, span: bytes, sampled: bool) -> None:
    """Ids and flag come back as they went; all-zero ids are no ids."""
    value = format_traceparent(trace.hex(), span.hex(), sampled=sampled).encode()
    expected = (trace, span, sampled) if any(trace) and any(span) else None

    assert parse_traceparent(value) == expected


@given(
    st.one_of(
        st.binary(max_size=70),
        st.text("0123456789abcdefABF-", min_size=50, max_size=60).map(str.encode),
        st.from_regex(
            rb"(00|01|cc|ff)-[0-9a-f]{31}[0-9a-fA-F]-[0-9a-f]{16}[-0]0[0-3g](-[a-z]*|[0-9])?",
            fullmatch=True,
        ),
    )
)
def test_the_parser_agrees_with_the_specification(value: bytes) -> None:
    """Whatever bytes come, exactly those that the specification calls valid are taken."""
    assert (parse_traceparent(value) is not None) == bool(VALID.fullmatch(value))


@pytest.mark.parametrize(
    "value",
    [
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN.upper()}-01",
        f"00-{TRACE}-{SPAN}-0A",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01-extra",
        f"00-{TRACE}-{SPAN}-01-",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-001",
        f"00-{TRACE[:-1]}g-{SPAN}-01",
        f" 00-{TRACE}-{SPAN}-01",
        f"00_{TRACE}_{SPAN}_01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01" + "x" * 1_000_000,
        "-" * 55,
        "",
    ],
)
def test_a_malformed_traceparent_is_none(value: str) -> None:
    """Upper case, wrong lengths, other separators, zero ids and version ff are refused."""
    assert parse_traceparent(value.encode()) is None


def test_a_later_version_may_say_more() -> None:
    """Fields behind a dash are passed over for versions after 00."""
    ids = (bytes.fromhex(TRACE), bytes.fromhex(SPAN))

    assert parse_traceparent(f"01-{TRACE}-{SPAN}-03-what-ever".encode()) == (*ids, True)
    assert parse_traceparent(f"cc-{TRACE}-{SPAN}-02".encode()) == (*ids, False)


@given(st.from_regex(RUN_ID, fullmatch=True), st.booleans())
def test_a_run_comes_through_baggage(run: str, among_others: bool) -> None:
    """The run's id is found alone and among members with spaces and properties."""
    member = format_run(run)
    value = f"a=b , {member};ttl=1 , c=d" if among_others else member

    assert parse_run(value.encode()) == run.encode()


@given(st.binary(max_size=300))
def test_baggage_never_raises(value: bytes) -> None:
    """Whatever bytes come, the result is empty or a run id."""
    for each in (value, b"stagescope.run=" + value):
        found = parse_run(each)
        assert found == b"" or RUN_ID.fullmatch(found.decode())


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"stagescope.run",
        b"stagescope.run=",
        b"stagescope.run=../../etc/passwd",
        b"stagescope.run=a b",
        b"stagescope.run=" + b"a" * 41,
        b"stagescope.run=\xff",
        b"xstagescope.run=a",
        b"STAGESCOPE.RUN=a",
        b"other=stagescope.run=a",
        b"stagescope.run=a," + b"x" * MAX_BAGGAGE_BYTES,
    ],
)
def test_what_is_no_run_is_empty(value: bytes) -> None:
    """Ids that could leave a folder, over-long ones and over-long baggage are refused."""
    assert parse_run(value) == b""


def test_the_first_of_several_runs_counts() -> None:
    """A duplicate member does not replace the first."""
    assert parse_run(b"stagescope.run=a,stagescope.run=b") == b"a"
