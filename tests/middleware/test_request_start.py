"""The stamp of a proxy: its forms, and what is not believed."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.request_start import LONGEST_NS, waited_ns
from stagescope.middleware.types import Message, Receive, Scope, Send
from stagescope.recorder import format as fmt

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


def test_forged_stamps_take_no_slot_for_ever() -> None:
    """Where the host has been up for a minute, and each stamp is from before that."""
    began_ns = time.monotonic_ns() - 60 * 10**9
    memory = memoryview(bytearray(fmt.file_bytes(fmt.IN_FLIGHT_SLOTS, 64)))
    recorder = Recorder(memory, ring_slots=64, clock=lambda: time.monotonic_ns() - began_ns)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        assert message["type"] in ("http.response.start", "http.response.body")

    async def ask() -> None:
        wrapped = StageMiddleware.around(app, recorder)
        for _ in range(fmt.IN_FLIGHT_SLOTS + 1):
            headers = [(b"x-request-start", b"t=%.3f" % (time.time() - 600))]
            await wrapped(
                {"type": "http", "method": "GET", "path": "/", "headers": headers}, receive, send
            )

    asyncio.run(ask())
    assert all(recorder.take_slot() for _ in range(fmt.IN_FLIGHT_SLOTS))
