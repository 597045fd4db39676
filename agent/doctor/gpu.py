"""The GPU's own figures, and whether kernels can be captured: NVML, CUPTI's holder, torch."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from stagescope.agent.doctor.environment import Environment
from stagescope.agent.doctor.finding import GPU, KERNELS, NO, OK, WARN, Finding, plural
from stagescope.agent.doctor.serving import hello
from stagescope.agent.host.proc import named
from stagescope.errors import StagescopeError
from stagescope.recorder.reader import RecorderReader
from stagescope.records import BatchRecord, RequestRecord
from stagescope.stages import OTHER, stage_of

PROFILERS: Final = {"nsys": "CUPTI", "ncu": "CUPTI", "nsight-sys": "CUPTI", "dynolog": "CUPTI",
                    "nv-hostengine": "counters", "dcgm-exporter": "counters"}  # fmt: skip
"""By the name of the process: what it may hold. Tracing takes CUPTI's one place in a process;
DCGM takes the counters that GPM reads."""
INJECTIONS: Final = ("CUDA_INJECTION64_PATH", "NVTX_INJECTION64_PATH", "KINETO_USE_DAEMON")
"""Variables of a server by which another profiler is in it from its start."""
NO_DRIVER: Final = ("NVMLError_LibraryNotFound", "NVMLError_DriverNotLoaded")


def nvml(around: Environment) -> Finding:
    """Does the NVIDIA driver answer, which devices are there, and do they have GPM?"""
    try:
        pynvml: Any = import_module("pynvml")
    except ImportError:
        text = "pynvml is not installed: no figures of NVIDIA GPUs"
        return Finding(NO, text, ("pip install nvidia-ml-py",), lacks=(GPU,))
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return _no_driver(around, type(error).__name__)
    try:
        found = [_device(pynvml, at) for at in range(pynvml.nvmlDeviceGetCount())]
        facts: dict[str, Any] = {
            "driver": _text(pynvml.nvmlSystemGetDriverVersion()),
            "devices": [one for one in found if "error" not in one],
            "lost": [one for one in found if "error" in one],
        }
    except pynvml.NVMLError as error:
        return _no_driver(around, type(error).__name__)
    finally:
        pynvml.nvmlShutdown()
    return _devices(facts)


def _devices(facts: dict[str, Any]) -> Finding:
    devices, lost = facts["devices"], facts["lost"]
    why = "".join(f"; GPU {one['index']} does not answer ({one['error']})" for one in lost)
    if not devices:
        do = ("docker run --gpus all, or resources.limits: nvidia.com/gpu: 1",)
        text = f"the driver answers and gives no device{why}"
        return Finding(NO, text, do, lacks=(GPU,), facts=facts)
    names = ", ".join(sorted({device["name"] for device in devices}))
    text = f"{plural(len(devices), 'GPU')} ({names}), driver {facts['driver']}: busy, memory, power"
    gpm = ", GPM counters" if all(device["gpm"] for device in devices) else "; no GPM (Hopper on)"
    if lost:
        do = ("nvidia-smi -q, and dmesg | grep Xid",)
        return Finding(WARN, f"{text}{gpm}{why}", do, gives=(GPU,), facts=facts)
    return Finding(OK, f"{text}{gpm}", gives=(GPU,), facts=facts)


def _device(pynvml: Any, at: int) -> dict[str, Any]:
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(at)
        names = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    except pynvml.NVMLError as error:
        return {"index": at, "error": type(error).__name__}
    try:
        gpm = bool(pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice)
    except pynvml.NVMLError:
        gpm = False
    return {"index": at, "name": _text(names[0]), "uuid": _text(names[1]), "gpm": gpm}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _no_driver(around: Environment, error: str) -> Finding:
    facts: dict[str, Any] = {"error": error, "driver": None, "devices": []}
    if error not in NO_DRIVER:
        do = ("run as a user who may open /dev/nvidia*",) if "Permission" in error else ()
        return Finding(NO, f"the NVIDIA driver refuses: {error}", do, lacks=(GPU,), facts=facts)
    there = (around.proc / "driver/nvidia/version").exists()
    if there:
        text = f"the host has an NVIDIA driver, and its library is not to be had here ({error})"
        do = ("docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility",)
        return Finding(NO, text, do, lacks=(GPU,), facts=facts)
    text = f"no NVIDIA driver here ({error}): no figures of a GPU, all else is measured"
    do = ("with a GPU: install its driver, or docker run --gpus all",)
    return Finding(NO, text, do, lacks=(GPU,), facts=facts)


def cupti(around: Environment) -> Finding:
    """Does another profiler hold what a capture of kernels needs?"""
    injected = {pid: found for pid in around.pids() if (found := _injected(around, pid))}
    beside = _profilers(around)
    facts = {"injected": {str(pid): found for pid, found in injected.items()}, "profilers": beside}
    if injected:
        pid, found = next(iter(injected.items()))
        name, value = next(iter(found.items()))
        text = f"another profiler is in pid {pid} from its start: {name}={value}"
        do = (f"start the server without {name}",)
        return Finding(NO, text, do, lacks=(KERNELS,), forbids=(KERNELS,), facts=facts)
    if beside:
        named = ", ".join(f"{one['name']} pid {one['pid']}" for one in beside[:3])
        what = sorted({one["holds"] for one in beside})
        text = f"{named} may hold {' and '.join(what)}: of two profilers in a process one fails"
        return Finding(WARN, text, ("end it before a capture",), facts=facts)
    return Finding(OK, "no other profiler is in sight (nsys, ncu, dynolog, DCGM)", facts=facts)


def _injected(around: Environment, pid: int) -> dict[str, str]:
    known = around.environment_of(pid)
    return {name: known[name] for name in INJECTIONS if known.get(name) not in (None, "", "0")}


def _profilers(around: Environment) -> list[dict[str, Any]]:
    return [
        {"pid": pid, "name": name, "holds": PROFILERS[name]}
        for pid, name in named(around.proc, PROFILERS)
    ]


def counters(around: Environment) -> Finding | None:
    """Are the GPU's counters kept for administrators? None where there is no NVIDIA driver."""
    params = around.read(around.proc / "driver/nvidia/params")
    if not params:
        return None
    kept = "RmProfilingAdminOnly: 1" in params
    facts = {"admin_only": kept}
    if not kept:
        return Finding(OK, "open to all users", facts=facts)
    text = "for administrators only; kernels can be captured all the same, counters cannot"
    do = ("options nvidia NVreg_RestrictProfilingToAdminUsers=0 in /etc/modprobe.d, then reboot",)
    return Finding(WARN, text, do, facts=facts)


