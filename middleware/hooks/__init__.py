"""Hooks: one module a framework, the only place that imports it; nothing is patched on import.

Each module offers `HOOK`, a `Hook`; `HOOKS` names the modules, so that none is loaded before its
framework is. A user calls `stagescope.install("litserve")`, or starts the server with
`stagescope run`, which installs each hook when its framework is imported.
"""

from __future__ import annotations

HOOKS: dict[str, str] = {
    "anyio": "stagescope.middleware.hooks.anyio",
    "bentoml": "stagescope.middleware.hooks.bentoml",
    "fastapi": "stagescope.middleware.hooks.fastapi",
    "granian": "stagescope.middleware.hooks.granian",
    "gunicorn.workers.gasgi": "stagescope.middleware.hooks.gunicorn",
    "hypercorn": "stagescope.middleware.hooks.hypercorn",
    "litserve": "stagescope.middleware.hooks.litserve",
    "mlserver": "stagescope.middleware.hooks.mlserver",
    "onnxruntime": "stagescope.middleware.hooks.onnxruntime",
    "pytriton": "stagescope.middleware.hooks.pytriton",
    "ray.serve": "stagescope.middleware.hooks.ray",
    "starlette": "stagescope.middleware.hooks.starlette",
    "transformers.generation.utils": "stagescope.middleware.hooks.transformers_generation",
    "transformers.pipelines": "stagescope.middleware.hooks.transformers",
    "ts.service": "stagescope.middleware.hooks.torchserve",
    "uvicorn": "stagescope.middleware.hooks.uvicorn",
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
