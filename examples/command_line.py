"""What the example servers share: `--host`, `--port`, `--help`."""

from __future__ import annotations

import argparse


def address(what: str, port: int = 8000) -> tuple[str, int]:
    """Return the host and port of the command line; *what* the server does is its help's text."""
    parser = argparse.ArgumentParser(
        description=what, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=port, help="port to listen at")
    asked = parser.parse_args()
    return asked.host, asked.port
