# mypy: disable-error-code="untyped-decorator,misc"
"""Real BentoML services whose stages last as long as each request asks; see the tests."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Generator
from typing import Any

import bentoml

import stagescope

if os.environ.get("BY_HAND") != "no":
    stagescope.install("bentoml")


class Failed(Exception):
    """The user's own error."""


def work(wanted: dict[str, Any]) -> None:
    """Take the time that the request asks for, and fail or die if it says so."""
    time.sleep(wanted["predict"])
    if wanted.get("fail"):
        raise Failed
    if wanted.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)


@bentoml.service(traffic={"timeout": 30})
class Inner:
    """Called by the other service."""

    @bentoml.api
    def predict(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Take as long as the request says."""
        work(wanted)
        return wanted


@bentoml.service(traffic={"timeout": 30})
class Outer:
    """What clients call."""

    inner = bentoml.depends(Inner)

    @bentoml.api
    def plain(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Work on a thread."""
        with stagescope.stage("preprocess"):
            time.sleep(wanted["decode"])
        work(wanted)
        return wanted

    @bentoml.api
    async def nested(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Let the other service work."""
        result: dict[str, Any] = await self.inner.to_async.predict(wanted=wanted)
        return result

    @bentoml.api(batchable=True, max_batch_size=4, max_latency_ms=20000)
    def batched(self, wanted: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take as long as the slowest member says."""
        work(max(wanted, key=lambda one: one["predict"]))
        return wanted

    @bentoml.api
    def stream(self, wanted: dict[str, Any]) -> Generator[str, None, None]:
        """Take a third of the time for each chunk."""
        for _ in range(3):
            time.sleep(wanted["predict"] / 3)
            yield "chunk\n"

    @bentoml.api
    async def async_stream(self, wanted: dict[str, Any]) -> AsyncGenerator[str, None]:
        """Take a third of the time for each chunk."""
        for _ in range(3):
            await asyncio.sleep(wanted["predict"] / 3)
            yield "chunk\n"
