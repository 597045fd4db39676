"""Captures as stalls: the requests that overlap one are told to be profiled."""

from __future__ import annotations

from pathlib import Path

from stagescope.middleware.runtime.pauses import write_stall
from stagescope.middleware.stage import stage
from stagescope.records import RequestRecord
from stagescope.testing.clock import HandClock
from stagescope.testing.recording import Recording

LATEST_NS = 1_000_000_000


def serve(recording: Recording, clock: HandClock, spend_ns: int = 100) -> RequestRecord:
    """Serve one request of *spend_ns* in `inference`; give what an agent reads at once."""
    with recording.request(), stage("inference"):
        clock.now_ns += spend_ns
    (*_, record) = recording.requests
    return record


def test_requests_are_profiled_from_the_start_of_a_capture_to_its_end(tmp_path: Path) -> None:
    """Also those that are read before the capture has ended; none before it and none after."""
    clock = HandClock()
    recording = Recording(tmp_path, clock=clock)
    before = serve(recording, clock)
    clock.now_ns += 10
    started_ns = clock.now_ns
    write_stall(recording.recorder, b"capture", started_ns, started_ns + LATEST_NS)
    meanwhile = serve(recording, clock)
    clock.now_ns += 10
    write_stall(recording.recorder, b"capture", started_ns, clock.now_ns)
    clock.now_ns += 10
    after = serve(recording, clock)
    recording.close()

    assert [record.profiled for record in (before, meanwhile, after)] == [False, True, False]
    (stall,) = meanwhile.stalls
    assert (stall.stage, stall.cause, stall.stall_ns) == ("inference", "capture", 100)


def test_one_that_reads_late_sees_the_end_alone(tmp_path: Path) -> None:
    """Read after all is over, a request that began after the capture is not profiled."""
    clock = HandClock()
    recording = Recording(tmp_path, clock=clock)
    started_ns = clock.now_ns
    write_stall(recording.recorder, b"capture", started_ns, started_ns + LATEST_NS)
    clock.now_ns += 50
    write_stall(recording.recorder, b"capture", started_ns, clock.now_ns)
    with recording.request(), stage("inference"):
        clock.now_ns += 100
    (record,) = recording.requests
    recording.close()

    assert not record.profiled


def test_many_other_stalls_do_not_hide_a_capture(tmp_path: Path) -> None:
    """Where the loop and the collector stall hundreds of times meanwhile, it is still known."""
    clock = HandClock()
    recording = Recording(tmp_path, clock=clock, ring_slots=512)
    write_stall(recording.recorder, b"capture", clock.now_ns, clock.now_ns + LATEST_NS)
    for _ in range(400):
        write_stall(recording.recorder, b"gc", clock.now_ns, clock.now_ns + 1)
        clock.now_ns += 1
    record = serve(recording, clock)
    recording.close()

    assert record.profiled
