"""The other end of child.py: polls the real probe in a process that loads the stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stagescope.agent.gpu.probe import Device, DeviceEvent, Tier
from stagescope.samples import Sample

ROOT = Path(__file__).parents[3]
SLOW_S = 0.1


class Polling:
    """A probe in another process."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self.no_gpu: str = (self._answer() or {}).get("no_gpu", "")
        """Why there is no probe; empty: there is one."""

    def poll(self, tier: Tier = "fast", times: int = 1) -> list[Sample]:
        """Poll *times*, and give what all of them gave."""
        return [Sample(**one) for _ in range(times) for one in self.ask("poll", tier)]

    def both(self, times: int = 1) -> list[Sample]:
        """Poll what is fast and what is slow."""
        return [one for _ in range(times) for one in self.poll("fast") + self.poll("slow")]

    def devices(self) -> list[Device]:
        """Return the devices."""
        return [Device(**one) for one in self.ask("devices")]

    def event(self) -> DeviceEvent:
        """Wait for the next event."""
        return DeviceEvent(**self.ask("event"))

    def ask(self, name: str, *arguments: object) -> Any:
        """Ask child.py."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def said(self) -> list[str]:
        """Return the lines that it logged."""
        return self._log.read_text().splitlines()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the process ended: {self._log.read_text()}"
        return json.loads(line)


@contextmanager
def polling(
    environment: Mapping[str, str], folder: Path, look_again_s: float = 60.0
) -> Generator[Polling]:
    """Start it with *environment*; it is ended with the block.

    A call is slow from `SLOW_S` on: the stand-in is not, however busy the machine.
    """
    log = folder / "log.txt"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.nvml.child", str(look_again_s), str(SLOW_S)],
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", **environment},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    with process:
        try:
            yield Polling(process, log)
        finally:
            process.kill()
