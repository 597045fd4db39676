"""The command line: one file a command, each with `HELP`, `prepare_parser` and `run`."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol, cast

from stagescope.errors import EXIT_FAILED, StagescopeError
from stagescope.identity import own_version

COMMANDS = (
    "demo",
    "run",
    "agent",
    "load",
    "runs",
    "report",
    "whatif",
    "capture",
    "stacks",
    "doctor",
)


class Command(Protocol):
    """What a command's file offers; heavy imports belong inside `run`."""

    HELP: str
    """One line for the list of commands; the module's docstring is the long text."""

    def prepare_parser(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Do it and return the exit code; a StagescopeError carries its own."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors meant for people are printed here, once, as one sentence."""
    _make_output_safe()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        print(f"stagescope: output cannot be written: {problem.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere
        return EXIT_FAILED


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except StagescopeError as error:
        print(f"stagescope {args.command}: {error}", file=sys.stderr)
        return error.exit_code


class _Output(io.FileIO):
    """Standard output or error; what is written after its reader has left (`| head`) is dropped.

    So a command ends as it would have, with its own exit code, and a load run goes on.
    """

    def write(self, data: Any, /) -> int:
        """Write *data*, or drop it."""
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def _make_output_safe() -> None:
    """Print a character that the terminal lacks as `?`, and nothing to a stream that is closed."""
    # Where one of the three is closed, the next file would be opened in its place.
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    sys.stdin = sys.stdin or open(0)  # noqa: SIM115 - for the rest of the process
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not None and stream is not getattr(sys, f"__{name}__"):
            continue  # a caller in this process has put its own there
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                io.BufferedWriter(_Output(fd, "wb", closefd=False)),
                encoding=stream.encoding if stream else "utf-8",
                errors="replace",
                line_buffering=stream is None or stream.line_buffering,
            ),
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stagescope",
        description="Where did this request's time go, stage by stage, "
        "and what is holding the server back?",
    )
    parser.add_argument("--version", action="version", version=f"stagescope {own_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = cast(Command, importlib.import_module(f"{__name__}.{name}"))
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.prepare_parser(sub)
        sub.set_defaults(run=module.run)
    return parser
