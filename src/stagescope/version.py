"""The version that this stagescope says it is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """Give the installed version; `source` where stagescope runs from a source tree."""
    try:
        return installed_version("stagescope")
    except PackageNotFoundError:
        return "source"
