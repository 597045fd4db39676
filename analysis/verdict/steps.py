"""What to do about each kind: at most three steps, with this run's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stagescope.analysis.verdict import model as m
from stagescope.analysis.verdict.model import Evidence, Finding, Step
from stagescope.analysis.verdict.rules import place

MOST = 3
PAGE = "docs/verdicts.md"


def next_steps(e: Evidence, found: Finding) -> tuple[Step, ...]:
    """Return what to do about *found*; nothing where its kind is a rule's of the user's own."""
    steps = STEPS.get(found.kind)
    texts = steps(e, found) if steps else []
    return tuple(Step(text, f"{PAGE}#{found.kind}") for text in texts[:MOST])


def _place(found: Finding) -> str:
    stage = f"`{found.stage}`" if found.stage else "what holds it"
    return f"{stage}, {place(found.where)}," if found.where else stage


def _client(e: Evidence, found: Finding) -> list[str]:
    return [
        (
            f"lower the rate below {e.achieved_per_s:,.0f}/s, or drive from a machine of its own: "
            f"the driver used {e.driver_cpu_share or 0:.0%} of a core"
        ),
        "close other programs on the driver's machine and run it again",
    ]


def _network(e: Evidence, found: Finding) -> list[str]:
    return [
        (
            f"load from the server's own host: what then is left of {found.cost_ms:,.1f} ms is not "
            "the network's"
        ),
        "look at proxies and gateways between client and server, and at the size of bodies",
    ]


def _event_loop(e: Evidence, found: Finding) -> list[str]:
    stage = e.stage(found.stage)
    took = f" ({stage.loop_ms:,.1f} ms a request there)" if stage and stage.loop_ms else ""
    per_s = 1e3 / stage.loop_ms if stage and stage.loop_ms else 0.0
    bound = f": one process can serve at most {per_s:,.0f} requests/s" if per_s else ""
    return [
        f"take {_place(found)} off the event loop{took}: into a thread or a process",
        f"serve with more worker processes (`--workers 2`){bound}",
        f"make it shorter: each ms less saves up to {_times(e, stage)} ms of mean latency",
    ]


def _times(e: Evidence, stage: m.StageFacts | None) -> str:
    wait = e.wait("event_loop")
    if wait is None or stage is None or not stage.loop_ms:
        return "some"
    return f"{1 + wait.mean_ms / stage.loop_ms:,.1f}"


def _threadpool(e: Evidence, found: Finding) -> list[str]:
    threads = e.threads_max or 1
    need = max(threads + 1, round((e.asked_per_s or e.achieved_per_s) * _thread_s(e) / 0.7 + 0.5))
    return [
        (
            f"raise the limit of worker threads from {threads} to about {need}: "
            "`anyio.to_thread.current_default_thread_limiter().total_tokens`"
        ),
        f"make {_place(found)} shorter: {e.threads_busy or 0:.1f} threads work in it on average",
        "make the endpoint `async def` and await what it waits for, so that it needs no thread",
    ]


def _thread_s(e: Evidence) -> float:
    return sum(one.thread_ms or 0.0 for one in e.stages) / 1e3


def _gil(e: Evidence, found: Finding) -> list[str]:
    return [
        (
            f"move {_place(found)} into processes (`--workers 2` or a process pool): threads share one "
            f"interpreter, and use {e.threads_computing or 0:.2f} cores of it"
        ),
        "use a library that computes outside the interpreter's lock (NumPy, torch, Pillow)",
        "have fewer threads compute at once: more of them only wait for one another",
    ]


def _cpu(e: Evidence, found: Finding) -> list[str]:
    host = e.host
    return [
        f"give it more cores: it used {host.server_cores or 0:.1f} of {host.cores}",
        f"make {_place(found)} cheaper: it computes most of all stages",
        (
            "bound the threads of numeric libraries (`OMP_NUM_THREADS`, `torch.set_num_threads`) to "
            f"{host.cores} over all workers"
        ),
    ]


def _dependency(e: Evidence, found: Finding) -> list[str]:
    return [
        (
            f"look into what {_place(found)} waits for: {found.cost_ms:,.1f} ms a request, of the "
            f"slowest 1 % {found.cost_slowest_ms:,.1f}"
        ),
        "cache its answers, ask for several at once, or run it beside the model instead of before",
        "set a timeout, so that its slowest answers do not become yours",
    ]


def _batching(e: Evidence, found: Finding) -> list[str]:
    rate = e.achieved_per_s
    shorter = max(1.0, round(found.cost_ms / 8))
    fewer = rate * (found.cost_ms - shorter) / 1e3
    return [
        (
            f"shorten the batch delay: requests wait {found.cost_ms:,.1f} ms for a mean batch of "
            f"{e.batch_size:.1f}; {shorter:.0f} ms would cost about {max(fewer, 0):.1f} requests a batch"
        ),
        f"form no batches at this rate ({rate:,.0f}/s): the model alone may keep up",
        f"lower the batch's maximum ({e.batch_max} seen): a full batch does not wait",
    ]


def _model_capacity(e: Evidence, found: Finding) -> list[str]:
    busy = f", busy {found.utilisation:.0%} of the time" if found.utilisation is not None else ""
    larger = (
        f"let batches grow: they have {e.batch_size:.1f} members on average"
        if e.batches
        else "batch requests: one call of the model then serves several"
    )
    return [
        f"add a worker or a replica of the model{busy}: requests wait {found.cost_ms:,.1f} ms",
        larger,
        (
            f"make {_place(found)} faster (smaller types, compiled graph): its queue shrinks faster "
            "than its own time"
        ),
    ]


def _gpu_compute(e: Evidence, found: Finding) -> list[str]:
    kernel = f", most of it in {found.where}" if found.where else ""
    return [
        f"make the model cheaper{kernel}: half precision, `torch.compile`, a smaller model",
        "add a device, or a replica on another one",
    ]


def _gpu_launch(e: Evidence, found: Finding) -> list[str]:
    return [
        f"launch less in `{found.stage}`: CUDA graphs or `torch.compile(mode='reduce-overhead')`",
        "raise the batch size: each launch then does more",
        "keep Python work off the launching thread",
    ]


def _gpu_copy(e: Evidence, found: Finding) -> list[str]:
    return [
        f"copy less in `{found.stage}`: send compact types and convert on the device",
        "use pinned memory and `non_blocking=True`, so that copies overlap with kernels",
    ]


def _gpu_memory(e: Evidence, found: Finding) -> list[str]:
    return [
        "lower the batch or sequence limit, so that its peak fits",
        "set `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` against fragmentation",
    ]


def _slow_reader(e: Evidence, found: Finding) -> list[str]:
    return [
        f"look at the client: the server waited {found.cost_ms:,.1f} ms a request for it to read",
        "make responses smaller (compression, fewer fields), or buffer them in a proxy",
    ]


def _gc(e: Evidence, found: Finding) -> list[str]:
    return [
        "call `gc.freeze()` once the model is loaded: long-lived objects are then no longer scanned",
        f"raise `gc.set_threshold`: collections ran {e.gc_share or 0:.0%} of the time",
        "create fewer objects in cycles a request, and call no `gc.collect()` while serving",
    ]


def _memory(e: Evidence, found: Finding) -> list[str]:
    return [
        "give the server more memory, or fewer workers",
        "look for what grows: `stagescope report DIR --full` shows memory over the run",
    ]


def _host(e: Evidence, found: Finding) -> list[str]:
    return [
        "find who takes the cores (`top`), and move it elsewhere or give it a lower priority",
        "raise the container's CPU limit where it is throttled",
        "measure again on a quiet machine before changing the server",
    ]


def _cold_start(e: Evidence, found: Finding) -> list[str]:
    return [
        "load the model at startup, and send a request of its own before taking traffic",
        (
            f"measure with `--warmup`: the first {e.cold_requests:,} requests are not the server's "
            "steady state"
        ),
    ]


def _errors(e: Evidence, found: Finding) -> list[str]:
    return [
        (
            f"fix the errors first ({found.utilisation or 0:.0%} of requests): times of failed "
            "requests say nothing about the server"
        ),
        "look at the server's log, and at `status` and `error` in server.parquet",
    ]


def _workload(e: Evidence, found: Finding) -> list[str]:
    return [
        f"load each size by itself: latency depends on the {e.size_of} size",
        "bound sizes, or route large requests to workers of their own",
        "batch requests of similar size together",
    ]


def _instrumentation(e: Evidence, found: Finding) -> list[str]:
    return [
        f"open fewer stages a request: recording takes {e.instrument_us or 0:.0f} µs",
        "switch samplers off that you do not read (docs/performance.md)",
    ]


def _none(e: Evidence, found: Finding) -> list[str]:
    if e.asked_per_s is None:
        return ["load it harder to find its limit"]
    double = 2 * e.asked_per_s
    steps = [f"load it harder to find its limit: `stagescope load URL --rate {double:,.4g}`"]
    if found.stage:
        steps.append(f"for shorter times at this rate make `{found.stage}` itself faster")
    return steps


def _undetermined(e: Evidence, found: Finding) -> list[str]:
    return [f"first: {found.why}", "then run it again, for 30 s or more"]


STEPS: Mapping[str, Callable[[Evidence, Finding], list[str]]] = {
    m.CLIENT: _client,
    m.NETWORK: _network,
    m.EVENT_LOOP: _event_loop,
    m.THREADPOOL: _threadpool,
    m.GIL: _gil,
    m.CPU: _cpu,
    m.DEPENDENCY: _dependency,
    m.BATCHING: _batching,
    m.MODEL_CAPACITY: _model_capacity,
    m.GPU_COMPUTE: _gpu_compute,
    m.GPU_LAUNCH: _gpu_launch,
    m.GPU_COPY: _gpu_copy,
    m.GPU_MEMORY: _gpu_memory,
    m.SLOW_READER: _slow_reader,
    m.GC: _gc,
    m.MEMORY: _memory,
    m.HOST: _host,
    m.COLD_START: _cold_start,
    m.ERRORS: _errors,
    m.WORKLOAD: _workload,
    m.INSTRUMENTATION: _instrumentation,
    m.NONE: _none,
    m.UNDETERMINED: _undetermined,
}
