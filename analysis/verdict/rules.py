"""The rules on what a server waits for: each looks at the whole evidence and says of one kind
whether it holds the server back, by which number.

A rule is a function from Evidence to Finding. RULES, and those that installed packages bring as
entry points of the group `stagescope.verdicts`, are asked of every run (judge.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from stagescope.analysis.verdict.model import (
    BATCHING,
    CONTRIBUTING,
    CPU,
    EVENT_LOOP,
    GC,
    GIL,
    HOLDS,
    HOST,
    MODEL_CAPACITY,
    RULED_OUT,
    THREADPOOL,
    UNTESTABLE,
    Evidence,
    Finding,
    StageFacts,
    WaitFacts,
)

Rule = Callable[[Evidence], Finding]

HOLDS_SHARE = 0.25
"""Of the mean latency, or twice as much of the slowest requests': so much holds a server back."""
PART_SHARE = 0.08
"""So much contributes."""
LEAST_MS = 1.0
"""A shorter wait is what timers and schedulers do to anybody."""
NEAR_LIMIT = 0.7
"""Of a resource: beyond it queues grow fast."""

NO_WAITS = "waits were not measured: run `stagescope agent` beside the server, on its host"
NO_HOST = "the host was not sampled for the whole run: run `stagescope agent` beside the server"


def weight(e: Evidence, cost_ms: float, slowest_ms: float) -> float:
    """Return how much of latency a cost is, of the mean or half of the slowest requests'."""
    of_mean = cost_ms / e.mean_ms if e.mean_ms else 0.0
    of_slowest = slowest_ms / e.slowest_ms / 2 if e.slowest_ms else 0.0
    return max(of_mean, of_slowest)


def status_of(e: Evidence, cost_ms: float, slowest_ms: float) -> str:
    """Return what a cost makes of its kind."""
    found = weight(e, cost_ms, slowest_ms)
    if found >= HOLDS_SHARE and max(cost_ms, slowest_ms / 2) >= LEAST_MS:
        return HOLDS
    return CONTRIBUTING if found >= PART_SHARE and cost_ms >= LEAST_MS / 2 else RULED_OUT


def of_mean(e: Evidence, cost_ms: float) -> str:
    """Return a cost as words: how many ms of how many."""
    share = cost_ms / e.mean_ms if e.mean_ms else 0.0
    return f"{cost_ms:,.1f} of {e.mean_ms:,.1f} ms ({share:.0%})"


def place(where: str) -> str:
    """Return a line with its file's name alone: `function (file:line)`."""
    return re.sub(r"\(.*/", "(", where)


def untestable(kind: str, why: str) -> Finding:
    """Return that *kind* can't be judged, since evidence is missing."""
    return Finding(kind, UNTESTABLE, why.partition(":")[0], missing=why)


