"""The names that samples may have, each with its unit and kind; docs/attributes.md lists them.

Names are OpenTelemetry's where a convention exists (semantic conventions 1.44, `process.*`,
`system.*`, `hw.*`), `stagescope.*` and `model_server.*` where none does.
"""

from __future__ import annotations

from stagescope.samples import AMOUNT, LEVEL, SampleName

OTEL = "OpenTelemetry, development"

CAPTURES: tuple[SampleName, ...] = (
    SampleName(
        "stagescope.capture.recording", "s", AMOUNT,
        "Time in which a profiler was at work in the process, from its start until its file was "
        "written; requests of that time are profiled.", "stagescope.capture.id",
    ),
)  # fmt: skip

GPU: tuple[SampleName, ...] = (
    SampleName(
        "hw.gpu.utilization", "1", LEVEL,
        "Share of the time in which a kernel ran on the device, whatever its size.", stability=OTEL,
    ),
    SampleName(
        "hw.gpu.memory.usage", "By", LEVEL,
        "Device memory in use by all processes, without the driver's own reserve where it is reported.",
        stability=OTEL,
    ),
    SampleName("hw.gpu.memory.limit", "By", LEVEL, "Device memory that there is.", stability=OTEL),
    SampleName(
        "hw.gpu.io", "By", AMOUNT, "Bytes over the host's bus (PCIe), as seen from the device.",
        "network.io.direction", OTEL,
    ),
    SampleName("hw.power", "W", LEVEL, "Power that the device drew.", stability=OTEL),
    SampleName(
        "hw.energy", "J", AMOUNT, "Energy that the device used, by its own counter.",
        stability=OTEL,
    ),
    SampleName(
        "hw.temperature", "Cel", LEVEL, "Temperature of the chip (`gpu`) or its memory (`memory`).",
        "hw.sensor_location", OTEL,
    ),
    SampleName(
        "hw.errors", "{error}", AMOUNT,
        "Memory errors: `corrected` (one bit) and `uncorrected` (two bits).", "error.type", OTEL,
    ),
    SampleName(
        "model_server.gpu.memory.busy", "1", LEVEL,
        "Share of the time in which device memory was read or written.",
    ),
    SampleName(
        "model_server.gpu.memory.reserved", "By", LEVEL,
        "Device memory that the driver keeps for itself.",
    ),
    SampleName(
        "model_server.gpu.clock", "Hz", LEVEL,
        "Clock of the multiprocessors (`sm`) or of the memory (`memory`).",
        "model_server.gpu.clock.domain",
    ),
    SampleName(
        "model_server.gpu.sm.active", "1", LEVEL,
        "Share of the multiprocessors that had work, averaged over time.",
    ),
    SampleName(
        "model_server.gpu.sm.occupancy", "1", LEVEL,
        "Warps resident, as a share of those that there is room for.",
    ),
    SampleName(
        "model_server.gpu.tensor.active", "1", LEVEL,
        "Share of the time in which tensor cores worked, averaged over multiprocessors.",
    ),
    SampleName(
        "model_server.gpu.dram.active", "1", LEVEL,
        "Device memory's bandwidth in use, as a share of what it can do.",
    ),
    SampleName(
        "model_server.gpu.nvlink.io", "By", AMOUNT,
        "Payload over all NVLinks of the device, as seen from it.", "network.io.direction",
    ),
    SampleName(
        "model_server.gpu.throttle.time", "s", AMOUNT,
        "For how long the device was held below its clocks, by reason.",
        "model_server.gpu.throttle.reason",
    ),
    SampleName(
        "model_server.gpu.xid", "{event}", AMOUNT,
        "Faults that the driver told of as they happened, by their XID number.",
        "model_server.gpu.xid.number",
    ),
    SampleName(
        "model_server.gpu.process.memory", "By", LEVEL,
        "Device memory of one process; all processes that are not to be named here are one row.",
        "model_server.gpu.process",
    ),
    SampleName(
        "model_server.gpu.process.utilization", "1", LEVEL,
        "Share of the time in which kernels of one process ran on the device.",
        "model_server.gpu.process",
    ),
    SampleName(
        "stagescope.nvml.call_time", "s", LEVEL,
        "Median time of one call of the driver's library, by function.", "stagescope.nvml.call",
    ),
)  # fmt: skip

_RELEASE_CANDIDATE = "OpenTelemetry, release candidate"

