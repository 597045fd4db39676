"""What goes wrong again and again is logged once."""

from __future__ import annotations

import logging
from typing import Final

MOST: Final = 1000
"""Different things that are logged; further ones are not."""

_log = logging.getLogger("stagescope")


class LogOnce:
    """Logs a sentence the first time that it comes."""

    def __init__(self, prefix: str = "", level: int = logging.WARNING) -> None:
        self._prefix = prefix
        self._level = level
        self._logged: set[str] = set()

    def __call__(self, sentence: str, about: str = "") -> None:
        """Log *sentence*, unless one *about* the same was logged before."""
        if self.is_first(about or sentence):
            _log.log(self._level, "%s%s", self._prefix, sentence)

    def is_first(self, about: str) -> bool:
        """Return whether nothing was logged *about* this yet; from now on something was."""
        if about in self._logged or len(self._logged) >= MOST:
            return False
        self._logged.add(about)
        return True

    def forget(self, about: str) -> None:
        """Log it again when it comes again."""
        self._logged.discard(about)
