"""A discrete-event simulation (simpy) of a pipeline: open-loop arrivals, queues, batches."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import simpy

from stagescope.analysis.whatif.model import BATCH, DELAY, LOOP, Batcher, Pipeline, Request, Times

Floats = npt.NDArray[np.float64]
Step = Generator[simpy.Event, Any, None]

Arrivals = Sequence[tuple[float, bool]]
"""When each request is sent, ms, and whether that is in the measured phase."""

SAME_SIZE = 3
"""A size that was met less often takes its times from the next one that was not."""
BLOCK_MS = 1000.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run, measured or simulated, shows a client."""

    p50_ms: float
    p99_ms: float
    throughput_per_s: float

    def of(self, name: str) -> float:
        """Return the figure called *name*."""
        value: float = getattr(self, name)
        return value


FIGURES = ("p50_ms", "p99_ms", "throughput_per_s")


def figures(latency_ms: Floats, ends_ms: Floats, measured: npt.NDArray[np.bool_],
            pipeline: Pipeline) -> Figures:  # fmt: skip
    """Return the figures of requests; throughput as the report counts it."""
    since = ends_ms - pipeline.begin_ms
    inside = int(((since >= 0) & (since <= pipeline.measured_ms)).sum())
    p50, p99 = np.quantile(latency_ms[measured], [0.5, 0.99])
    return Figures(float(p50), float(p99), inside / pipeline.measured_ms * 1e3)


def measured_figures(pipeline: Pipeline) -> Figures:
    """Return what the run itself showed."""
    latency = np.array([one.latency_ms for one in pipeline.requests])
    ends = latency + np.array([one.at_ms for one in pipeline.requests])
    return figures(latency, ends, np.array([one.measured for one in pipeline.requests]), pipeline)


class Moved:
    """Which moment of the measured run a moment of the simulated one is like.

    Blocks of the measured run follow one another as drawn, so that times that belong together, of
    a minute in which the machine was slow, stay together.
    """

    def __init__(self, whole_ms: float, random: np.random.Generator | None) -> None:
        """*random* draws the blocks; None: the run as it was."""
        self._whole_ms = whole_ms
        self._random = random
        self._starts: list[float] = []

    def __call__(self, at_ms: float) -> float:
        """Return the moment, ms since the measured run's beginning."""
        if self._random is None:
            return at_ms
        block, within = divmod(at_ms, BLOCK_MS)
        while len(self._starts) <= block:
            self._starts.append(float(self._random.uniform(0, self._whole_ms)))
        return (self._starts[int(block)] + within) % self._whole_ms