def torch(around: Environment) -> Finding:
    """Is there a served process with torch, whose profiler can capture?"""
    answers = {one.process.pid: hello(one) for one in around.served}
    with_torch = {pid: found for pid, found in answers.items() if found.get("torch")}
    able = [pid for pid, found in with_torch.items() if "capture" in found.get("ops", ())]
    facts = {
        "torch": {str(pid): found["torch"] for pid, found in with_torch.items()},
        "loaded": {str(pid): _loaded(around, pid) for pid in around.pids()},
    }
    if able:
        blind = _without_inference(around, able)
        if blind:
            return Finding(WARN, *blind, lacks=(KERNELS,), facts=facts)
        what = "kernels" if "cuda" in facts["loaded"][str(able[0])] else "operators, on the CPU"
        text = f"torch {with_torch[able[0]]['torch']} in pid {able[0]}: {what}"
        return Finding(OK, text, gives=(KERNELS,), facts=facts)
    if with_torch:
        pid = next(iter(with_torch))
        text = f"the stagescope in pid {pid} is too old to capture"
        return Finding(NO, text, ("pip install --upgrade stagescope, in the server's environment",),
                       lacks=(KERNELS,), facts=facts)  # fmt: skip
    if around.pid and facts["loaded"].get(str(around.pid)):
        text = f"pid {around.pid} has torch, and no stagescope that could capture"
        do = ("stagescope run -- YOUR SERVER'S COMMAND",)
    elif around.served:
        text, do = "no served process has loaded torch", ("serve a torch model",)
    else:
        text, do = "no served process to capture in", ("start the server; see servers above",)
    return Finding(NO, text, do, lacks=(KERNELS,), facts=facts)


def _without_inference(around: Environment, pids: list[int]) -> tuple[str, tuple[str, ...]] | None:
    """Return why a capture in *pids* would see no call of a model, and the remedy; None: it would.

    A capture records from one call to the next, and knows a call by its stage `inference`.
    """
    found = [_stages_met(one.ring) for one in around.served if one.process.pid in pids]
    if any("inference" in met for met in found):
        return None
    if not any(found):
        text = f"torch in pid {pids[0]}, which has served no request yet: a capture waits for the "
        return text + "stage `inference`", ("send a request, then run this again",)
    text = f"torch in pid {pids[0]}, but none of its requests opened the stage `inference`, for "
    return text + "which a capture waits", ('with stage("inference"): around the model\'s call',)


def _stages_met(ring: Path) -> set[str]:
    """Return the outer stages of the requests and batches in a recorder file; `other` for none."""
    met: set[str] = set()
    with suppress(OSError, StagescopeError), RecorderReader(ring) as reader:
        while "inference" not in met and (records := reader.poll()):
            for record in records:
                if isinstance(record, RequestRecord | BatchRecord):
                    met |= {OTHER, *(stage_of(span.stage) for span in record.stages)}
    return met


def _loaded(around: Environment, pid: int) -> list[str]:
    """Return which of torch's libraries a process has mapped: `cpu`, `cuda`, `cupti`."""
    maps = around.read(around.proc / str(pid) / "maps")
    known = {"cpu": "libtorch_cpu.so", "cuda": "libtorch_cuda.so", "cupti": "libcupti.so"}
    return [name for name, library in known.items() if library in maps]
