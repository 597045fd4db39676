"""Placeholder: being written."""

import argparse

HELP = "being written"


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    """Add nothing yet."""


def run(args: argparse.Namespace) -> int:
    """Do nothing yet."""
    raise SystemExit(2)
