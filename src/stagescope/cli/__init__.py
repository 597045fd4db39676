"""The command line: one file a command, each with `HELP`, `prepare_parser` and `run`."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Protocol, cast

from stagescope.errors import EXIT_FAILED, StagescopeError

COMMANDS = ("demo", "run", "agent", "load", "report", "capture", "stacks", "doctor")


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
    args = _parser().parse_args(argv)
    try:
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except StagescopeError as error:
        print(f"stagescope {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output left (`| head`): not our failure, and nothing to say.
        sys.stderr.close()
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        print(f"stagescope {args.command}: output cannot be written: {problem.strerror}",
              file=sys.stderr)  # fmt: skip
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere
        return EXIT_FAILED


def _make_output_safe() -> None:
    """Print a character that the terminal lacks as `?`, and nothing where stdout is closed."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stagescope",
        description="Where did this request's time go, stage by stage, "
        "and what is holding the server back?",
    )
    parser.add_argument("--version", action="version", version=_version())
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


def _version() -> str:
    try:
        return f"stagescope {version('stagescope')}"
    except PackageNotFoundError:
        return "stagescope (from a source tree)"
