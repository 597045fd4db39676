"""The doctor's screen: a line a check, what to do below it, colour only on a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from stagescope.agent.doctor.examine import Examination, Line
from stagescope.agent.doctor.finding import MEASURABLE, NO, OK, WARN

GREEN, YELLOW, RED, BOLD, DIM = "32", "33", "31", "1", "2"
COLOURS: Final = {OK: GREEN, WARN: YELLOW, NO: RED}
SIGNS: Final = {OK: "✓", WARN: "!", NO: "✗"}
PLAIN_SIGNS: Final = {OK: "+", WARN: "!", NO: "x"}
NAME_WIDTH: Final = 10
INDENT: Final = 4 + NAME_WIDTH
NARROWEST, WIDEST = 60, 100


@dataclass(frozen=True, slots=True)
class Screen:
    """How wide, with colour or not, with which signs."""

    width: int = 80
    colour: bool = False
    signs: Mapping[str, str] = field(default_factory=lambda: SIGNS)

    @classmethod
    def of_stdout(cls) -> Screen:
        """Fit standard output: no colour when it is piped, signs that its encoding has."""
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        width = min(max(shutil.get_terminal_size((80, 24)).columns, NARROWEST), WIDEST)
        unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        return cls(width, colour, SIGNS if unicode else PLAIN_SIGNS)

    def render(self, found: Examination) -> str:
        """Give all of it as text."""
        return "\n".join(self._lines(found))

    def _lines(self, found: Examination) -> Iterator[str]:
        about = f" of pid {found.around.pid}" if found.around.pid else ""
        yield self._paint(f"What can be measured here{about}", BOLD)
        yield "  " + "   ".join(self._measurable(found, what) for what in MEASURABLE)
        group = ""
        for line in found.lines:
            if line.group != group:
                group = line.group
                yield ""
                yield self._paint(group, BOLD)
            yield from self._line(line)

    def _measurable(self, found: Examination, what: str) -> str:
        status = OK if found.possible(what) else NO
        return f"{self._sign(status)} {what}"

    def _line(self, line: Line) -> Iterator[str]:
        first, *others = self._wrapped(line.finding.told) or [""]
        yield f"  {self._sign(line.finding.status)} {line.name:<{NAME_WIDTH}}{first}"
        yield from (" " * INDENT + rest for rest in others)
        for number, do in enumerate(line.finding.do):
            # In one piece, however long: it is there to be copied.
            yield " " * INDENT + self._paint(f"{'or' if number else 'do'}: {do}", DIM)

    def _wrapped(self, text: str) -> list[str]:
        return textwrap.wrap(
            text, self.width - INDENT, break_long_words=False, break_on_hyphens=False
        )

    def _sign(self, status: str) -> str:
        return self._paint(self.signs[status], COLOURS[status])

    def _paint(self, text: str, colour: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour else text
