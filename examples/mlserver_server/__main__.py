"""`python -m stagescope.examples.mlserver_server`: serve until Ctrl-C.

Needs `pip install mlserver uvloop==0.21.0`.
"""

from __future__ import annotations

import json
import socket
import tempfile
from pathlib import Path

from mlserver.cli.main import root

from stagescope.examples.command_line import address

MODEL = {
    "name": "doubler",
    "implementation": "stagescope.examples.mlserver_server.model.Doubler",
    "max_batch_size": 8,
    "max_batch_time": 0.01,
}


def main(host: str, port: int) -> None:
    """Serve on loopback: REST on *port*, MLServer's gRPC and metrics on ports that are free."""
    with tempfile.TemporaryDirectory(prefix="mlserver-") as folder:
        settings = {
            "host": host,
            "http_port": port,
            "grpc_port": _free_port(),
            "metrics_port": _free_port(),
            "parallel_workers": 1,
        }
        Path(folder, "settings.json").write_text(json.dumps(settings))
        Path(folder, "model-settings.json").write_text(json.dumps(MODEL))
        root(["start", folder])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


if __name__ == "__main__":
    main(
        *address(
            "Serve the MLServer model of model.py; REST at the port, gRPC and metrics at free ones.",
            8080,
        )
    )
