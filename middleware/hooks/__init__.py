"""Hooks: one module a framework, the only place that imports it; nothing is patched on import.

Each module offers `HOOK`, a `Hook`; `HOOKS` names the modules, so that none is loaded before its
framework is. A user calls `stagescope.install("litserve")`, or starts the server with
`stagescope run`, which installs each hook when its framework is imported.
"""

from __future__ import annotations

HOOKS: dict[str, str] = {
    "mlserver": "stagescope.middleware.hooks.mlserver",
    "ray.serve": "stagescope.middleware.hooks.ray",
}
"""Framework's import name → our module, both by name alone."""
