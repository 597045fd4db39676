"""Hooks: one module a framework, the only place that imports it; nothing is patched on import.

`HOOKS` names the `Hook` of each framework by module and attribute, so that none is loaded before
its framework is. A user calls `stagescope.install("litserve")`, or starts the server with
`stagescope run`, which installs each hook when its framework is imported.
"""

from __future__ import annotations

HOOKS: dict[str, str] = {
    "anyio": "stagescope.middleware.hooks.anyio:HOOK",
    "asyncio": "stagescope.middleware.hooks.executors:HOOK",
    "concurrent.futures.process": "stagescope.middleware.hooks.executors:PROCESSES",
    "bentoml": "stagescope.middleware.hooks.bentoml:HOOK",
    "catboost": "stagescope.middleware.hooks.boosting:CATBOOST",
    "fastapi": "stagescope.middleware.hooks.fastapi:HOOK",
    "granian": "stagescope.middleware.hooks.asgi_servers:GRANIAN",
    "gunicorn.workers.gasgi": "stagescope.middleware.hooks.asgi_servers:GUNICORN",
    "hypercorn": "stagescope.middleware.hooks.asgi_servers:HYPERCORN",
    "keras": "stagescope.middleware.hooks.keras:HOOK",
    "lightgbm": "stagescope.middleware.hooks.boosting:LIGHTGBM",
    "litserve": "stagescope.middleware.hooks.litserve.server:HOOK",
    "mlserver": "stagescope.middleware.hooks.mlserver:HOOK",
    "onnxruntime": "stagescope.middleware.hooks.onnxruntime:HOOK",
    "pytriton": "stagescope.middleware.hooks.pytriton:HOOK",
    "ray.serve": "stagescope.middleware.hooks.ray.install:HOOK",
    "sentence_transformers": "stagescope.middleware.hooks.sentence_transformers:HOOK",
    "sklearn.base": "stagescope.middleware.hooks.sklearn:HOOK",
    "sse_starlette": "stagescope.middleware.hooks.sse_starlette:HOOK",
    "starlette": "stagescope.middleware.hooks.starlette:HOOK",
    "tensorflow.python.eager.polymorphic_function.polymorphic_function": (
        "stagescope.middleware.hooks.keras:FUNCTIONS_HOOK"
    ),
    "transformers.generation.utils": "stagescope.middleware.hooks.transformers:GENERATION",
    "transformers.pipelines": "stagescope.middleware.hooks.transformers:PIPELINES",
    "ts.service": "stagescope.middleware.hooks.torchserve.worker:HOOK",
    "uvicorn": "stagescope.middleware.hooks.asgi_servers:UVICORN",
    "xgboost": "stagescope.middleware.hooks.boosting:XGBOOST",
}
"""Framework's import name → our module, both by name alone."""

LOADS: dict[str, tuple[str, ...]] = {
    "torch": ("load",),
    "torch.jit": ("load",),
    "torch.nn.modules.module": ("Module.load_state_dict", "Module.to"),
    "safetensors.torch": ("load_file",),
    "transformers.modeling_utils": ("PreTrainedModel.from_pretrained",),
    "transformers.tokenization_utils_base": ("PreTrainedTokenizerBase.from_pretrained",),
    "onnxruntime.capi.onnxruntime_inference_collection": ("InferenceSession.__init__",),
}
"""Module → what in it loads a model; wrapped once the module is loaded."""
