"""Ray: how the hook comes into the worker processes, which are started by the cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

log = logging.getLogger("stagescope")

SETUP = "worker_process_setup_hook"

# Pickled by value, as code of `__main__`: on a host without stagescope it does nothing, where a
# function of ours by name would keep every worker from starting.
_SOURCE = """
def stagescope_setup():
    try:
        from stagescope import install
        from stagescope.middleware.guard import guarded
    except ImportError:
        return
    with guarded():
        install("ray.serve")
"""


def initialising(init: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `ray.init`: the job's workers install the hook when they start."""

    def init_with_setup(*args: Any, **kwargs: Any) -> Any:
        kwargs["runtime_env"] = with_setup(kwargs.get("runtime_env"))
        return init(*args, **kwargs)

    return init_with_setup


def with_setup(runtime_env: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Add our setup to a runtime environment; one that has a setup of its own stays as it is."""
    if runtime_env and SETUP in runtime_env:
        log.warning(
            "stagescope: the runtime environment has a %s of its own: "
            "call stagescope.install('ray.serve') in it, or the replicas are not timed",
            SETUP,
        )
        return runtime_env
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(_SOURCE, names)  # noqa: S102 - a text of ours, and nothing else
    return {**(runtime_env or {}), SETUP: names["stagescope_setup"]}


def warn_if_late(ray: Any) -> None:
    """Say that the workers of a cluster which this driver has joined already are not timed."""
    if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.SCRIPT_MODE:
        log.warning(
            "stagescope: ray.init came before stagescope.install('ray.serve'): "
            "the workers of this job are not timed unless they were started by `stagescope run`"
        )
