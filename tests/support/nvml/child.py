"""A process that reads the stand-in by the real probe, as it is told on its standard input.

One line of JSON a question (a list: its name, then its arguments), one line of JSON an answer.
It is a process of its own because a loader's path is set before the process begins.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from stagescope.agent.gpu.nvml import NvmlProbe
from stagescope.agent.gpu.probe import DeviceEvent, NoGpu, Tier


class Answers:
    """Answers questions about one probe."""

    def __init__(self, look_again_s: float, slow_s: float) -> None:
        self.counters_allowed = True
        self.served: set[int] = set()
        self.probe = NvmlProbe(
            lambda: self.served,
            lambda: self.counters_allowed,
            look_again_s=look_again_s,
            slow_s=slow_s,
        )
        self._events: Iterator[DeviceEvent] = iter(self.probe.events())

    def poll(self, tier: Tier) -> list[dict[str, Any]]:
        """Return what a poll gives."""
        return [asdict(sample) for sample in self.probe.poll(tier)]

    def devices(self) -> list[dict[str, Any]]:
        """Return the devices."""
        return [asdict(device) for device in self.probe.devices()]

    def event(self) -> dict[str, Any]:
        """Wait for the next event."""
        return asdict(next(self._events))

    def allow(self, allowed: bool) -> None:
        """Allow hardware counters, or not."""
        self.counters_allowed = allowed

    def serve(self, *pids: int) -> None:
        """Say which processes are served ones."""
        self.served = set(pids)

    def close(self) -> int:
        """End it, and give how many threads are left."""
        self.probe.stop()
        self._events = iter(())
        self.probe.close()
        return threading.active_count()


def main() -> None:
    """Answer until the input ends."""
    printed = logging.StreamHandler(sys.stderr)
    logging.getLogger("stagescope").addHandler(printed)
    try:
        answers = Answers(float(sys.argv[1]), float(sys.argv[2]))
    except NoGpu as why:
        print(json.dumps({"no_gpu": str(why)}), flush=True)
        return
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = getattr(answers, name)(*arguments)
        except NoGpu as why:
            answer = {"no_gpu": str(why)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
