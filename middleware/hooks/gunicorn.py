"""gunicorn's own ASGI worker (`-k asgi`); with uvicorn's worker it is uvicorn's hook that wraps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagescope.middleware.hooks.hook import Hook, wrap
from stagescope.middleware.hooks.outermost import outermost


def _install() -> None:
    from gunicorn.workers.gasgi import ASGIWorker  # type: ignore[import-untyped]

    wrap(ASGIWorker, "load_wsgi", _loading)


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_and_wrap(worker: Any) -> None:
        load(worker)
        worker.asgi = outermost(worker.asgi)

    return load_and_wrap


HOOK = Hook("gunicorn.workers.gasgi", "gunicorn", ("24", "28"), _install)
