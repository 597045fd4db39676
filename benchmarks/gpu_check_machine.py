"""On what was measured: GPU, driver, CUDA, torch, Python, cores."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

PACKAGES: Final = ("nvidia-ml-py", "psutil", "py-spy", "fastapi", "uvicorn", "aiohttp", "duckdb",
                   "ibis-framework", "pyarrow", "opentelemetry-sdk")  # fmt: skip


def facts() -> dict[str, Any]:
    """Return what is known; `why_no_gpu` is empty where there is one."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "driver": _driver(),
        "packages": _packages(),
        **_gpu(),
    }


def _gpu() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"why_no_gpu": "torch is not installed here"}
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if not torch.cuda.is_available():
        return found | {"why_no_gpu": "torch sees no CUDA device here"}
    of = torch.cuda.get_device_properties(0)
    return found | {
        "why_no_gpu": "",
        "device": of.name,
        "devices": torch.cuda.device_count(),
        "device_memory_bytes": of.total_memory,
        "capability": f"{of.major}.{of.minor}",
        "multiprocessors": of.multi_processor_count,
    }


def _driver() -> str:
    """Ask nvidia-smi, else the driver's own file; empty where neither knows."""
    if found := shutil.which("nvidia-smi"):
        done = subprocess.run(
            [found, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
            capture_output=True, text=True, timeout=20, check=False,
        )  # fmt: skip
        if not done.returncode:
            return done.stdout.strip()
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    numbers = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return numbers[0] if numbers else ""


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


PARTS: Final = {"facts": facts}
