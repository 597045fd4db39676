"""`python -m stagescope.examples.bentoml_server [PORT]`: serve both services.

Needs `pip install bentoml numpy`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main(port: int) -> None:
    """Take the place of this process by `bentoml serve`, on loopback."""
    os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
    os.chdir(Path(__file__).parent)
    serve = ["bentoml", "serve", "service:Classifier", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", *serve])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3000)
