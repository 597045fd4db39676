# mypy: disable-error-code="override,misc,type-arg"
"""A real LitServe server whose stages last as long as each request asks.

A request is `{"decode": s, "predict": s, "encode": s, "fail": STAGE or "", "die": bool}`.
Usage: server.py PORT MODE, MODE being plain, batched, async, stream or batched-stream.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import litserve as ls
from fastapi import Request

import stagescope

if os.environ.get("BY_HAND") != "no":
    stagescope.install("litserve")

CHUNKS = 3


class Failed(Exception):
    """The user's own error."""


def work(wanted: dict[str, Any], step: str) -> None:
    """Take the time that the request asks for *step*, and fail or die there if it says so."""
    time.sleep(wanted[step])
    if wanted.get("fail") == step:
        raise Failed(step)
    if wanted.get("die") == step:
        os.kill(os.getpid(), signal.SIGKILL)


class Plain(ls.LitAPI):
    """One request after the other."""

    def setup(self, device: str) -> None:
        """Load nothing."""

    def decode_request(self, request: Request) -> Any:
        """Take as long as the request says."""
        wanted: Any = request  # LitServe has read the JSON by now; the type chooses that.
        work(wanted, "decode")
        return wanted

    def predict(self, x: dict[str, Any]) -> Any:
        """Take as long as the request says."""
        work(x, "predict")
        return x

    def encode_response(self, output: dict[str, Any]) -> Any:
        """Take as long as the request says."""
        work(output, "encode")
        return output


class Batched(Plain):
    """Several at once: the model takes as long as its slowest member."""

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take as long as the slowest member says."""
        time.sleep(max(wanted.get("collate", 0.0) for wanted in inputs))
        return inputs

    def predict(self, x: list[dict[str, Any]]) -> Any:
        """Take as long as the slowest member says."""
        work(max(x, key=lambda wanted: wanted["predict"]), "predict")
        return x

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Hand them out."""
        return output


class Async(Plain):
    """Several side by side, on one event loop."""

    async def decode_request(self, request: Request) -> Any:
        """Take as long as the request says."""
        wanted: Any = request
        await asyncio.sleep(wanted["decode"])
        return wanted

    async def predict(self, x: dict[str, Any]) -> Any:
        """Take as long as the request says."""
        await asyncio.sleep(x["predict"])
        return x

    async def encode_response(self, output: dict[str, Any]) -> Any:
        """Take as long as the request says."""
        await asyncio.sleep(output["encode"])
        return output


class Stream(Plain):
    """Outputs in three chunks."""

    def predict(self, x: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Take a third of what the request says for each chunk."""
        for _ in range(CHUNKS):
            time.sleep(x["predict"] / CHUNKS)
            yield x

    def encode_response(self, output: Iterator[dict[str, Any]]) -> Any:
        """Take a third of what the request says for each chunk."""
        for x in output:
            time.sleep(x["encode"] / CHUNKS)
            yield "chunk\n"


class AsyncStream(Async):
    """The same, side by side."""

    async def predict(self, x: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Take a third of what the request says for each chunk."""
        for _ in range(CHUNKS):
            await asyncio.sleep(x["predict"] / CHUNKS)
            yield x

    async def encode_response(self, output: AsyncIterator[dict[str, Any]]) -> Any:
        """Take a third of what the request says for each chunk."""
        async for x in output:
            await asyncio.sleep(x["encode"] / CHUNKS)
            yield "chunk\n"


class BatchedStream(Plain):
    """Several at once, in three chunks."""

    def predict(self, x: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """Take a third of what the slowest member says for each chunk."""
        for _ in range(CHUNKS):
            time.sleep(max(wanted["predict"] for wanted in x) / CHUNKS)
            yield x

    def unbatch(self, output: Iterator[list[dict[str, Any]]]) -> Iterator[list[dict[str, Any]]]:
        """Hand them out."""
        yield from output

    def encode_response(self, output: Iterator[list[dict[str, Any]]]) -> Any:
        """Yield a line for each."""
        for outputs in output:
            yield ["chunk\n" for _ in outputs]


BATCHES = {"max_batch_size": 4, "batch_timeout": 0.2}

APIS: dict[str, tuple[type[ls.LitAPI], dict[str, Any]]] = {
    "plain": (Plain, {}),
    "batched": (Batched, BATCHES),
    "async": (Async, {"enable_async": True}),
    "stream": (Stream, {"stream": True}),
    "async-stream": (AsyncStream, {"stream": True, "enable_async": True}),
    "batched-stream": (BatchedStream, {"stream": True, **BATCHES}),
}

if __name__ == "__main__":
    port, mode = sys.argv[1:]
    api, options = APIS[mode]
    ls.LitServer(api(**options), accelerator="cpu").run(
        host="127.0.0.1", port=int(port), generate_client_file=False
    )
