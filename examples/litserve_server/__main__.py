"""`python -m stagescope.examples.litserve_server [PORT]`: serve the classifier.

Needs `pip install litserve torch`.
"""

from __future__ import annotations

import sys

import litserve

from stagescope.examples.litserve_server.api import Classifier


def main(port: int) -> None:
    """Serve on loopback, in batches of up to eight."""
    api = Classifier(max_batch_size=8, batch_timeout=0.01)
    litserve.LitServer(api, accelerator="auto", timeout=30).run(
        host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
