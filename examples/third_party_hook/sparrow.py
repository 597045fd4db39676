"""A made-up model library, so that the hook beside it has something to recognise."""

from __future__ import annotations

import time

__version__ = "1.4.0"


class Model:
    """Takes 10 ms for the words and 20 ms for the answer."""

    def tokenize(self, text: str) -> list[str]:
        """Cut *text* into words."""
        time.sleep(0.01)
        return text.split()

    def answer(self, text: str) -> str:
        """Return the last word."""
        words = self.tokenize(text)
        time.sleep(0.02)
        return words[-1]
