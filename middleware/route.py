"""The template of the route that a request took (`/items/{id}`), from what routers leave in its scope.

A path has as many values as there are items; a template has one.
"""

from __future__ import annotations

from typing import Any

from stagescope.middleware.types import Scope

MOUNT_KEY = "stagescope.mount"
"""Scope key of the hook for Starlette: (prefix of all mounts so far, route at the innermost)."""


def template(scope: Scope) -> bytes:
    """Return the template as UTF-8; empty where no router left one."""
    route: Any = scope.get("route")
    mounted = scope.get(MOUNT_KEY)
    prefix, outer_route = mounted or ("", None)
    if mounted and route is outer_route:  # The mounted app has no routes.
        path: object = "/{path}"
    elif route is None:
        return b""
    else:
        path = _included(scope, route) or getattr(route, "path_format", None)
        path = path or getattr(route, "path", None)
    return (prefix + path).encode("utf-8", "replace") if isinstance(path, str) else b""


def _included(scope: Scope, route: Any) -> object:
    """Newer FastAPI keeps what `include_router(prefix=...)` put before a route apart from it."""
    own = scope.get("fastapi")
    context = own.get("effective_route_context") if isinstance(own, dict) else None
    if context is None or getattr(context, "original_route", None) is not route:
        return None
    return getattr(context, "path_format", None)
