"""`python -m stagescope.examples.bentoml_server`: serve both services.

Needs `pip install bentoml numpy`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from stagescope.examples.command_line import address


def main(host: str, port: int) -> None:
    """Take the place of this process by `bentoml serve`, on loopback."""
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    os.chdir(Path(__file__).parent)
    serve = ["bentoml", "serve", "service:Classifier", "--host", host, "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", *serve])


if __name__ == "__main__":
    main(*address("Serve the two BentoML services of service.py.", 3000))