def _wait(e: Evidence, cause: str) -> WaitFacts:
    return e.wait(cause) or WaitFacts(cause, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def _gc_in_loop(e: Evidence) -> float:
    """Return the share of the busiest loop's work that was garbage collection."""
    return min(1.0, (e.gc_share or 0.0) / e.loop_busy) if e.loop_busy else 0.0


def event_loop(e: Evidence) -> Finding:
    """Code that runs on the event loop keeps other requests from going on."""
    if not measured(e):
        return untestable(EVENT_LOOP, NO_WAITS)
    wait = _wait(e, "event_loop")
    own = max(0.0, 1 - _gc_in_loop(e) - e.loop_starved)
    cost, slowest = wait.mean_ms * own, wait.slowest_ms * own
    status = status_of(e, cost, slowest)
    if status == HOLDS and cold(e):
        status = CONTRIBUTING
    busy = f", the loop {e.loop_busy:.0%} busy" if e.loop_busy is not None else ""
    holder = f", {wait.holder_share:.0%} of it for {wait.holder}" if wait.holder else ""
    line = f", {place(wait.where)}" if wait.where and wait.holder else ""
    starved = f", {e.loop_starved:.0%} of that without a core" if e.loop_starved > 0.1 else ""
    return Finding(
        EVENT_LOOP,
        status,
        f"requests waited {of_mean(e, wait.mean_ms)} for the event loop{holder}{line}{busy}{starved}",
        cost, slowest, wait.p50_ms * own, wait.holder, "event loop", e.loop_busy, wait.where,
        sure=wait.low_ms >= wait.mean_ms / 2 and (e.loop_busy or 0.0) >= NEAR_LIMIT,
    )  # fmt: skip


def measured(e: Evidence) -> bool:
    """Return whether waits were measured in this run."""
    return e.loop_busy is not None or bool(e.waits)


def cold(e: Evidence) -> bool:
    """Return whether most of the latency above the usual is the run's begin's."""
    return (
        e.cold_ms is not None
        and e.requests > 0
        and e.cold_ms * e.cold_requests / e.requests >= 0.3 * e.mean_ms
    )


def threadpool(e: Evidence) -> Finding:
    """All worker threads are busy, and requests wait for one."""
    if not measured(e):
        return untestable(THREADPOOL, NO_WAITS)
    stage = e.stage("queue.threadpool")
    if stage is None or stage.own_ms < LEAST_MS / 10:
        waited = 0.0 if stage is None else stage.own_ms
        return Finding(THREADPOOL, RULED_OUT, f"requests waited {waited:.1f} ms for a thread")
    busiest = max(e.stages, key=lambda one: one.thread_ms or 0.0)
    used = _share(e.threads_busy, e.threads_max)
    status = status_of(e, stage.own_ms, stage.own_slowest_ms)
    # Threads that wait for one another inside a stage are what the pool ran out of.
    if status == HOLDS and crowded(busiest) >= busiest.own_ms / 2:
        status = CONTRIBUTING
    return Finding(
        THREADPOOL,
        status,
        f"requests waited {of_mean(e, stage.own_ms)} for a worker thread; at most "
        f"{e.threads_max} worked at once, {e.threads_busy or 0:.1f} on average",
        stage.own_ms, stage.own_slowest_ms, stage.own_p50_ms, busiest.name, "worker threads",
        used, busiest.where, sure=(used or 0.0) >= NEAR_LIMIT,
    )  # fmt: skip


def _share(part: float | None, whole: float | None) -> float | None:
    return min(1.0, part / whole) if part is not None and whole else None


def gil(e: Evidence) -> Finding:
    """Threads that compute in Python keep one another, and the loop, from the interpreter."""
    if not measured(e):
        return untestable(GIL, NO_WAITS)
    wait = _wait(e, "gil")
    busiest = max(e.stages, key=lambda one: one.thread_ms or 0.0, default=None)
    computing = e.threads_computing or 0.0
    status = status_of(e, wait.mean_ms, wait.slowest_ms)
    if status == HOLDS and computing < 0.3:
        status = CONTRIBUTING
    return Finding(
        GIL,
        status,
        f"threads waited {of_mean(e, wait.mean_ms)} for the interpreter's lock (between "
        f"{wait.low_ms:.1f} and {wait.high_ms:.1f}), worker threads used {computing:.2f} cores",
        wait.mean_ms, wait.slowest_ms, wait.p50_ms, busiest.name if busiest else "",
        "interpreter lock", min(1.0, computing + (e.loop_busy or 0.0)),
        busiest.where if busiest else "", sure=computing >= NEAR_LIMIT,
    )  # fmt: skip


def gc(e: Evidence) -> Finding:
    """Garbage collections stop the process."""
    if not measured(e):
        return untestable(GC, NO_WAITS)
    wait = _wait(e, "gc")
    part = _gc_in_loop(e)
    queued = _wait(e, "event_loop")
    cost = wait.mean_ms + part * queued.mean_ms
    slowest = wait.slowest_ms + part * queued.slowest_ms
    running = next((one.name for one in e.stages if one.waits_ms.get("gc", 0.0) > 0), "")
    most = max(e.stages, key=lambda one: one.waits_ms.get("gc", 0.0), default=None)
    return Finding(
        GC,
        status_of(e, cost, slowest),
        f"collections ran {e.gc_share or 0:.0%} of the time and cost {of_mean(e, cost)}",
        cost, slowest, None, most.name if most and running else "", "garbage collector",
        e.gc_share, sure=(e.gc_share or 0.0) >= 0.2,
    )  # fmt: skip


def _queued(e: Evidence) -> WaitFacts:
    """Return what requests waited for a core: themselves, or behind a loop that had none."""
    own, loop, share = _wait(e, "cpu"), _wait(e, "event_loop"), e.loop_starved
    return replace(
        own,
        mean_ms=own.mean_ms + share * loop.mean_ms,
        p50_ms=own.p50_ms + share * loop.p50_ms,
        slowest_ms=own.slowest_ms + share * loop.slowest_ms,
    )


def _others_cores(e: Evidence) -> float | None:
    """Return the cores that neither the server nor its driver nor our agent used."""
    host = e.host
    if host.busy_cores is None or host.server_cores is None or host.sampled_share < LEAST_SAMPLED:
        return None
    ours = host.server_cores + (host.driver_cores or 0.0) + (host.agent_cores or 0.0)
    return max(0.0, host.busy_cores - ours)


LEAST_USED = 0.5
"""Of its cores: a server that uses less is not held back by them."""
LEAST_SAMPLED = 0.6
"""Of the run's time: what samples say of less is not said of the run."""


def cpu(e: Evidence) -> Finding:
    """The server's own computing uses up the cores."""
    if not measured(e):
        return untestable(CPU, NO_WAITS)
    wait, host, others = _queued(e), e.host, _others_cores(e)
    if others is None or host.server_cores is None:
        if status_of(e, wait.mean_ms, wait.slowest_ms) == RULED_OUT:
            return Finding(CPU, RULED_OUT, f"threads waited {of_mean(e, wait.mean_ms)} for a core")
        return untestable(CPU, NO_HOST)
    limit = host.cgroup_limit or host.cores
    busiest = max(e.stages, key=lambda one: one.computed_ms or 0.0, default=None)
    used = min(1.0, host.server_cores / limit)
    status = status_of(e, wait.mean_ms, wait.slowest_ms)
    # Threads of a library that collide for a moment wait too, on a machine that is idle.
    if status == HOLDS and (others > host.server_cores or used < LEAST_USED):
        status = CONTRIBUTING
    return Finding(
        CPU,
        status,
        f"threads waited {of_mean(e, wait.mean_ms)} for a core; the server used "
        f"{host.server_cores:.1f} of {limit:g} cores, others {others:.1f}",
        wait.mean_ms, wait.slowest_ms, wait.p50_ms, busiest.name if busiest else "", "cores",
        used, busiest.where if busiest else "", sure=used >= NEAR_LIMIT,
    )  # fmt: skip


def host(e: Evidence) -> Finding:
    """Others take the cores, the cgroup is throttled, or the process was stopped."""
    if not measured(e):
        return untestable(HOST, NO_WAITS)
    wait, stopped, others = _queued(e), _wait(e, "stopped"), _others_cores(e)
    throttled = e.host.throttled_share or 0.0
    if others is None and status_of(e, wait.mean_ms, wait.slowest_ms) != RULED_OUT:
        return untestable(HOST, NO_HOST)
    taken = others is not None and others > (e.host.server_cores or 0.0)
    cost = stopped.mean_ms + (wait.mean_ms if taken or throttled > 0.05 else 0.0)
    slowest = stopped.slowest_ms + (wait.slowest_ms if taken or throttled > 0.05 else 0.0)
    words = [f"threads waited {of_mean(e, wait.mean_ms)} for a core"]
    if others is not None:
        words.append(f"other processes used {others:.1f} of {e.host.cores} cores")
    if throttled:
        words.append(f"the cgroup was throttled {throttled:.0%} of the time")
    if stopped.mean_ms:
        words.append(f"the process was stopped for {of_mean(e, stopped.mean_ms)}")
    return Finding(
        HOST,
        status_of(e, cost, slowest),
        ", ".join(words),
        cost, slowest, None, "", "cores", _share(e.host.busy_cores, e.host.cores),
        sure=(others or 0.0) >= NEAR_LIMIT or throttled > 0.2 or stopped.mean_ms > 0,
    )  # fmt: skip


def batching(e: Evidence) -> Finding:
    """The batcher's own delay, not its worker, is what requests wait for."""
    if not e.batches:
        return Finding(BATCHING, RULED_OUT, "no batch was formed")
    if not measured(e):
        return untestable(BATCHING, NO_WAITS)
    cost = e.forming_ms
    stage = "batch" if (e.stage("batch.wait") or e.stage("queue.batch")) else ""
    return Finding(
        BATCHING,
        status_of(e, cost, e.forming_slowest_ms),
        f"requests waited {of_mean(e, cost)} for their batch to form while no batch was at work; "
        f"it had {e.batch_size:.1f} members on average, {e.batch_max} at most",
        cost, e.forming_slowest_ms, e.forming_p50_ms, stage, "batch delay", None,
        sure=(e.batch_busy or 0.0) < NEAR_LIMIT,
    )  # fmt: skip


QUEUED = 2.0
"""So many times what it takes with few others: most of a stage's time is a queue inside it."""


def crowded(stage: StageFacts) -> float:
    """Return what of a stage's own time is there because others are in it, ms."""
    if stage.per_other_ms is None or not stage.others:
        return 0.0
    if stage.few_ms is not None and stage.own_p50_ms >= QUEUED * stage.few_ms:
        # Not by the slope: it is too flat where only so many can be at it at once.
        return max(0.0, stage.own_ms - stage.few_ms)
    by_slope = min(stage.own_ms, stage.per_other_ms * stage.others)
    alone_ms = 0.0 if stage.alone_ms is None else stage.alone_ms
    return max(0.0, min(by_slope, stage.own_ms - alone_ms))


def model_capacity(e: Evidence) -> Finding:
    """The model's workers are busy, and requests queue for them."""
    if not e.stages:
        return untestable(MODEL_CAPACITY, NO_WAITS)
    names = ("queue.worker", "queue.batch", "batch.wait")
    queues = [one for one in map(e.stage, names) if one is not None]
    queued = max(0.0, sum(one.own_ms for one in queues) - e.forming_ms)
    slowest = max(0.0, sum(one.own_slowest_ms for one in queues) - e.forming_slowest_ms)
    p50 = max(0.0, sum(one.own_p50_ms for one in queues) - e.forming_p50_ms)
    model = e.stage("inference")
    inside = crowded(model) if model else 0.0
    idle = 0.0 if model is None or model.idle_ms is None else model.idle_ms
    inside = min(inside, idle)
    if model and inside:
        slowest += model.own_slowest_ms * inside / model.own_ms
        p50 += model.own_p50_ms * inside / model.own_ms
    cost = queued + inside
    busy = e.batch_busy if e.batches else _busy(e, model)
    words = f"requests queued {of_mean(e, cost)} for the model"
    if model and inside > queued:
        words += f", inside `inference`: {inside:.1f} of its {model.own_ms:.1f} ms are for others"
    if busy is not None:
        words += f"; it was busy {busy:.0%} of the time"
    return Finding(
        MODEL_CAPACITY,
        status_of(e, cost, slowest),
        words,
        cost, slowest, p50, "inference", "model workers", busy, model.where if model else "",
        sure=(busy or 0.0) >= NEAR_LIMIT or queued > inside,
    )  # fmt: skip


def _busy(e: Evidence, model: StageFacts | None) -> float | None:
    """Return how busy one model is, by the utilisation law, where requests take turns at it."""
    if model is None or model.per_other_ms is None or not e.achieved_per_s:
        return None
    each = model.alone_ms if model.alone_ms is not None else model.per_other_ms
    return min(1.0, e.achieved_per_s * each / 1e3) if each > 0 else None
