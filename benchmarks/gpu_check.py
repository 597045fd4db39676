"""All that only a real GPU can tell, in one go: at most nine minutes, one JSON file.

    python benchmarks/gpu_check.py                      every section
    python benchmarks/gpu_check.py --only device,nvml
    python benchmarks/gpu_check.py --dry                what would run here; needs no GPU

It needs an NVIDIA GPU, torch 2.11 or newer, and no network. Each section is a process of its own
with a limit; one that fails, or for which a module is missing, leaves its reason in the file and
the others run. The file is written anew after each section, so what was measured is never lost.

exit code: 0 every section that could run did; 1 one failed, or there is no GPU; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final

from gpu_check_sections import HEADLINES, MACHINE, QUESTIONS, SECTIONS, Section, planted

SOURCE: Final = Path(__file__).resolve().parent.parent / "src"
ALL_S: Final = 540.0
LEAST_S: Final = 10.0
"""With less left of the whole time a section is not begun."""
GRACE_S: Final = 3.0
ERROR_LINES: Final = 30

DONE, FAILED, LEFT_OUT = "done", "failed", "left out"


@dataclass(slots=True)
class Outcome:
    """What became of a section."""

    state: str
    why: str = ""
    took_s: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    """By part."""
    errors: dict[str, str] = field(default_factory=dict)
    """By part, the end of what Python said."""
    parts_s: dict[str, float] = field(default_factory=dict)
    log: str = ""
    """The end of what the process wrote, where it failed."""

    def told(self) -> dict[str, Any]:
        """Return what there is to tell."""
        return {
            name: value
            for name in self.__slots__
            if (value := getattr(self, name)) or name == "state"
        }


def measured_here(section: Section, out: Path) -> int:
    """Measure the parts of *section* in this process; write *out* anew after each."""
    told: dict[str, Any] = {"figures": {}, "errors": {}, "parts_s": {}, "under_way": ""}
    for name, part in section.load().items():
        told["under_way"] = name
        _write(out, told)
        begun = time.monotonic()
        try:
            told["figures"][name] = part()
        except Exception:  # noqa: BLE001 - one part's failure is reported, the others are measured
            told["errors"][name] = _tail(traceback.format_exc())
        told["parts_s"][name] = round(time.monotonic() - begun, 2)
    told["under_way"] = ""
    _write(out, told)
    return 1 if told["errors"] else 0


def measured_apart(section: Section, words: Sequence[str], limit_s: float) -> Outcome:
    """Measure *section* in a process of its own, which is ended after *limit_s*."""
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as folder:
        out, log = Path(folder) / "told.json", Path(folder) / "log.txt"
        begun = time.monotonic()
        code = _run(
            [sys.executable, __file__, *words, "--section", section.name, "--out", str(out)],
            Path(folder), log, limit_s,
        )  # fmt: skip
        outcome = _outcome(code, limit_s, out, log)
        outcome.took_s = round(time.monotonic() - begun, 1)
    return outcome


def _run(command: list[str], folder: Path, log: Path, limit_s: float) -> int | None:
    """Return the exit code; None where it was over the limit."""
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(folder)},
            start_new_session=True,  # so that its own children can be ended with it
        )  # fmt: skip
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process, and those that it started and left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(code: int | None, limit_s: float, out: Path, log: Path) -> Outcome:
    told: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    under_way = told.pop("under_way", "")
    outcome = Outcome(DONE, **told)
    if code is None:
        outcome.state, outcome.why = FAILED, f"over its limit of {limit_s:.0f} s, and ended"
    elif outcome.errors:
        outcome.state, outcome.why = FAILED, f"failed: {', '.join(outcome.errors)}"
    elif code:
        outcome.state, outcome.why = FAILED, f"its process ended with {code}"
    if outcome.state == FAILED:
        outcome.why += f", in {under_way}" if under_way else ""
        outcome.log = _tail(log.read_text("utf-8", "replace"))
    return outcome


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-ERROR_LINES:])


def _write(path: Path, told: object) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(told, indent=2, default=str) + "\n")
    new.replace(path)


class Check:
    """One run of all sections, and the file that holds what they gave."""

    def __init__(self, out: Path, machine: dict[str, Any], last: float) -> None:
        """*last*: when the time of all is over, by the monotonic clock in seconds."""
        self._out = out
        self._last = last
        self._machine = machine
        self._date = datetime.now(UTC).isoformat(timespec="seconds")
        self.outcomes: dict[str, Outcome] = {}

    def measure(self, section: Section, words: Sequence[str]) -> Outcome:
        """Measure one section, if it can be."""
        left_s = self._last - time.monotonic()
        if missing := section.missing():
            outcome = Outcome(LEFT_OUT, _are_missing(missing))
        elif left_s < LEAST_S:
            outcome = Outcome(FAILED, "not begun: the time of all sections is over")
        else:
            outcome = measured_apart(section, words, min(section.limit_s, left_s))
        self.outcomes[section.name] = outcome
        self.write()
        return outcome

    def write(self) -> None:
        """Write what there is."""
        _write(self._out, {
            "date": self._date,
            "machine": self._machine,
            "questions": [self._answer(question) for question in QUESTIONS],
            "sections": {name: outcome.told() for name, outcome in self.outcomes.items()},
        })  # fmt: skip

    def _answer(self, question: Any) -> dict[str, Any]:
        told = {"number": question.number, "asked": question.asked}
        if question.why_not:
            return told | {"not_measured": question.why_not}
        measured = {path: self.figure(path) is not None for path in question.answered_by}
        return told | {"measured": measured, "look_at": question.look_at}

    def figure(self, path: str) -> Any:
        """Return what stands at `section/part/key/...`; None where nothing does."""
        name, *keys = path.split("/")
        found: Any = self.outcomes[name].figures if name in self.outcomes else None
        for key in keys:
            try:
                found = found[int(key)] if isinstance(found, list) else found[key]
            except (KeyError, IndexError, TypeError):
                return None
        return found


def _are_missing(names: Sequence[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not installed here"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; give the exit code."""
    args = _parser().parse_args(arguments)
    words = ["--sections", str(args.sections.resolve())] if args.sections else []
    known = planted(args.sections) if args.sections else SECTIONS
    if args.section:
        by_name = {section.name: section for section in (*known, MACHINE)}
        return measured_here(by_name[args.section], args.out)
    sections = _chosen(known, args.only)
    if args.list or args.dry:
        _print_sections(sections, dry=args.dry)
        return 0
    with _ended_in_order():
        return _check(sections, args.out, args.limit_s, words)


