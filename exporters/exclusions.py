"""Routes that are left out of traces, and of metrics where that is wished: probes, scrapes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from stagescope import settings
from stagescope.errors import UsageError
from stagescope.records import RequestRecord

OTEL_VARIABLE = "OTEL_PYTHON_EXCLUDED_URLS"


@dataclass(frozen=True, slots=True)
class Exclusions:
    """Which requests are left out."""

    pattern: re.Pattern[str] | None = None
    """Searched for in the path."""
    of_metrics: bool = False
    """Of metrics too."""

    def no_trace(self, record: RequestRecord) -> bool:
        """Return whether *record* has no trace; a load run's has one: somebody asked for it."""
        return bool(self.pattern and not record.run_id and self.pattern.search(record.path))

    def no_metric(self, record: RequestRecord) -> bool:
        """Return whether *record* is not counted."""
        return self.of_metrics and self.no_trace(record)


def exclusions_from_environment(environ: Mapping[str, str] = os.environ) -> Exclusions:
    """Return what our setting and OpenTelemetry's variable leave out.

    Raises UsageError, which names the variable, for what is no regular expression.
    """
    patterns: list[str] = []
    for variable in (settings.EXCLUDED_URLS.name, OTEL_VARIABLE):
        for pattern in environ.get(variable, "").split(","):
            if pattern := pattern.strip():
                try:
                    re.compile(pattern)
                except re.error as problem:
                    raise UsageError(
                        f"{variable}: {settings.printable(pattern)} is no regular expression: {problem}"
                    ) from None
                patterns.append(pattern)
    if not patterns:
        return Exclusions()
    return Exclusions(
        re.compile("|".join(f"(?:{pattern})" for pattern in patterns)),
        settings.EXCLUDED_FROM.choice(environ) == "metrics",
    )
