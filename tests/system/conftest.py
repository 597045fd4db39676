"""A real Prometheus that scrapes one target."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stagescope.testing import wait_until

CONFIG = """
global: {{scrape_interval: 250ms, scrape_timeout: 250ms}}
scrape_configs:
  - job_name: stagescope
    static_configs: [{{targets: ["{target}"]}}]
"""

StartPrometheus = Callable[[str], str]
"""Takes the `host:port` to scrape, returns Prometheus's own URL."""


@pytest.fixture
def start_prometheus(tmp_path: Path) -> Iterator[StartPrometheus]:
    """Start a Prometheus, with exemplars; it is stopped at the end."""
    program = shutil.which("prometheus")
    assert program, "the program `prometheus` is missing: apt-get install -y prometheus"
    running: list[subprocess.Popen[bytes]] = []

    def start(target: str) -> str:
        (tmp_path / "prometheus.yml").write_text(CONFIG.format(target=target))
        log = tmp_path / "prometheus.log"
        with log.open("wb") as out:
            running.append(
                subprocess.Popen(
                    [
                        program,
                        f"--config.file={tmp_path}/prometheus.yml",
                        f"--storage.tsdb.path={tmp_path}/data",
                        "--web.listen-address=127.0.0.1:0",
                        "--enable-feature=exemplar-storage",
                    ],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )
        return wait_until(lambda: _listening(log), timeout_s=30)

    yield start
    for process in running:
        process.terminate()
        process.wait(timeout=30)


def _listening(log: Path) -> str:
    """Return the URL that the log names as listened on; empty until it does."""
    found = re.search(r'msg="?Listening on"? address=(127\.0\.0\.1:\d+)', log.read_text())
    return f"http://{found[1]}" if found else ""