def _check(sections: Sequence[Section], out: Path, limit_s: float, words: Sequence[str]) -> int:
    last = time.monotonic() + limit_s
    machine = measured_apart(MACHINE, (), MACHINE.limit_s)
    facts = machine.figures.get("facts", {"why_no_gpu": machine.why + "\n" + machine.log})
    if facts["why_no_gpu"] and any(section.gpu for section in sections):
        print(f"gpu_check: {facts['why_no_gpu']}, so there is nothing to measure", file=sys.stderr)
        return 1
    check = Check(out, facts, last)
    print(_of(facts), file=sys.stderr)
    for section in sections:
        outcome = check.measure(section, words)
        print(_line(section.name, outcome), file=sys.stderr, flush=True)
    for label, path in HEADLINES:
        if (value := check.figure(path)) is not None:
            print(f"  {label:44} {_plain(value)}", file=sys.stderr)
    print(f"written: {out}", file=sys.stderr)
    return 1 if any(one.state == FAILED for one in check.outcomes.values()) else 0


def _of(facts: dict[str, Any]) -> str:
    words = (
        facts.get("device", "no GPU"), facts["driver"] and f"driver {facts['driver']}",
        facts.get("cuda") and f"CUDA {facts['cuda']}",
        facts.get("torch") and f"torch {facts['torch']}", f"Python {facts['python']}",
        f"{facts['cores']} cores",
    )  # fmt: skip
    return ", ".join(word for word in words if word)


def _line(name: str, outcome: Outcome) -> str:
    parts = len(outcome.figures)
    of = parts + len(outcome.errors)
    return (f"{name:10} {outcome.state:9} {outcome.took_s:6.1f} s  {parts} of {of} parts"
            f"{'; ' if outcome.why else ''}{outcome.why}")  # fmt: skip


def _plain(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _print_sections(sections: Sequence[Section], *, dry: bool) -> None:
    for section in sections:
        missing = section.missing() if dry else []
        said = f"left out: {_are_missing(missing)}" if missing else "would run" if dry else ""
        print(f"{section.name:10} at most {section.limit_s:3.0f} s  {said}".rstrip())
    for question in QUESTIONS:
        if question.why_not:
            print(f"not measured: {question.asked}: {question.why_not}")


def _chosen(known: Sequence[Section], only: str) -> Sequence[Section]:
    wanted = [name for name in only.split(",") if name]
    by_name = {section.name: section for section in known}
    if unknown := [name for name in wanted if name not in by_name]:
        print(f"gpu_check: there is no section {', '.join(unknown)}; there are "
              f"{', '.join(by_name)}", file=sys.stderr)  # fmt: skip
        sys.exit(2)
    return [by_name[name] for name in wanted] or known


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Make SIGTERM and Ctrl-C an exit, so that the section under way is ended with us."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(1)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE",
                        default=Path(os.environ.get("OUT", ".")) / "gpu_check.json",
                        help="default: gpu_check.json, in $OUT where that is set")  # fmt: skip
    parser.add_argument("--only", default="", metavar="A,B", help="these sections alone")
    parser.add_argument("--list", action="store_true", help="name the sections and end")
    parser.add_argument("--dry", action="store_true", help="say what would run here and end")
    parser.add_argument("--limit-s", type=float, default=ALL_S, metavar="S",
                        help=f"of all sections together ({ALL_S:.0f})")  # fmt: skip
    parser.add_argument("--sections", type=Path, metavar="FILE",
                        help="other sections than ours, in JSON: to try this script")  # fmt: skip
    parser.add_argument("--section", help=argparse.SUPPRESS)  # what a child of ours measures
    return parser


if __name__ == "__main__":
    sys.exit(main())
