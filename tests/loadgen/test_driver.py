"""The driver against real servers on loopback: what is kept of each request, good or bad."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from stagescope.errors import StagescopeError
from stagescope.identity import parse_run, parse_traceparent
from stagescope.loadgen.arrivals import Schedule, schedule
from stagescope.loadgen.driver import GRACE_S, Driver
from stagescope.loadgen.progress import Progress, Watch
from stagescope.loadgen.session import drive
from stagescope.loadgen.target import Target, target
from tests.support.http_server import OK, Exchange, ScriptedServer, ok

STAMPS = (
    "intended_ns",
    "started_ns",
    "connected_ns",
    "sent_ns",
    "first_byte_ns",
    "last_byte_ns",
)


def load(aim: Target, plan: Schedule, *, timeout_s: float = 10.0) -> Driver:
    """Drive *plan* against *aim* to its end."""
    driver = Driver(aim, plan, "run-1", timeout_s=timeout_s)
    drive(driver, aim, plan.end_ns / 1e9)
    return driver


def rows(driver: Driver) -> list[dict[str, Any]]:
    """Return the driver's rows in the order of the plan."""
    found = [
        dict(zip(chunk, values, strict=True))
        for chunk in driver.log.chunks(7)
        for values in zip(*chunk.values(), strict=True)
    ]
    return sorted(found, key=lambda row: row["seq"])


def one(script: Callable[[Exchange], Any], **options: Any) -> dict[str, Any]:
    """Send one request to a server that answers by *script*, and give its row."""
    with ScriptedServer(script) as server:
        (row,) = rows(load(target(server.url), schedule("constant", 1, 1, 0, 0), **options))
    return row


def test_intended_times_are_the_plan_and_stamps_are_in_order() -> None:
    """Each request of the plan has a row; intended is the plan's, and time runs forward."""
    plan = schedule("poisson", 200, 1, 0.2, 3)
    with ScriptedServer() as server:
        driver = load(target(server.url), plan)
    found = rows(driver)
    zero = driver.started_ns
    assert [row["intended_ns"] - zero for row in found] == list(plan.offsets_ns)
    for row in found:
        assert all(row[a] <= row[b] for a, b in pairwise(STAMPS)), row
        assert row["dns_ns"] == 0
        assert (row["status"], row["response_bytes"], row["error"]) == (200, 2, "")
        assert row["reused"] == (row["tcp_ns"] == 0)
        warm = row["intended_ns"] - zero < plan.measure_from_ns
        assert row["phase"] == ("warmup" if warm else "measure")
    assert driver.measured_s == pytest.approx(1.0)
    assert not driver.faults


def test_connections_are_kept_alive() -> None:
    """Requests that do not overlap share one connection."""
    with ScriptedServer() as server:
        found = rows(load(target(server.url), schedule("constant", 20, 0.5, 0, 0)))
    assert [row["reused"] for row in found] == [False] + [True] * 9


def test_a_name_is_resolved_and_timed() -> None:
    """Where the host is a name, the first connection's resolution has a figure inside connect."""
    with ScriptedServer() as server:
        aim = target(server.url.replace("127.0.0.1", "localhost"))
        (row,) = rows(load(aim, schedule("constant", 1, 1, 0, 0)))
    assert row["error"] == ""
    assert 0 < row["dns_ns"] + row["tcp_ns"] <= row["connected_ns"] - row["started_ns"]
    assert row["dns_ns"] > 0


def test_every_request_carries_its_own_trace_and_the_run() -> None:
    """Trace ids are unique and reach the server unchanged, with the run and the user's baggage."""
    aim_headers = ("baggage: team=a", "X-Own: 1")
    with ScriptedServer() as server:
        aim = target(server.url, headers=aim_headers, json_text='{"a": 1}')
        found = rows(load(aim, schedule("constant", 100, 0.5, 0, 0)))
        seen = list(server.requests)
    sent = {(row["trace_id"], row["span_id"]) for row in found}
    came = set[tuple[str, str]]()
    for request in seen:
        parent = parse_traceparent(request.header("traceparent").encode())
        assert parent is not None
        trace_id, span_id, sampled = parent
        assert sampled
        came.add((trace_id.hex(), span_id.hex()))
        assert request.header("baggage") == "stagescope.run=run-1,team=a"
        assert parse_run(request.header("baggage").encode()) == b"run-1"
        assert request.header("x-own") == "1"
        assert request.header("content-type") == "application/json"
        assert request.body == b'{"a": 1}'
    assert came == sent
    assert len({trace for trace, _ in sent}) == len(found) == 50
    assert {row["request_bytes"] for row in found} == {8}


