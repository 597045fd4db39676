"""Which samplers an agent has: all that fit where it runs, or those that `STAGESCOPE_SAMPLERS` names."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from stagescope import settings
from stagescope.agent.collectors import Collector
from stagescope.agent.context import AgentContext
from stagescope.errors import UsageError

_log = logging.getLogger("stagescope")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of sampler: its module has `make(agent) -> Sequence[Collector]`."""

    module: str
    embedded: bool
    """False where it has no place in a served process: it needs an agent of its own."""


KINDS: Mapping[str, Kind] = {
    "gpu": Kind("stagescope.agent.gpu.select", embedded=False),
    "host": Kind("stagescope.agent.host.sampler", embedded=True),
    "torch": Kind("stagescope.agent.torch", embedded=True),
    "kernels": Kind("stagescope.agent.kernels.micro_captures", embedded=False),
    "triggers": Kind("stagescope.agent.triggers.triggers", embedded=True),
    "stacks": Kind("stagescope.agent.stacks.sampler", embedded=True),
    "watchdog": Kind("stagescope.agent.stacks.loop_watchdog", embedded=True),
}
"""By name, in the order of their work."""


class Chosen:
    """Makes the chosen samplers of an agent (`loop.Samplers`)."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(self, agent: AgentContext) -> list[Collector]:
        """Make them; one that has nothing to read here says so itself, once, and gives none."""
        made: list[Collector] = []
        for name in self.names:
            try:
                made += import_module(KINDS[name].module).make(agent)
            except ImportError as missing:
                _log.warning("sampler %s is off: %s", name, missing)
        return made


def chosen(
    asked: str | None = None, *, embedded: bool = False, environment: Mapping[str, str] = os.environ
) -> Chosen:
    """Return the samplers that *asked* (a command line) or the environment names, or all that fit.

    Raises UsageError where the command line names one that there is not.
    """
    text = ",".join(settings.SAMPLERS.names(environment)) if asked is None else asked
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["off"]:
        return Chosen(())
    for name in names:
        if name not in KINDS:
            raise UsageError(
                f"there is no sampler {name!r}; there are {', '.join(KINDS) or 'none'}, "
                "and `off` for none"
            )
    fitting = [name for name, kind in KINDS.items() if kind.embedded or not embedded]
    return Chosen(names or fitting)
