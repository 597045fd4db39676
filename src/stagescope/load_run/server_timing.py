"""The server's side from the `Server-Timing` response header, where there is no agent.

Format: https://www.w3.org/TR/server-timing/#the-server-timing-header-field, milliseconds.
The middleware sends one metric a stage and `total`, all until the response began; what came
after (most of `respond`) is not in it. Others' metrics are left alone, and nothing in a header
makes this raise: what cannot be read counts as absent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stagescope.runfolder.rows import row_without_record
from stagescope.stages import STAGES

TOTAL = "total"
_MS_NS = 1_000_000
_MAX_MS = 1e12


def parse_server_timing(header: str) -> dict[str, int]:
    """Return nanoseconds by name, for the six stages and `total`; the first of a name counts."""
    spent: dict[str, int] = {}
    for metric in _split(header, ","):
        name, *parameters = _split(metric, ";")
        name = name.strip()
        if name in spent or (name != TOTAL and name not in STAGES):
            continue
        duration_ns = _duration_ns(parameters)
        if duration_ns is not None:
            spent[name] = duration_ns
    return spent


def _split(text: str, mark: str) -> list[str]:
    """Split at *mark* outside quoted strings (RFC 9110, section 5.6.4)."""
    if '"' not in text:
        return text.split(mark)
    parts, begin, quoted, escaped = [], 0, False, False
    for at, char in enumerate(text):
        if escaped:
            escaped = False
        elif quoted and char == "\\":
            escaped = True
        elif char == '"':
            quoted = not quoted
        elif char == mark and not quoted:
            parts.append(text[begin:at])
            begin = at + 1
    return [*parts, text[begin:]]


def _duration_ns(parameters: Sequence[str]) -> int | None:
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip().lower() == "dur":
            try:
                duration_ms = float(value.strip().strip('"'))
            except ValueError:
                return None
            known = math.isfinite(duration_ms) and 0 <= duration_ms <= _MAX_MS
            return round(duration_ms * _MS_NS) if known else None
    return None


def server_rows(client: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield rows of the `server` table for those rows of *client* whose header holds a `total`.

    The header has no start: `start_ns` is 0 and `boot_id` empty, so clocks count as different
    and the network's share is not split. `other_ns` is the total less the stages, at least 0.
    """
    for row, header in enumerate(client["server_timing"]):
        spent = parse_server_timing(header) if header else {}
        if TOTAL in spent:
            yield _server_row({name: values[row] for name, values in client.items()}, spent)


def _server_row(client: Mapping[str, Any], spent: Mapping[str, int]) -> dict[str, Any]:
    total_ns = spent[TOTAL]
    return row_without_record(
        spent,
        max(total_ns, sum(spent.values()) - total_ns),
        trace_id=client["trace_id"],
        parent_span_id=client["span_id"],
        seq=client["seq"],
        status=client["status"],
        source="server-timing",
    )
