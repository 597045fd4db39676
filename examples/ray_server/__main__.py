"""`python -m stagescope.examples.ray_server`: serve until Ctrl-C.

Needs `pip install "ray[serve]"`.
"""

from __future__ import annotations

import time

import ray
from ray import serve

from stagescope.examples.command_line import address
from stagescope.examples.ray_server.deployments import application


def main(host: str, port: int) -> None:
    """Serve on loopback, on a small Ray cluster of this process's own."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(application)
        print(f"serving on http://{host}:{port}/predict; Ctrl-C ends it", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(
        *address(
            "Serve the Ray deployments of deployments.py, on a small cluster of this process.", 8000
        )
    )
