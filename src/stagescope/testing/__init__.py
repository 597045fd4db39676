"""What stagescope's own tests use and yours may: conditions to wait for, recorder files to read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], timeout_s: float = 10.0) -> T:
    """Ask *predicate* until it returns something truthy, and return that.

    Raises AssertionError where it has not within *timeout_s*.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {timeout_s} s: {predicate}")
        time.sleep(0.005)
    return value
