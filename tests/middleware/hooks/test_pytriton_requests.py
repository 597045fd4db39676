"""What the pytriton hook does without a Triton: which headers it has forwarded, what it reads."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from stagescope.middleware.hooks.pytriton import FORWARDED, Received, forwarding, headers_in
from stagescope.middleware.stage import stage
from stagescope.testing.recording import Recording

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, FORWARDED),
        ("", FORWARDED),
        ("x-.*", f"(x-.*)|{FORWARDED}"),
        ("traceparent", f"(traceparent)|{FORWARDED}"),
        (".*", ".*"),
        ("(?i)(traceparent|baggage|x-user)", "(?i)(traceparent|baggage|x-user)"),
    ],
)
def test_a_pattern_of_the_users_is_kept(given: str | None, told: str) -> None:
    """What the user has forwarded still is; what a trace needs is added where it is missing."""
    assert forwarding(given) == told


def test_headers_are_found_however_they_are_written() -> None:
    """Triton forwards names as the client wrote them; values that are no text are none."""
    assert headers_in({"Traceparent": "a", "BAGGAGE": "b", "x": "c", "priority": 1}) == {
        "traceparent": b"a",
        "baggage": b"b",
    }
    assert headers_in({"traceparent": 7}) == {}


def test_stages_of_a_batch_are_every_members(tmp_path: Path) -> None:
    """One function call serves two requests, one with a trace of its own: both get its stages."""
    with closing(Recording(tmp_path)) as recording:
        received = Received(recording.recorder, "double")
        received.read([{"traceparent": f"00-{TRACE}-00f067aa0ba902b7-00"}, None])
        with received.in_the_model(), stage("preprocess"):
            pass
        with received.serializing():
            pass
        received.finish()
        first, second = recording.requests
        (batch,) = recording.batches

    assert (first.trace_id, first.sampled) == (TRACE, False)
    assert second.sampled
    assert batch.size == 2
    for record in (first, second):
        assert [span.stage for span in record.stages] == [
            "preprocess.parse", "queue.batch", "batch.wait", "inference", "preprocess",
            "postprocess.serialize", "respond",
        ]  # fmt: skip
        assert record.batch_ids == (batch.batch_id,)
        assert not any(span.open for span in record.stages)