PROCESS_NAMES = (
    SampleName(
        "process.cpu.time", "s", AMOUNT, "Time on a core, all threads together.",
        "cpu.mode", _RELEASE_CANDIDATE,
    ),
    SampleName(
        "process.memory.usage", "By", LEVEL, "Resident memory, shared pages included.",
        stability=_RELEASE_CANDIDATE,
    ),
    SampleName("process.thread.count", "{thread}", LEVEL, "Threads.", stability=_RELEASE_CANDIDATE),
    SampleName(
        "process.context_switches", "{context_switch}", AMOUNT,
        "Context switches of all its threads; a thread that ended takes its last ones with it.",
        "process.context_switch.type", _RELEASE_CANDIDATE,
    ),
    SampleName(
        "process.paging.faults", "{fault}", AMOUNT,
        "Page faults: major ones waited for storage, minor ones did not.",
        "system.paging.fault.type", _RELEASE_CANDIDATE,
    ),
    SampleName(
        "process.disk.io", "By", AMOUNT, "Bytes that went to and from storage for it.",
        "disk.io.direction", _RELEASE_CANDIDATE,
    ),
    SampleName(
        "process.unix.file_descriptor.count", "{file_descriptor}", LEVEL, "Open descriptors.",
        stability=_RELEASE_CANDIDATE,
    ),
    SampleName(
        "stagescope.process.memory.pss", "By", LEVEL,
        "Resident memory, each shared page divided by those who share it.",
    ),
    SampleName(
        "stagescope.process.memory.uss", "By", LEVEL,
        "Resident memory that it shares with nobody: what its end would free.",
    ),
    SampleName(
        "stagescope.process.memory.swap", "By", LEVEL,
        "Memory that was swapped out, each shared page divided by those who share it.",
    ),
    SampleName(
        "stagescope.process.works_for", "1", LEVEL,
        "Always 1: it is a child, without records of its own, of a served process.",
        "the served process's pid",
    ),
    SampleName(
        "stagescope.process.cgroup", "1", LEVEL, "Always 1: the cgroup that it is in.",
        "process.linux.cgroup",
    ),
)  # fmt: skip
"""The host sampler's, of a process (docs/host.md)."""

SYSTEM_NAMES = (
    SampleName(
        "system.cpu.utilization", "1", LEVEL,
        "Share of all cores' time that was neither idle nor waiting for storage; what a "
        "hypervisor took is in it.", stability=OTEL,
    ),
    SampleName("system.cpu.time", "s", AMOUNT, "Time of all cores.", "cpu.mode", OTEL),
    SampleName(
        "system.memory.usage", "By", LEVEL,
        "`used`: the limit less what is available; caches are not in it.",
        "system.memory.state", OTEL,
    ),
    SampleName(
        "system.memory.linux.available", "By", LEVEL,
        "What programs could still have without swapping, by the kernel's estimate.", stability=OTEL,
    ),
    SampleName("system.memory.limit", "By", LEVEL, "Memory of the host.", stability=OTEL),
    SampleName(
        "system.network.io", "By", AMOUNT, "Bytes through the host's cards; loopback left out.",
        "network.io.direction", OTEL,
    ),
    SampleName(
        "system.disk.io", "By", AMOUNT, "Bytes to and from the host's disks.",
        "disk.io.direction", OTEL,
    ),
    SampleName(
        "stagescope.system.load", "{task}", LEVEL,
        "Tasks that ran or waited, for a core or for storage: mean over the last minute, the "
        "newest weighing most.",
    ),
)  # fmt: skip
"""The host sampler's, of the host as a whole."""

_CGROUP = "process.linux.cgroup"
_STALLED = "Time in which {} of it waited for {}; of the host where no cgroup is named."
_WAITED = {"cpu": "a core", "memory": "memory", "io": "storage"}

CGROUP_NAMES = (
    SampleName("stagescope.cgroup.cpu.time", "s", AMOUNT, "Time on a core.", _CGROUP),
    SampleName("stagescope.cgroup.cpu.limit", "{cpu}", LEVEL, "Cores that it may use.", _CGROUP),
    SampleName(
        "stagescope.cgroup.cpu.throttled_time", "s", AMOUNT,
        "Time in which it was held up because its quota was used up, over all cores.", _CGROUP,
    ),
    SampleName(
        "stagescope.cgroup.cpu.throttled_periods", "{period}", AMOUNT,
        "Periods in which its quota was used up.", _CGROUP,
    ),
    SampleName(
        "stagescope.cgroup.memory.usage", "By", LEVEL,
        "Memory that is charged to it, file caches included.", _CGROUP,
    ),
    SampleName("stagescope.cgroup.memory.limit", "By", LEVEL, "Memory that it may use.", _CGROUP),
    SampleName(
        "stagescope.cgroup.memory.limit_hits", "{event}", AMOUNT,
        "Times that it came to its limit and had to give memory back.", _CGROUP,
    ),
    SampleName(
        "stagescope.cgroup.memory.oom", "{event}", AMOUNT,
        "Times that it found no memory below its limit.", _CGROUP,
    ),
    SampleName(
        "stagescope.cgroup.memory.oom_kill", "{process}", AMOUNT,
        "Processes of it that the kernel killed for want of memory.", _CGROUP,
    ),
    *(
        SampleName(
            f"stagescope.pressure.{resource}.{kind}", "s", AMOUNT,
            _STALLED.format("at least one task" if kind == "some" else "every task", what), _CGROUP,
        )
        for resource, what in _WAITED.items()
        for kind in ("some", "full")
    ),
)  # fmt: skip
"""The host sampler's, of a cgroup."""

