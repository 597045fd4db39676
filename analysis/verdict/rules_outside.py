"""The rules on what lies around the server's own queues: client, network, others, requests."""

from __future__ import annotations

from stagescope.analysis.verdict.model import (
    CLIENT,
    COLD_START,
    CONTRIBUTING,
    DEPENDENCY,
    ERRORS,
    GPU_COMPUTE,
    GPU_COPY,
    GPU_LAUNCH,
    GPU_MEMORY,
    HOLDS,
    INSTRUMENTATION,
    MEMORY,
    NETWORK,
    RULED_OUT,
    SLOW_READER,
    WORKLOAD,
    Evidence,
    Finding,
    StageFacts,
)
from stagescope.analysis.verdict.rules import (
    HOLDS_SHARE,
    LEAST_MS,
    NEAR_LIMIT,
    NO_WAITS,
    Rule,
    batching,
    cold,
    cpu,
    crowded,
    event_loop,
    gc,
    gil,
    host,
    measured,
    model_capacity,
    of_mean,
    status_of,
    threadpool,
    untestable,
)

LEAST_AWAITED_MS = 10.0
"""A stage that awaits less than this from outside is no reason to look there."""
AWAITED_SHARE = 0.5
ERROR_SHARE = 0.05
LEAST_NETWORK_MS = 5.0


def client(e: Evidence) -> Finding:
    """The load driver sent later than planned, or opened a connection for each request."""
    if e.driver_late_p99_ms is None and e.driver_cpu_share is None:
        why = "the driver's own health is not known: load with `stagescope load`"
        return untestable(CLIENT, why)
    waited = e.parts.get("client_wait", 0.0) + e.parts.get("connect", 0.0)
    share = e.driver_cpu_share or 0.0
    late = any(reason.startswith("driver") for reason in e.invalid_reasons)
    status = status_of(e, waited, waited)
    if late and share >= NEAR_LIMIT:
        status = HOLDS
    return Finding(
        CLIENT,
        status,
        f"requests waited {of_mean(e, waited)} in the client, whose driver used {share:.0%} of a "
        f"core and was up to {e.driver_late_p99_ms or 0:.1f} ms late (p99)",
        waited, waited, None, "client_wait", "load driver", min(1.0, share),
        sure=late and share >= NEAR_LIMIT,
    )  # fmt: skip


def network(e: Evidence) -> Finding:
    """Bytes take long between client and server."""
    if not e.requests:
        return untestable(NETWORK, "no request was joined with a server record")
    spent = e.parts.get("network", 0.0) - _taken_slowly(e)
    status = status_of(e, spent, spent)
    if status == HOLDS and spent < LEAST_NETWORK_MS:
        status = CONTRIBUTING
    if status == HOLDS and not measured(e):
        return untestable(NETWORK, NO_WAITS)
    clock = "" if e.one_clock else " (two clocks: queues in front of the server are in it)"
    return Finding(
        NETWORK, status, f"the network took {of_mean(e, spent)}{clock}",
        spent, spent, None, "network", "network", sure=e.one_clock,
    )  # fmt: skip


LARGE_BYTES = 1e6
"""A response beyond what a network holds on its way at once, so that its reader sets the pace."""
ONE_WAY = 5.0
"""What delays bytes delays requests too: responses alone take so many times as long."""


def _taken_slowly(e: Evidence) -> float:
    """Return for how long the network's part was that of a large response on its way, ms.

    A server hands a response over in one piece and is done; its kernel keeps what the reader does
    not take.
    """
    request, response = e.parts.get("network.request"), e.parts.get("network.response")
    if request is None or response is None or e.response_bytes < LARGE_BYTES:
        return 0.0
    return response if response >= ONE_WAY * max(request, LEAST_MS) else 0.0


def slow_reader(e: Evidence) -> Finding:
    """The client takes the response's bytes more slowly than the server hands them over."""
    if e.send_wait_ms is None:
        return untestable(SLOW_READER, NO_WAITS)
    respond = e.stage("respond")
    waited = max(e.send_wait_ms - (sum(respond.waits_ms.values()) if respond else 0.0), 0.0)
    share = respond.own_slowest_ms / respond.own_ms if respond and respond.own_ms else 1.0
    after = _taken_slowly(e)
    cost = waited + after
    words = f"the server waited {of_mean(e, waited)} for the client to take bytes"
    if after:
        words = (
            f"the client, or what lies before it, took {of_mean(e, cost)} for the "
            f"{e.response_bytes / 1e6:,.1f} MB of a response ({e.response_bytes / cost / 1e3:,.0f} MB/s)"
        )
    return Finding(
        SLOW_READER, status_of(e, cost, waited * share + after), words,
        cost, waited * share + after, None, "respond", "client's reading", sure=True,
    )  # fmt: skip


