"""`python -m stagescope.examples.torchserve_server`: archive the handler and serve it.

Needs `pip install torchserve==0.12.0 torch-model-archiver pyyaml numpy torch`, and Java 17.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from stagescope.examples.command_line import address

HANDLER = Path(__file__).with_name("handler.py")
SCRIPTS = Path(sys.executable).parent
BATCHES = {"batchSize": 8, "maxBatchDelay": 5, "minWorkers": 1, "maxWorkers": 1}


def main(host: str, port: int) -> None:
    """Take the place of this process by TorchServe, on loopback."""
    store = Path(tempfile.mkdtemp(prefix="torchserve-"))
    archiver = [str(SCRIPTS / "torch-model-archiver"), "--model-name", "classifier"]
    options = ["--version", "1.0", "--handler", str(HANDLER)]
    subprocess.run([*archiver, *options, "--export-path", str(store)], check=True)
    config = store / "config.properties"
    config.write_text(properties(host, port))
    # The front end starts its workers as `python`.
    os.environ["PATH"] = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    os.environ.setdefault("LOG_LOCATION", str(store / "logs"))
    os.environ.setdefault("METRICS_LOCATION", str(store / "logs"))
    print(f"archive, configuration and logs: {store}")
    print(f"curl -d 'what a lovely day' http://{host}:{port}/predictions/classifier", flush=True)
    torchserve = str(SCRIPTS / "torchserve")
    os.execv(torchserve, [
        torchserve, "--foreground", "--start", "--no-config-snapshots", "--disable-token-auth",
        "--ts-config", str(config), "--model-store", str(store),
    ])  # fmt: skip


def properties(host: str, port: int) -> str:
    """Return TorchServe's configuration; management and metrics take the two ports after *port*."""
    model = {"marName": "classifier.mar", **BATCHES, "responseTimeout": 60}
    return "\n".join(
        (
            f"inference_address=http://{host}:{port}",
            f"management_address=http://{host}:{port + 1}",
            f"metrics_address=http://{host}:{port + 2}",
            "load_models=classifier.mar",
            f"models={json.dumps({'classifier': {'1.0': model}})}",
        )
    )


if __name__ == "__main__":
    main(
        *address(
            "Archive the handler of handler.py and serve it by TorchServe; management and metrics take the next two ports.",
            8080,
        )
    )
