"""Who spans come from."""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry.sdk.resources import Resource


class KeptResource(Resource):
    """A resource whose hash is kept: the encoder asks for it at every span."""

    def __init__(self, attributes: Mapping[str, str | int]) -> None:
        super().__init__(attributes)
        self._kept_hash = super().__hash__()

    def __hash__(self) -> int:
        return self._kept_hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)