def dependency(e: Evidence) -> Finding:
    """A stage waits for something outside the process, without using a core."""
    if not measured(e):
        return untestable(DEPENDENCY, NO_WAITS)
    found = [(awaited(e, one), one) for one in e.stages if one.name not in ("queue", "respond")]
    spent, stage = max(found, key=lambda each: each[0], default=(0.0, None))
    if stage is None or spent <= 0:
        return Finding(DEPENDENCY, RULED_OUT, "no stage waited for anything outside")
    share = spent / stage.own_ms if stage.own_ms else 0.0
    slowest = stage.own_slowest_ms * share
    status = status_of(e, spent, slowest)
    if status == HOLDS and not _far_away(e, spent, slowest):
        status = CONTRIBUTING
    return Finding(
        DEPENDENCY,
        status,
        f"`{stage.name}` waited {of_mean(e, spent)} for something outside the process, "
        "without a core",
        spent, slowest, stage.own_p50_ms * share, stage.name, "outside", None, stage.where,
        sure=share >= 0.7,
    )  # fmt: skip


def _far_away(e: Evidence, spent: float, slowest: float) -> bool:
    """Return whether what is awaited is most of latency, or of that of the slowest requests."""
    mean = spent >= AWAITED_SHARE * e.mean_ms and spent >= LEAST_AWAITED_MS
    tail = slowest >= AWAITED_SHARE * e.slowest_ms and slowest >= 5 * LEAST_AWAITED_MS
    return mean or tail


def awaited(e: Evidence, stage: StageFacts) -> float:
    """Return what of a stage's own time is spent without a core, for no other request's sake."""
    if stage.idle_ms is None or (e.gpu is not None and e.gpu.stage == stage.name):
        return 0.0
    inner = sum(
        one.own_ms
        for one in stage.inner
        if one.name in ("batch.wait", "inference.h2d", "inference.forward", "inference.d2h")
    )
    model = stage.name == "inference"
    return max(0.0, stage.idle_ms - inner - (crowded(stage) if model else 0.0))


def errors(e: Evidence) -> Finding:
    """Requests fail, are refused, or answered with an error of the server."""
    sent = e.answered + e.failed
    bad = e.failed + e.bad_status
    share = bad / sent if sent else 0.0
    words = ", ".join(f"{word} {many:,}" for word, many in e.errors.items())
    died = f"; {e.died:,} died with their process" if e.died else ""
    status = HOLDS if share >= ERROR_SHARE else CONTRIBUTING if share >= 0.01 else RULED_OUT
    return Finding(
        ERRORS,
        status,
        f"{bad:,} of {sent:,} requests failed ({share:.1%}): {e.bad_status:,} answered with 5xx, "
        f"{e.failed:,} without an answer{' (' + words + ')' if words else ''}{died}",
        stage="", resource="answers", utilisation=share, sure=True,
    )  # fmt: skip


def cold_start(e: Evidence) -> Finding:
    """The run's first requests paid for loading or warming up."""
    if e.cold_ms is None:
        return Finding(COLD_START, RULED_OUT, "the start of the run was no slower than the rest")
    cost = e.cold_ms * e.cold_requests / max(e.requests, 1)
    status = HOLDS if cold(e) else CONTRIBUTING
    return Finding(
        COLD_START,
        status,
        f"the first {e.cold_requests:,} requests took {e.cold_ms:,.1f} ms on average, "
        f"{of_mean(e, cost)} of the run's mean",
        cost, e.slowest_ms, 0.0, "", "warm-up", None, sure=e.cold_requests < e.requests / 3,
    )  # fmt: skip


def workload(e: Evidence) -> Finding:
    """The requests themselves differ, and with them what they take."""
    if len(e.sizes) < 2:
        return Finding(WORKLOAD, RULED_OUT, "latency does not depend on the size of requests")
    small, large = e.sizes[0], e.sizes[-1]
    cost = max(0.0, e.mean_ms - small.mean_ms)
    slowest = max(0.0, e.slowest_ms - small.mean_ms)
    status = HOLDS if large.mean_ms >= 2 * small.mean_ms else CONTRIBUTING
    return Finding(
        WORKLOAD,
        status,
        f"by {e.size_of} size: the {small.requests:,} small took {small.mean_ms:,.1f} ms, the "
        f"{large.requests:,} large {large.mean_ms:,.1f}",
        cost, slowest, None, "", f"{e.size_of} size", None, sure=large.mean_ms > 3 * small.mean_ms,
    )  # fmt: skip


