"""A real model served over HTTP and loaded: `python benchmarks/gpu_served.py > figures.json`.

The example server (uvicorn), `stagescope agent` with all its samplers, `stagescope load` and
`stagescope report`, each a process of its own, as people have them; the second load run has a
`stagescope capture` in it. `--cpu` tries it where there is no GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from stagescope.agent.api.client import AgentClient
from stagescope.cli.demo_server import ExampleServer, example_server
from stagescope.errors import StagescopeError
from stagescope.examples.image_server.images import sample_jpeg
from stagescope.recorder.spool import SOCKET_NAME
from stagescope.testing import wait_until

RATE: Final = 150.0
DURATION_S: Final = 10.0
WARM_UP_S: Final = 3.0
"""In which the agent asks for the first device time."""
CAPTURE_AT_S: Final = 5.0
START_S: Final = 30.0
COMMAND: Final = (sys.executable, "-m", "stagescope")

Figures = dict[str, Any]


def http(rate: float = RATE, duration_s: float = DURATION_S) -> Figures:
    """Serve, load, capture; give what the reports say of the device."""
    os.environ["STAGESCOPE_AGENT"] = "off"  # the server's own: there is an agent process
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = folder / "sample.jpg"
        image.write_bytes(sample_jpeg())
        with example_server(folder / "server.log") as server:
            health = server.wait_ready()
            with _agent(server.spool, folder / "agent.log"):
                plain, _ = _loaded(server, image, folder / "plain", rate, duration_s)
                with_capture, captured = _loaded(
                    server, image, folder / "captured", rate, duration_s, capture=_captures()
                )
        return {
            "served_on": health["device"],
            "coverage": _coverage(plain),
            "plain": _of(plain),
            "with_capture": _of(with_capture),
            "capture": captured,
            "agent_said": (folder / "agent.log").read_text("utf-8", "replace").splitlines()[-20:],
        }


@contextmanager
def _agent(spool: Path, log: Path) -> Iterator[None]:
    """Run an agent process on *spool* until the block ends."""
    with log.open("wb") as output, subprocess.Popen(
        [*COMMAND, "agent", "--spool", str(spool), "--metrics-port", "off"],
        stdout=output, stderr=output,
    ) as process:  # fmt: skip
        try:
            wait_until(lambda: _answers(spool) or process.poll() is not None, START_S)
            if process.poll() is not None:
                raise RuntimeError(f"the agent ended: {log.read_text('utf-8', 'replace')}")
            yield
        finally:
            process.terminate()


def _answers(spool: Path) -> bool:
    try:
        return bool(AgentClient(spool / SOCKET_NAME).health())
    except StagescopeError:
        return False


def _loaded(
    server: ExampleServer, image: Path, out: Path, rate: float, duration_s: float,
    *, capture: bool = False,
) -> tuple[Figures, Figures]:  # fmt: skip
    """Load the server; give the report, and what a capture meanwhile gave."""
    captured: Figures = {} if capture else {"left_out": "this stagescope has no captures"}
    with subprocess.Popen(
        [*COMMAND, "load", server.url, "--rate", str(rate), "--duration", str(duration_s),
         "--warmup", str(WARM_UP_S), "--body", str(image), "--spool", str(server.spool),
         "--out", str(out), "--quiet"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as load:  # fmt: skip
        try:
            if capture:
                time.sleep(min(CAPTURE_AT_S, WARM_UP_S + duration_s / 2))
                captured = _json("capture", "--pid", str(server.process.pid), "--spool",
                                 str(server.spool), "--out", str(out.parent / "trace"), "--force",
                                 "--format", "json")  # fmt: skip
            _, said = load.communicate(timeout=duration_s + 60)
        finally:
            load.kill()
    report = _json("report", str(out), "--format", "json")
    if "client" not in report:
        raise RuntimeError(f"no report of the load run: {said or report.get('said')}")
    return report | ({"load_said": said} if load.returncode else {}), captured


def _json(*words: str) -> Figures:
    """Run a command; give its JSON, and what it said beside it where it failed."""
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=60,
                          check=False)  # fmt: skip
    try:
        told: Figures = json.loads(done.stdout)
    except json.JSONDecodeError:
        told = {}
    return told if not done.returncode else told | {"code": done.returncode, "said": done.stderr}


def _captures() -> bool:
    return find_spec("stagescope.cli.capture") is not None


def _coverage(report: Figures) -> float | None:
    device = (report.get("resources") or {}).get("device") or {}
    found: float | None = device.get("coverage")
    return found


def _of(report: Figures) -> Figures:
    """Return what a report says that has to do with the device, and what went wrong."""
    kept = ("valid", "invalid_reasons", "client", "latency", "resources", "code", "said",
            "load_said")  # fmt: skip
    return {name: report[name] for name in kept if name in report}


PARTS: Final[Mapping[str, Callable[[], object]]] = {"http": http}


def main(words: Sequence[str]) -> int:
    """Print the figures; say so where there is no GPU."""
    import torch

    if "--cpu" not in words and not torch.cuda.is_available():
        print("gpu_served: torch sees no CUDA device here, so there is nothing to measure",
              file=sys.stderr)  # fmt: skip
        return 1
    json.dump(http(20.0, 3.0) if "--cpu" in words else http(), sys.stdout, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
