"""Why the slowest 1 % are slow: what they have more of than the others, and five of them drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stagescope.analysis.verdict.evidence import Requests
from stagescope.analysis.verdict.model import Evidence, Tail, TailRequest
from stagescope.analysis.waits.requests import Served, Waits, segments

EXEMPLARS = 5
LEAST_TAIL = 1
MOST_SPANS = 12
LEAST_SHARE = 0.1
"""Of what the slowest take more than the others: less is no reason."""
LEAST_DRAWN = 0.005
"""Of a request's latency: what is shorter is not drawn."""
MORE_OFTEN = 2.0

Bools = npt.NDArray[np.bool_]
CAUSES = {"event_loop": "for the event loop", "gil": "for the interpreter's lock",
          "gc": "for garbage collections", "cpu": "for a core",
          "stopped": "for the stopped process"}  # fmt: skip


def tail(
    e: Evidence, requests: Requests, served: Sequence[Served], found: Mapping[str, Waits]
) -> Tail | None:
    """Return why the slowest are slow; None where there are too few requests to tell."""
    latency = requests.numbers("latency_ns") / 1e6
    many = len(latency) // 100
    if many < LEAST_TAIL:
        return None
    order = np.argsort(-latency, kind="stable")
    slow: Bools = np.zeros(len(latency), np.bool_)
    slow[order[:many]] = True
    by_key = {request.key: request for request in served}
    return Tail(
        requests=many,
        mean_ms=float(latency[slow].mean()),
        reasons=tuple(_reasons(e, requests, latency, slow)),
        exemplars=tuple(
            _exemplar(requests.row(int(index)), requests.row(0)["intended_ns"], by_key, found)
            for index in order[:EXEMPLARS]
        ),
    )


def _reasons(
    e: Evidence, requests: Requests, latency: npt.NDArray[np.float64], slow: Bools
) -> Iterator[str]:
    """Yield what the slowest have more of, times first, the largest first."""
    more_ms = float(latency[slow].mean() - latency[~slow].mean())
    count = len(latency)
    times: list[tuple[float, str]] = []
    for stage in e.stages:
        more = _more(stage.own_slowest_ms, stage.own_ms, count)
        times.append((more, f"{more:,.1f} ms more in `{stage.name}` itself"))
    for wait in e.waits:
        if wait.cause in CAUSES:
            more = _more(wait.slowest_ms, wait.mean_ms, count)
            held = f", which `{wait.holder}` of others held" if wait.holder else ""
            times.append((more, f"{more:,.1f} ms more waiting {CAUSES[wait.cause]}{held}"))
    for more, words in sorted(times, reverse=True):
        if more >= LEAST_SHARE * more_ms > 0:
            yield f"{words}, of {more_ms:,.1f} ms"
    yield from _marks(e, requests, slow)


def _more(slowest: float, mean: float, count: int) -> float:
    """Return by how much the slowest 1 % exceed the others, from their mean and that of all."""
    share = max(1, count // 100) / count
    return slowest - (mean - share * slowest) / (1 - share)


def _marks(e: Evidence, requests: Requests, slow: Bools) -> Iterator[str]:
    """Yield which worker, size or moment the slowest share."""
    workers = [worker or "" for worker in requests.values("ring_id")]
    if len(set(workers)) > 1:
        (worker, many), *_ = Counter(np.array(workers)[slow]).most_common(1)
        usual = workers.count(worker) / len(workers)
        if many / slow.sum() >= min(0.9, MORE_OFTEN * usual):
            yield f"{many} of {slow.sum()} were served by one worker, {worker[:8]}"
    if e.cold_requests and (early := int(slow[: e.cold_requests].sum())) >= slow.sum() / 2:
        yield f"{early} of {slow.sum()} are among the first {e.cold_requests:,} (cold)"
    for name, column in (("request", "request_bytes"), ("response", "response_bytes")):
        sizes = requests.numbers(column)
        if sizes[slow].mean() >= MORE_OFTEN * max(sizes[~slow].mean(), 1.0):
            yield (
                f"their {name}s have {sizes[slow].mean():,.0f} bytes on average, the others' "
                f"{sizes[~slow].mean():,.0f}"
            )


def _exemplar(
    row: Mapping[str, Any],
    first_ns: int,
    by_key: Mapping[str, Served],
    found: Mapping[str, Waits],
) -> TailRequest:
    key, intended = row["server_span_id"], row["intended_ns"]
    request = by_key.get(key)
    spans: list[tuple[str, float, float]] = []
    notes: list[str] = []
    if request is not None:
        for start, end, stage in segments(request):
            if spans and spans[-1][0] == stage:
                name, begun, _ = spans[-1]
                spans[-1] = (name, begun, (end - intended) / 1e6 - begun)
            else:
                spans.append((stage, (start - intended) / 1e6, (end - start) / 1e6))
        waits = found.get(key, Waits())
        sums: Counter[tuple[str, str]] = Counter()
        for (stage, cause), charge in waits.charges.items():
            sums[stage, cause] += charge.ns
        notes += [
            f"{stage} waited {spent / 1e6:,.1f} ms {CAUSES[cause]}"
            for (stage, cause), spent in sums.most_common(2)
            if spent >= 1_000_000
        ]
        notes.append(f"worker {request.process[:8]}")
    if row["batch_ids"]:
        notes.append(f"batch {row['batch_ids'][0]}")
    least_ms = LEAST_DRAWN * row["latency_ns"] / 1e6
    longest = sorted((span for span in spans if span[2] >= least_ms), key=lambda span: -span[2])
    return TailRequest(
        trace_id=row["client_trace_id"],
        latency_ms=row["latency_ns"] / 1e6,
        since_start_s=(intended - first_ns) / 1e9,
        spans=tuple(span for span in spans if span in longest[:MOST_SPANS]),
        notes=tuple(notes),
    )