def memory(e: Evidence) -> Finding:
    """Memory runs short: pages come back from disk, limits are hit, or it grows all the time."""
    one = e.host
    if one.rss_first_bytes is None:
        return untestable(
            MEMORY, "memory was not sampled: run `stagescope agent` beside the server"
        )
    faults, hits = one.major_faults_per_s or 0.0, one.memory_limit_hits or 0.0
    leak = one.leak_bytes_per_s or 0.0
    short = faults > 50 or hits > 0
    status = HOLDS if short else CONTRIBUTING if leak else RULED_OUT
    growth = ((one.rss_last_bytes or 0.0) - one.rss_first_bytes) / 1e6
    words = f"memory changed by {growth:+,.0f} MB, {faults:.0f} pages a second came from disk"
    words += f", the cgroup's limit was hit {hits:.0f} times" if hits else ""
    words += f", and it grows by {leak / 1e6:.1f} MB a second" if leak else ""
    return Finding(
        MEMORY, status, words, e.mean_ms * HOLDS_SHARE if short else 0.0, 0.0, None, "", "memory",
        one.memory_used_share, sure=hits > 0,
    )  # fmt: skip


def instrumentation(e: Evidence) -> Finding:
    """What we do ourselves costs too much."""
    if e.instrument_us is None:
        return untestable(
            INSTRUMENTATION, "what recording costs is not known: run `stagescope agent`"
        )
    cost = e.instrument_us / 1e3
    status = status_of(e, cost, cost)
    collectors = e.collectors_core_share
    if status != HOLDS and collectors > 0.2:
        status = CONTRIBUTING
    return Finding(
        INSTRUMENTATION,
        status,
        f"recording took {e.instrument_us:.0f} µs a request, the agent {collectors:.1%} of a core",
        cost, cost, None, "", "stagescope", None, sure=True,
    )  # fmt: skip


NO_DEVICE = "no device was seen in this run"
NO_CAPTURE = "no capture tells what the device did: `stagescope capture` while the server is loaded"


def _gpu(e: Evidence, kind: str, bound: str, resource: str) -> Finding:
    gpu = e.gpu
    if gpu is None:
        return Finding(kind, RULED_OUT, NO_DEVICE)
    stage = e.stage(gpu.stage)
    spent = gpu.device_ms if gpu.device_ms is not None else stage.own_ms if stage else 0.0
    if kind != GPU_COMPUTE and stage is not None:
        spent = stage.own_ms
    if not gpu.bound:
        if kind == GPU_COMPUTE and (gpu.busy or 0.0) >= NEAR_LIMIT and spent >= 0.3 * e.mean_ms:
            why = f"the device was {gpu.busy:.0%} busy and took {of_mean(e, spent)}"
            return Finding(kind, HOLDS, why, spent, spent, None, gpu.stage, resource, gpu.busy)
        if gpu.busy is not None and kind == GPU_COMPUTE:
            return Finding(kind, RULED_OUT, f"the device was {gpu.busy:.0%} busy")
        return untestable(kind, NO_CAPTURE)
    if gpu.bound != bound:
        return Finding(kind, RULED_OUT, f"captures show `{gpu.stage}` as {gpu.bound}-bound")
    status = status_of(e, spent, spent)
    idle = "" if gpu.idle_share is None else f", the device idle {gpu.idle_share:.0%} of it"
    return Finding(
        kind, status,
        f"captures show `{gpu.stage}` as {bound}-bound, which took {of_mean(e, spent)}{idle}",
        spent, spent, None, gpu.stage, resource, gpu.busy, gpu.kernel, sure=gpu.idle_share is not None,
    )  # fmt: skip


def gpu_compute(e: Evidence) -> Finding:
    """The device's kernels are what requests wait for."""
    return _gpu(e, GPU_COMPUTE, "kernel", "device")


def gpu_launch(e: Evidence) -> Finding:
    """The device waits for the host to launch kernels."""
    return _gpu(e, GPU_LAUNCH, "launch", "launching thread")


def gpu_copy(e: Evidence) -> Finding:
    """Copies to and from the device are what requests wait for."""
    return _gpu(e, GPU_COPY, "copy", "copies")


def gpu_memory(e: Evidence) -> Finding:
    """The device's memory runs short, so that the allocator frees its cache and tries again."""
    gpu = e.gpu
    if gpu is None:
        return Finding(GPU_MEMORY, RULED_OUT, NO_DEVICE)
    if gpu.alloc_retries is None:
        return untestable(GPU_MEMORY, "the allocator was not sampled: load torch in the server")
    retries = gpu.alloc_retries
    each = retries / max(e.requests, 1)
    status = HOLDS if each >= 0.05 else CONTRIBUTING if retries else RULED_OUT
    return Finding(
        GPU_MEMORY, status,
        f"torch's allocator had to free its cache and try again {retries:,.0f} times",
        e.mean_ms * HOLDS_SHARE if status == HOLDS else 0.0, 0.0, None, gpu.stage,
        "device memory", gpu.memory_used_share, sure=each >= 0.5,
    )  # fmt: skip


RULES: tuple[Rule, ...] = (
    client, network, event_loop, threadpool, gil, cpu, dependency, batching, model_capacity,
    gpu_compute, gpu_launch, gpu_copy, gpu_memory, slow_reader, gc, memory, host, cold_start,
    errors, workload, instrumentation,
)  # fmt: skip
"""One a kind, in the order of CAUSES."""
