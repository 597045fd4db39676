"""FastAPI: validation and dependencies, the endpoint, serialization.

What FastAPI takes from Starlette and anyio (bodies, threads, JSON, mounts) is timed by their hooks.
"""

from __future__ import annotations

import fastapi.routing

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.starlette import PARSE, SERIALIZE, staged
from stagescope.middleware.hooks.streams import ENDPOINT
from stagescope.middleware.patching import wrap


def _install() -> None:
    wrap(fastapi.routing, "solve_dependencies", staged(PARSE))
    wrap(fastapi.routing, "run_endpoint_function", staged(ENDPOINT))
    wrap(fastapi.routing, "serialize_response", staged(SERIALIZE))


HOOK = Hook("fastapi", "fastapi", ("0.110", "1"), _install)
