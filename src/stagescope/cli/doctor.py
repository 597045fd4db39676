"""Say what can be measured here, and for what cannot, the exact grant or package that is missing.

Looks at the spool, its agent and served processes, host figures, Python stacks, GPU and kernels,
and where the figures go. Every line is tried, not guessed, and all of it takes three seconds.
Nothing is changed; a recording server does not notice.

examples:
  stagescope doctor                          what can be measured on this machine
  stagescope doctor --pid 4711               of this server: may its stacks be read, can it capture
  stagescope doctor --need spans,stacks      in a start script: exit code 1 where one is not possible
  stagescope doctor --format json | jq '.measurable'

exit code: 0; 1 where something that --need names is not possible, or PID is not here; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stagescope.agent.doctor.examine import Examination, Line
from stagescope.agent.doctor.finding import MEASURABLE, NO, OK, WARN
from stagescope.errors import EXIT_DONE, EXIT_FAILED, UsageError

if TYPE_CHECKING:
    from stagescope.agent.doctor.examine import Examination


HELP = "say what can be measured here, and what is missing for the rest"
FORMATS = ("text", "json")


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--spool", type=Path, metavar="DIR",
        help="folder of the recorder files (default: STAGESCOPE_SPOOL, else one per user)",
    )  # fmt: skip
    parser.add_argument(
        "--pid", type=int, default=0, metavar="PID", help="the process that it is about"
    )
    parser.add_argument(
        "--need", default="", metavar="WHAT",
        help="spans, host, stacks, kernels, gpu, with commas between: exit code 1 where one of "
        "these cannot be measured",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=FORMATS, default="text", help="text for people, json for machines"
    )
    parser.add_argument(
        "--proc", type=Path, default=Path("/proc"), metavar="DIR",
        help="read this instead of /proc: a host's, mounted into a container",
    )  # fmt: skip
    parser.add_argument(
        "--sys", type=Path, default=Path("/sys"), metavar="DIR", help="the same for /sys"
    )


def run(args: argparse.Namespace) -> int:
    """Look at everything and print it."""
    from stagescope.agent.doctor.environment import look_around
    from stagescope.agent.doctor.examine import examine

    needed = parse_needed(args.need)
    around = look_around(args.spool, args.pid, proc=args.proc, sys=args.sys)
    found = examine(around)
    lacking = [what for what in needed if not found.possible(what)]
    if args.format == "json":
        print(json.dumps({**found.to_json(), "needed": needed, "not_possible": lacking}, indent=2))
    else:
        _print(found, lacking)
    return EXIT_FAILED if lacking else EXIT_DONE


def parse_needed(text: str) -> list[str]:
    """Return what is needed; raises UsageError for what cannot be measured anywhere."""
    from stagescope.agent.doctor.finding import MEASURABLE

    needed = [word.strip() for word in text.split(",") if word.strip()]
    for word in needed:
        if word not in MEASURABLE:
            raise UsageError(f"--need {word}: there is {', '.join(MEASURABLE)}")
    return needed


def _print(found: Examination, lacking: list[str]) -> None:

    screen = Screen.of_stdout()
    print(screen.render(found))
    if lacking:
        print(f"\nneeded and not possible here: {', '.join(lacking)}")


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
        """Return all of it as text."""
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