def test_two_runs_of_one_seed_share_arrivals_but_no_trace() -> None:
    """The seed is for the arrivals; ids are the system's."""
    plan = schedule("poisson", 50, 0.2, 0, 1)
    with ScriptedServer() as server:
        first, second = (rows(load(target(server.url), plan)) for _ in range(2))
    assert not {row["trace_id"] for row in first} & {row["trace_id"] for row in second}


def test_a_stall_is_met_by_the_requests_that_the_plan_held() -> None:
    """No coordinated omission: what was due during a stall was sent then and waited its rest."""
    over = asyncio.Event()

    async def stall(exchange: Exchange) -> None:
        if exchange.number == 50:
            over.set()
        if exchange.number >= 10:
            await over.wait()
        await exchange.reply(OK)

    with ScriptedServer(stall) as server:
        found = rows(load(target(server.url), schedule("constant", 100, 1, 0, 0)))
    # A driver that waits for answers never sends the fiftieth. A few may arrive out of turn.
    over_ns = sorted(row["sent_ns"] for row in found)[50]
    held = [row for row in found if row["sent_ns"] <= over_ns <= row["last_byte_ns"]]
    assert len(held) >= 35
    assert all(row["intended_ns"] <= row["sent_ns"] for row in held)


def test_first_byte_is_the_heads_and_last_byte_the_bodys() -> None:
    """A body that comes 0.2 s after its head leaves 0.2 s between the two stamps."""

    async def slow_body(exchange: Exchange) -> None:
        await exchange.reply(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        await asyncio.sleep(0.2)
        await exchange.reply(b"3\r\nabc\r\n0\r\n\r\n")

    row = one(slow_body)
    assert row["last_byte_ns"] - row["first_byte_ns"] > 150_000_000
    assert row["response_bytes"] == 3


def test_an_informational_response_is_not_the_first_byte() -> None:
    """103 Early Hints come before the head that counts."""

    async def hints(exchange: Exchange) -> None:
        await exchange.reply(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n")
        await asyncio.sleep(0.2)
        await exchange.reply(OK)

    row = one(hints)
    assert row["status"] == 200
    assert row["first_byte_ns"] - row["sent_ns"] > 150_000_000


def test_a_redirect_is_an_answer() -> None:
    """It is not followed: its status is the row's."""

    async def redirect(exchange: Exchange) -> None:
        await exchange.reply(b"HTTP/1.1 302 Found\r\nlocation: /x\r\ncontent-length: 0\r\n\r\n")

    row = one(redirect)
    assert (row["status"], row["error"]) == (302, "")


def test_server_timing_is_kept() -> None:
    """Several headers are one list, as HTTP says."""

    async def timing(exchange: Exchange) -> None:
        await exchange.reply(
            b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n"
            b"Server-Timing: queue;dur=1\r\nserver-timing: total;dur=2\r\n\r\n"
        )

    assert one(timing)["server_timing"] == "queue;dur=1, total;dur=2"


async def _reset(exchange: Exchange) -> None:
    exchange.reset()


async def _hang(exchange: Exchange) -> None:
    await asyncio.sleep(60)


async def _close(exchange: Exchange) -> None:
    exchange.close()


async def _half_a_body(exchange: Exchange) -> None:
    await exchange.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
    exchange.close()


async def _half_a_chunk(exchange: Exchange) -> None:
    await exchange.reply(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab")
    exchange.close()


async def _no_http(exchange: Exchange) -> None:
    await exchange.reply(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")


@pytest.mark.parametrize(
    ("script", "word", "status"),
    [
        (_reset, "reset", 0),
        (_close, "closed", 0),
        (_half_a_body, "incomplete", 200),
        (_half_a_chunk, "incomplete", 200),
        (_no_http, "protocol", 0),
    ],
)
def test_a_failure_is_a_row_with_its_word(
    script: Callable[[Exchange], Any], word: str, status: int
) -> None:
    """Errors are data: the word, the status if one came, and the moment of the failure."""
    row = one(script)
    assert (row["error"], row["status"]) == (word, status)
    assert row["last_byte_ns"] >= row["sent_ns"] >= row["connected_ns"] >= row["started_ns"]
    assert (row["first_byte_ns"] is None) == (status == 0)


def test_a_hanging_server_is_a_timeout_after_the_timeout() -> None:
    """The request failed when its time was up."""
    row = one(_hang, timeout_s=0.3)
    assert row["error"] == "timeout"
    assert row["last_byte_ns"] - row["started_ns"] >= 290_000_000


def test_one_planned_is_one_sent() -> None:
    """A server that drops a kept-alive connection sees no request twice."""

    async def close_every_second(exchange: Exchange) -> None:
        if exchange.number % 2:
            exchange.close()
        else:
            await exchange.reply(OK)

    with ScriptedServer(close_every_second) as server:
        found = rows(load(target(server.url), schedule("constant", 50, 0.4, 0, 0)))
        traces = [request.header("traceparent") for request in server.requests]
    assert len(traces) == len(set(traces)) == len(found)
    assert {row["error"] for row in found} == {"", "closed"}


def test_a_server_that_refuses_to_begin_with_ends_the_run_at_once() -> None:
    """One sentence, before anything is sent."""
    with ScriptedServer() as server:
        url = server.url
    with pytest.raises(StagescopeError, match=r"nothing answers at .*: connection refused"):
        load(target(url), schedule("constant", 1, 1, 0, 0))


def test_a_server_that_goes_away_midway_is_data() -> None:
    """From then on each request is refused, and the run goes on to its end."""

    async def five_then_leave(exchange: Exchange) -> None:
        await exchange.reply(OK)
        if exchange.number == 4:
            server.refuse()

    with ScriptedServer(five_then_leave) as server:
        found = rows(load(target(server.url), schedule("constant", 50, 0.6, 0, 0)))
    assert [row["error"] for row in found[:5]] == [""] * 5
    assert found[-1]["error"] == "refused"
    assert len(found) == 30
    refused = found[-1]
    assert refused["connected_ns"] == refused["sent_ns"] == refused["last_byte_ns"]


def test_stop_keeps_what_there_is() -> None:
    """An ended run has a row for each request taken up, those in flight as `interrupted`."""
    plan = schedule("constant", 50, 30, 0, 0)
    aim_server = ScriptedServer(_ok_but_the_last)
    with aim_server as server:
        aim = target(server.url)
        driver = Driver(aim, plan, "run-1", timeout_s=30)

        def look(now: Progress) -> None:
            if now.sent > 20:
                driver.stop()

        drive(driver, aim, 30, Watch(look, 0.05))
    found = rows(driver)
    assert driver.interrupted
    assert len(found) == driver.started
    assert {row["error"] for row in found} == {"", "interrupted"}
    assert 0 < driver.measured_s < 10


def test_a_second_stop_does_not_wait() -> None:
    """What is in flight when the run is ended twice is over then, not after the grace."""
    aim_plan = schedule("constant", 50, 30, 0, 0)
    with ScriptedServer(_hang) as server:
        aim = target(server.url)
        driver = Driver(aim, aim_plan, "run-1", timeout_s=30)

        def look(now: Progress) -> None:
            if now.sent > 10:
                driver.stop()
                driver.stop()

        drive(driver, aim, 30, Watch(look, 0.05))
    ends = [row["last_byte_ns"] for row in rows(driver)]
    assert len(ends) == driver.started
    assert max(ends) - driver.stopped_ns < GRACE_S * 1e9


async def _ok_but_the_last(exchange: Exchange) -> None:
    if exchange.number % 10 == 9:
        await asyncio.sleep(60)
    await ok(exchange)


def test_it_runs_on_a_thread_of_its_own() -> None:
    """Away from the main thread there are no signals to take; the run is the same."""
    drivers: list[Driver] = []
    with ScriptedServer() as server:
        aim = target(server.url)
        plan = schedule("constant", 20, 0.2, 0, 0)
        thread = threading.Thread(target=lambda: drivers.append(load(aim, plan)))
        thread.start()
        thread.join(20)
    assert len(drivers[0].log) == 4
