"""The hooks of web frameworks, model libraries and model loads, as `StageMiddleware` has them installed."""

from __future__ import annotations

import sys

from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.hooks.hook import install_loaded, third_party
from stagescope.middleware.hooks.model_calls import wrap_loaded
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.types import ASGIApp, Scope

WEB_FRAMEWORKS = ("asyncio", "anyio", "starlette", "fastapi", "sse_starlette")
"""Their hooks are installed where the framework is loaded by the time that the app is wrapped."""

MODEL_LIBRARIES = (
    "catboost", "keras", "lightgbm", "onnxruntime", "sentence_transformers", "sklearn.base",
    "tensorflow.python.eager.polymorphic_function.polymorphic_function",
    "transformers.generation.utils", "transformers.pipelines", "xgboost",
)  # fmt: skip
"""Likewise, and again when the app starts: models are often loaded then."""


class FrameworkHooks:
    """The installer that the public package passes to the middleware."""

    def wrapped(self) -> None:
        """Install the hooks of what is loaded, and time model loads."""
        install_loaded(WEB_FRAMEWORKS)
        self.starting()

    def starting(self) -> None:
        """Install the hooks of model libraries that were loaded since, and time their loads."""
        install_loaded(MODEL_LIBRARIES)
        with guarded():
            install_loaded(tuple(third_party()))
        wrap_loaded()

    def opened(self, app: ASGIApp, scope: Scope, middleware: type[StageMiddleware]) -> None:
        """Log once what in a Starlette app keeps *middleware* from seeing whole requests."""
        if "starlette" in sys.modules:
            from stagescope.middleware.hooks.starlette import advise

            advise(app, scope, middleware)
