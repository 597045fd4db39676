"""`python -m stagescope.examples.litserve_server`: serve the classifier.

Needs `pip install litserve torch`.
"""

from __future__ import annotations

import litserve

from stagescope.examples.command_line import address
from stagescope.examples.litserve_server.api import Classifier


def main(host: str, port: int) -> None:
    """Serve on loopback, in batches of up to eight."""
    api = Classifier(max_batch_size=8, batch_timeout=0.01)
    litserve.LitServer(api, accelerator="auto", timeout=30).run(
        host=host, port=port, num_api_servers=1, generate_client_file=False
    )


if __name__ == "__main__":
    main(*address("Serve the LitServe classifier of api.py, in batches of up to eight.", 8000))
