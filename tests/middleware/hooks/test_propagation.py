"""What reaches an instrumented app, and what it calls on with, is as without our one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.middleware.hooks.propagation_server import CALLER, FORMS, STATE, TRACES

OURS = FORMS[1:]


def told(mode: str, spool: Path, app_spans: str, **environment: str) -> dict[str, Any]:
    """Run the server in a process of its own and give what it tells, by form."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "propagation_server.py"), mode, str(spool)],
        capture_output=True, text=True, timeout=100, check=False,
        env=os.environ
        | {"STAGESCOPE_APP_SPANS": app_spans, "STAGESCOPE_AGENT": "off", "STAGESCOPE_RAISE": "1"}
        | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("app_spans", ["1", "auto"])
def test_the_callers_tracestate_goes_on(app_spans: str, tmp_path: Path) -> None:
    """Calls of the app carry the caller's trace, its sampled flag and its `tracestate`."""
    forms = told("w3c", tmp_path, app_spans)

    for form in FORMS:
        for trace_id, flags, calls in zip(
            TRACES, ("01", "00"), forms[form]["answers"], strict=True
        ):
            for headers in calls:
                assert headers["traceparent"].startswith(f"00-{trace_id}-"), form
                assert headers["traceparent"].endswith(f"-{flags}"), form
                assert headers["tracestate"] == STATE, form
        assert {trace_id for trace_id, _ in forms[form]["spans"]} == {TRACES[0]}
    for form in OURS:
        assert [one["trace"] for one in forms[form]["records"]] == list(TRACES)
        assert [one["sampled"] for one in forms[form]["records"]] == [True, False]


@pytest.mark.parametrize("app_spans", ["1", "auto"])
def test_a_caller_that_speaks_b3_keeps_its_trace(app_spans: str, tmp_path: Path) -> None:
    """The app's spans, what it sends on and our records are all in the caller's trace."""
    forms = told("b3", tmp_path, app_spans, OTEL_PROPAGATORS="b3multi")

    for form in FORMS:
        for trace_id, sampled, calls in zip(
            TRACES, ("1", "0"), forms[form]["answers"], strict=True
        ):
            for headers in calls:
                assert (headers["x-b3-traceid"], headers["x-b3-sampled"]) == (trace_id, sampled)
        assert {trace_id for trace_id, _ in forms[form]["spans"]} == {TRACES[0]}, form
    for form in OURS:
        assert [one["trace"] for one in forms[form]["records"]] == list(TRACES)
    assert [one["parent"] for one in forms["around"]["records"]] == [CALLER] * 2


@pytest.mark.parametrize("mode", ["by path", "by route"])
def test_a_drop_rule_of_the_apps_sampler_goes_on_working(mode: str, tmp_path: Path) -> None:
    """The same spans as without us, none of /health; what it cannot be told stops no record."""
    forms = told(mode, tmp_path, "1")

    bare = [name for _, name in forms["bare"]["spans"]]
    assert bare
    assert not [name for name in bare if "health" in name]
    for form in OURS:
        if mode == "by path" or form == "add_middleware":  # Around the app no route is known yet.
            assert [name for _, name in forms[form]["spans"]] == bare, form
        assert [one["path"] for one in forms[form]["records"]] == ["/health", "/", "/health"]


@pytest.mark.parametrize("app_spans", ["1", "auto"])
def test_requests_of_one_connection_keep_their_own_traces(app_spans: str, tmp_path: Path) -> None:
    """asyncio hands the first one's context on, after a large body and where both came at once."""
    forms = told("one connection", tmp_path, app_spans)

    assert len(forms["around"]) == len(forms["add_middleware"]) == 4
    for *records, last in forms["around"]:
        assert [one["trace"] for one in records] == list(TRACES)
        assert [one["parent"] for one in records] == [CALLER] * 2
        assert not any(one["internal"] for one in [*records, last])
        assert last["trace"] not in TRACES
    for *records, _ in forms[
        "add_middleware"
    ]:  # The instrumentation itself is misled where it can.
        assert [one["trace"] for one in records] == list(TRACES)