class Scenario:
    """A pipeline with its changes worked in, ready to be simulated many times."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.at = [one.at_ms for one in pipeline.requests]
        self.works = [_lengths(pipeline, one) for one in pipeline.requests]
        self.services = {
            name: _Service(pipeline, batcher) for name, batcher in pipeline.batchers.items()
        }

    def like(self, at_ms: float) -> int:
        """Return which request was sent next at that moment of the measured run."""
        return bisect_left(self.at, at_ms) % len(self.at)

    def run(
        self,
        arrivals: Arrivals,
        random: np.random.Generator,
        *,
        as_it_was: bool,
        slower: float = 1.0,
    ) -> Figures:
        """Simulate once; *as_it_was*: with the measured times where they were measured.

        On a machine that takes *slower* times as long for all that it computes.
        """
        env = simpy.Environment()
        pipeline = self.pipeline
        whole_ms = max(self.at[-1], pipeline.begin_ms + pipeline.measured_ms)
        moved = Moved(whole_ms, None if as_it_was else random)
        processes = [_Process(env, self, moved, slower) for _ in range(pipeline.processes)]
        chosen = random.integers(len(processes), size=len(arrivals)).tolist()
        ends = np.zeros(len(arrivals))

        def request(index: int, at_ms: float) -> Step:
            like = index if as_it_was else self.like(moved(at_ms))
            one = pipeline.requests[like]
            yield env.timeout(at_ms)
            process = processes[chosen[index] if pipeline.spread else one.process]
            yield from process.serve(self.works[like])
            ends[index] = env.now + one.after_ms

        for index, (at_ms, _) in enumerate(arrivals):
            env.process(request(index, at_ms))
        env.run()
        at = np.array([at for at, _ in arrivals])
        measured = np.array([inside for _, inside in arrivals])
        return figures(ends - at, ends, measured, pipeline)


def _lengths(pipeline: Pipeline, request: Request) -> list[tuple[str, str, float]]:
    """Return the works of *request* with their lengths as the changes have them, ms."""
    shifted: set[str] = set()
    return [
        (work.needs, work.where, changed_ms(pipeline, work.times, shifted))
        for work in request.works
    ]


def changed_ms(pipeline: Pipeline, times: Times, shifted: set[str]) -> float:
    """Return how long *times* take together; *shifted* are the stages that had their extra time."""
    spent = 0.0
    for stage, ms in times:
        for name, factor in pipeline.scale.items():
            if stage == name or stage.startswith(f"{name}."):
                ms *= factor
        for name, more in pipeline.shift.items():
            if name not in shifted and (stage == name or stage.startswith(f"{name}.")):
                shifted.add(name)
                ms = max(0.0, ms + more)
        spent += ms
    return spent


class _Process:
    """One process of the server: its event loop, its pools, its batchers."""

    def __init__(
        self, env: simpy.Environment, scenario: Scenario, moved: Moved, slower: float
    ) -> None:
        self._env = env
        self._slower = slower
        self.loop = simpy.Resource(env, 1)
        self.pools: dict[str, simpy.Resource | None] = {
            name: simpy.Resource(env, pool.size) if pool.size else None
            for name, pool in scenario.pipeline.pools.items()
        }
        self.batchers = {
            name: _Batching(env, batcher, scenario.services[name], moved, slower)
            for name, batcher in scenario.pipeline.batchers.items()
        }

    def serve(self, works: Sequence[tuple[str, str, float]]) -> Step:
        """Do what one request needs, one work after the other."""
        for needs, where, spent in works:
            if needs == DELAY:
                yield self._env.timeout(spent)
            elif needs == BATCH:
                yield self.batchers[where].join()
            elif (resource := self.loop if needs == LOOP else self.pools[where]) is None:
                yield self._env.timeout(spent * self._slower)
            else:
                with resource.request() as turn:
                    yield turn
                    yield self._env.timeout(spent * self._slower)


class _Batching:
    """One batcher: who waits for it, and its workers."""

    def __init__(
        self,
        env: simpy.Environment,
        batcher: Batcher,
        service: _Service,
        moved: Moved,
        slower: float,
    ) -> None:
        self._env = env
        self._slower = slower
        self._batcher = batcher
        self._service = service
        self._moved = moved
        self._waiting = simpy.Store(env)
        for _ in range(batcher.workers):
            env.process(self._work())

    def join(self) -> simpy.Event:
        """Return the event of the batch that one more request becomes a member of."""
        done = self._env.event()
        self._waiting.put(done)
        return done

    def _work(self) -> Step:
        while True:
            members = [(yield self._waiting.get())]
            since = self._moved(self._env.now)
            yield from self._gather(members)
            yield self._env.timeout(self._service.of(len(members), since) * self._slower)
            for done in members:
                done.succeed()
            if self._batcher.turnaround_ms:
                yield self._env.timeout(self._batcher.turnaround_ms)

    def _gather(self, members: list[simpy.Event]) -> Step:
        most = self._batcher.max_size
        late = self._env.timeout(self._batcher.delay_ms)
        while most is None or len(members) < most:
            if self._waiting.items:  # What waits already is taken, also after the delay.
                members.append((yield self._waiting.get()))
                continue
            if late.processed:
                return
            more = self._waiting.get()
            yield late | more
            if not more.triggered:
                more.cancel()
                return
            members.append(cast(simpy.Event, more.value))


class _Service:
    """How long a batch of some size takes: as the measured one of this size that is nearest."""

    def __init__(self, pipeline: Pipeline, batcher: Batcher) -> None:
        self._by_size: dict[int, tuple[list[float], list[float]]] = {}
        for one in batcher.batches:
            at, spent = self._by_size.setdefault(one.size, ([], []))
            at.append(one.at_ms)
            spent.append(changed_ms(pipeline, one.times, set()))
        often = [size for size, (at, _) in self._by_size.items() if len(at) >= SAME_SIZE]
        self._known = sorted(often or self._by_size)
        self._slope, self._base = _line({size: t for size, (_, t) in self._by_size.items()})

    def of(self, size: int, at_ms: float) -> float:
        """Return how long a batch of *size* takes, ms, at a moment of the measured run."""
        at = bisect_left(self._known, size)
        near = min(self._known[max(0, at - 1) : at + 1], key=lambda known: abs(known - size))
        starts, spent = self._by_size[near]
        index = bisect_left(starts, at_ms)
        around = range(max(0, index - 1), min(index + 1, len(starts)))
        taken = spent[min(around, key=lambda each: abs(starts[each] - at_ms))]
        line = self._base + self._slope * near
        # Of another size: as much longer or shorter as the line says.
        return taken * (self._base + self._slope * size) / line if near != size and line else taken


def _line(by_size: dict[int, list[float]]) -> tuple[float, float]:
    """Return slope and base of a batch's time by its size; neither is below 0."""
    sizes = np.array(list(by_size), float)
    times = np.array([median(all_) for all_ in by_size.values()])
    counts = np.array([len(all_) for all_ in by_size.values()], float)
    if len(sizes) < 2:
        return 0.0, float(times[0])
    slope, base = (float(each) for each in np.polyfit(sizes, times, 1, w=np.sqrt(counts)))
    if base < 0:
        return float((times * counts).sum() / (sizes * counts).sum()), 0.0
    return (slope, base) if slope > 0 else (0.0, float((times * counts).sum() / counts.sum()))
