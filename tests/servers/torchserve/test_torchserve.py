"""A real TorchServe: each request by its own trace, with its own stages and its own waiting."""

from __future__ import annotations

import json
import os
import signal
import secrets
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

import pytest

from stagescope.records import RequestRecord, State
from stagescope.testing import wait_until

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

EXPECTED_MS = {"preprocess": 30, "inference": 60, "postprocess": 20}
SLACK_MS = 25


def headers(name: str = "traceparent", run: str = "") -> tuple[str, dict[str, str]]:
    """Make a trace; give its id and its headers."""
    trace = secrets.token_hex(16)
    given = {name: f"00-{trace}-{secrets.token_hex(8)}-01"}
    return trace, given | ({"baggage": f"stagescope.run={run}"} if run else {})


def ms(record: RequestRecord) -> dict[str, float]:
    """Give milliseconds by full stage name."""
    return {name: spent / 1e6 for name, spent in record.self_ns().items()}


def test_served(torchserve) -> None:
    torchserve.wait_ready()
    traces = [headers("Traceparent" if i % 2 else "traceparent", run="r1" if i % 3 == 0 else "") for i in range(13)]
    with ThreadPoolExecutor(13) as pool:
        answers = list(pool.map(lambda i: torchserve.ask(f"w{i}", traces[i][1]), range(13)))
    for a in answers: print(a)
    found = wait_until(lambda: (r := torchserve.requests()) and len(r) >= 13 and r, timeout_s=15)
    for t, _ in traces:
        r = found[t]
        print(t, r.status, r.duration_ns/1e6, ms(r), r.batch_ids, r.seq, r.state)
    for b in torchserve.batches():
        print(b)
    assert 0
