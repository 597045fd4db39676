"""The receiver that other tests lean on reads what real senders send."""

from __future__ import annotations

import gzip
import json
from urllib.request import Request, urlopen

from tests.support.otlp import OtlpReceiver

SENT = {
    "resourceSpans": [
        {
            "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "s"}}]},
            "scopeSpans": [
                {
                    "scope": {"name": "triton"},
                    "spans": [
                        {
                            "traceId": "5B8EFFF798038103D269B633813FC60C",
                            "spanId": "EEE19B7EC3C1B174",
                            "name": "infer",
                            "kind": 2,
                            "startTimeUnixNano": "1544712660000000000",
                            "endTimeUnixNano": "1544712661000000000",
                            "attributes": [
                                {"key": "n", "value": {"intValue": "3"}},
                                {
                                    "key": "l",
                                    "value": {"arrayValue": {"values": [{"boolValue": True}]}},
                                },
                            ],
                        }
                    ],
                }
            ],
        }
    ]
}


def test_json_is_read() -> None:
    """OTLP's JSON, with hex ids and gzip, as C++ senders write it, is read like protobuf."""
    with OtlpReceiver() as receiver:
        request = Request(
            f"{receiver.http_endpoint}/v1/traces",
            gzip.compress(json.dumps(SENT).encode()),
            {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        )
        with urlopen(request) as answer:
            assert answer.read() == b"{}"
        (span,) = receiver.spans

    assert (span.trace_id, span.span_id) == ("5b8efff798038103d269b633813fc60c", "eee19b7ec3c1b174")
    assert (span.name, span.kind, span.scope) == ("infer", "server", "triton")
    assert span.end_ns - span.start_ns == 1_000_000_000
    assert (span.resource, span.attributes) == ({"service.name": "s"}, {"n": 3, "l": [True]})
