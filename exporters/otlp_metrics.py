"""Sends metrics by OTLP now and then, from a thread of its own; nothing ever waits for it."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from opentelemetry.sdk.metrics.export import MetricsData
from opentelemetry.sdk.resources import OTELResourceDetector

from stagescope.exporters import attributes as names
from stagescope.exporters.metric_exporter import metric_outlet_from_environment
from stagescope.exporters.metric_points import HISTOGRAMS, MetricsBuilder, Moment
from stagescope.exporters.otlp_environment import whole
from stagescope.exporters.outlets import Outlet
from stagescope.exporters.prometheus import StageMetrics
from stagescope.exporters.quiet import suppressed_instrumentation, taken_log_records
from stagescope.exporters.sample_series import Shown
from stagescope.records import Record

INTERVAL_VARIABLE: Final = "OTEL_METRIC_EXPORT_INTERVAL"
INTERVAL_MS: Final = 60_000

_log = logging.getLogger(__name__)


def otlp_metrics_from_environment(
    metrics: StageMetrics, shown: Callable[[], Shown], environ: Mapping[str, str] = os.environ
) -> OtlpMetrics | None:
    """Give the sink that the standard `OTEL_*` variables ask for; None where they ask for none.

    Raises UsageError, which names the variable, for a value that cannot be used.
    """
    interval_s = whole(environ, INTERVAL_VARIABLE, INTERVAL_MS) / 1000
    outlet = metric_outlet_from_environment(environ)
    return OtlpMetrics(outlet, metrics, shown, interval_s) if outlet else None


class OtlpMetrics:
    """A sink that takes no records: it sends what *metrics* counted and the samples *shown*.

    Each sending is of everything as it stands then; one that fails costs its points, counted,
    and the next one says more. Nothing is kept to be sent again.
    """

    def __init__(
        self,
        outlet: Outlet[MetricsData],
        metrics: StageMetrics,
        shown: Callable[[], Shown],
        interval_s: float,
    ) -> None:
        self.accepted = 0
        self._outlet = outlet
        self._metrics = metrics
        self._shown = shown
        self._interval_s = interval_s
        self._since_wall_ns = time.time_ns()
        asked = OTELResourceDetector().detect().attributes.items()
        self._resource = {names.HOST_NAME: socket.gethostname()} | {
            key: str(value) for key, value in asked
        }
        self._counts = {"sent_points": 0, "unsent_points": 0, "failed_exports": 0}
        self._closing = threading.Event()
        self._failing = False
        self._thread = threading.Thread(
            target=self._run, name="stagescope-otlp-metrics", daemon=True
        )
        self._thread.start()

    @property
    def settled(self) -> int:
        """All that was accepted: nothing waits here."""
        return self.accepted

    def accept(self, records: Sequence[Record]) -> None:
        """Note that there were *records*: they are counted elsewhere, and sent as metrics."""
        self.accepted += len(records)

    def counters(self) -> dict[str, int]:
        """Give points sent and not sent, and sendings that failed; all of them only grow.

        Not by the name of a loss: no record of a load run is missing for these.
        """
        return dict(self._counts)

    def close(self, timeout_s: float) -> None:
        """Send once more, for at most *timeout_s*, and end the thread."""
        if self._closing.is_set():
            return
        grace_s = min(0.5, timeout_s / 2)
        self._closing.set()
        self._thread.join(timeout_s - grace_s)
        self._outlet.abort()
        self._thread.join(grace_s)

    def _run(self) -> None:
        with taken_log_records() as said, suppressed_instrumentation():
            while not self._closing.wait(self._interval_s):
                self._send(said)
            if not self._failing:
                self._send(said)

    def _send(self, said: deque[str]) -> None:
        said.clear()
        sent, points = False, 0
        try:
            gathered = self._gather()
            points = gathered.points
            sent = not points or self._outlet.send(gathered.data())
        except Exception as problem:  # noqa: BLE001 the guard: a library may raise anything
            said.append(f"{type(problem).__name__}: {problem}")
        self._counts["sent_points" if sent else "unsent_points"] += points
        self._counts["failed_exports"] += not sent
        self._tell(sent, said)

    def _gather(self) -> MetricsBuilder:
        moment = Moment(time.time_ns(), time.monotonic_ns(), self._since_wall_ns)
        builder = MetricsBuilder(moment, self._resource)
        for named in HISTOGRAMS:
            builder.add_histograms(named, self._metrics.snapshot(named.name))
        builder.add_series(self._shown().series)
        return builder

    def _tell(self, sent: bool, said: deque[str]) -> None:
        """Say once that the back end fails, and once that it is back."""
        if sent and self._failing:
            _log.warning("%s takes metrics again", self._outlet.name)
        elif not sent and not self._failing and not self._closing.is_set():
            reason = (said[-1] if said else "no reason given").rstrip(".")
            _log.warning(
                "metrics cannot be sent to %s: %s; they are dropped and counted until it takes "
                "them (OTEL_METRICS_EXPORTER=none sends none)",
                self._outlet.name,
                reason,
            )
        self._failing = not sent