COST_NAMES = (
    SampleName(
        "stagescope.collector.cpu_time", "s", AMOUNT,
        "CPU time that a collector of the agent used, its child processes included; `other`: what "
        "the agent used besides, to read records, export and answer.", "collector",
    ),
    SampleName(
        "stagescope.collector.late_time", "s", AMOUNT,
        "By how much a collector was called later than it was due.", "collector",
    ),
    SampleName(
        "stagescope.collector.stall_time", "s", AMOUNT,
        "For how long a collector held up the agent's loop.", "collector",
    ),
)  # fmt: skip
"""What stagescope's own samplers cost."""

DEVICE_TIMES: tuple[SampleName, ...] = (
    SampleName(
        "model_server.stage.device_time", "s", AMOUNT,
        "Time that a stream of the device spent between the events at which the stage opened and "
        "closed, stages inside it left out (docs/device-time.md).", "model_server.stage",
    ),
    SampleName(
        "model_server.stage.device_timed", "{opening}", AMOUNT,
        "Openings of the stage whose device time is measured to their end.", "model_server.stage",
    ),
    SampleName(
        "model_server.stage.device_opened", "{opening}", AMOUNT,
        "Openings of the stage in a process whose device times are taken; of these "
        "`model_server.stage.device_timed` are measured.", "model_server.stage",
    ),
    SampleName(
        "model_server.stage.device_missed", "{opening}", AMOUNT,
        "Openings without a device time: `capture` (of a graph), `full` (the device was too far "
        "behind), `unclosed` (the request ended first).", "reason",
    ),
)  # fmt: skip

TORCH_MEMORY: tuple[SampleName, ...] = (
    SampleName(
        "model_server.torch.memory.allocated", "By", LEVEL, "Device memory in torch's tensors."
    ),
    SampleName(
        "model_server.torch.memory.active", "By", LEVEL,
        "Device memory in blocks that are in use or wait for a stream to be done with them.",
    ),
    SampleName(
        "model_server.torch.memory.reserved", "By", LEVEL,
        "Device memory that torch's allocator holds, used or not.",
    ),
    SampleName(
        "model_server.torch.memory.inactive_split", "By", LEVEL,
        "Device memory in unused parts of split blocks, which cannot be given back.",
    ),
    SampleName(
        "model_server.torch.memory.requested", "By", LEVEL,
        "Device memory that was asked for, before rounding.",
    ),
    SampleName(
        "model_server.torch.memory.peak", "By", LEVEL,
        "Most of one of these that there was since the process, or whoever reset it, began.",
        "what",
    ),
    SampleName(
        "model_server.torch.memory.fragmentation", "1", LEVEL,
        "`inactive_split` as a share of `reserved`.",
    ),
    SampleName(
        "model_server.torch.memory.rounding", "By", LEVEL,
        "`allocated` less `requested`: what rounding up costs.",
    ),
    SampleName(
        "model_server.torch.memory.events", "{event}", AMOUNT,
        "What the allocator did, by torch's name of the counter: `num_alloc_retries`, `num_ooms`, "
        "`num_device_alloc`, `num_device_free`, `num_sync_all_streams`.", "counter",
    ),
    SampleName(
        "model_server.torch.pinned.allocated", "By", LEVEL,
        "Pinned host memory that torch's allocator holds.",
    ),
    SampleName(
        "model_server.torch.pinned.active", "By", LEVEL,
        "Pinned host memory in blocks that are in use.",
    ),
    SampleName(
        "model_server.torch.pinned.peak", "By", LEVEL,
        "Most of one of these that there was, by torch's own approximation.", "what",
    ),
    SampleName(
        "model_server.torch.pinned.events", "{event}", AMOUNT,
        "Blocks taken from and given back to the driver: `num_host_alloc`, `num_host_free`.",
        "counter",
    ),
    SampleName(
        "model_server.torch.pinned.driver_time", "s", AMOUNT,
        "Time in the driver's calls for pinned memory: `alloc`, `free`.", "call",
    ),
)  # fmt: skip

TRIGGER_NAMES = (
    SampleName(
        "stagescope.trigger.starts", "{capture}", AMOUNT,
        "Captures and windows of stacks that a trigger started.", "stagescope.trigger",
    ),
)  # fmt: skip
"""The triggers'."""

SAMPLE_NAMES: tuple[SampleName, ...] = (
    *GPU,
    *PROCESS_NAMES,
    *SYSTEM_NAMES,
    *CGROUP_NAMES,
    *COST_NAMES,
    *DEVICE_TIMES,
    *TORCH_MEMORY,
    *CAPTURES,
    *TRIGGER_NAMES,
)
"""Every name, host first; each sampler's names stand in one block."""
