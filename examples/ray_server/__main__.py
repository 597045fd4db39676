"""`python -m stagescope.examples.ray_server [PORT]`: serve until Ctrl-C.

Needs `pip install "ray[serve]"`.
"""

from __future__ import annotations

import sys
import time

import ray
from ray import serve

from stagescope.examples.ray_server.deployments import application


def main(port: int) -> None:
    """Serve on loopback, on a small Ray cluster of this process's own."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(application)
        print(f"serving on http://127.0.0.1:{port}/predict; Ctrl-C ends it", flush=True)
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
