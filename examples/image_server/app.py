"""POST /predict: JPEG in, the likeliest classes out.

The event loop only moves bytes: decoding runs on a thread pool, the model on the batcher's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse

from stagescope import carry, stage
from stagescope.examples.image_server.batcher import Batcher, BatcherClosed, BatcherFull
from stagescope.examples.image_server.images import NotAnImage, decode
from stagescope.examples.image_server.settings import Settings

MAX_BODY_BYTES = 16_000_000

Image = npt.NDArray[Any]


class Model(Protocol):
    """What serves the batches: a network on some runtime."""

    @property
    def device(self) -> object:
        """Where it runs."""
        ...

    def collate(self, images: Sequence[Image]) -> Any:
        """Return one input made of images, each (3, side, side) bytes."""
        ...

    def infer(self, images: Any) -> Sequence[Image]:
        """Return the class probabilities of each image."""
        ...


def create_app(chosen: Settings, make_model: Callable[[Settings], Model]) -> FastAPI:
    """Return the app; the model is made when it starts."""
    decoders = ThreadPoolExecutor(chosen.decode_threads, thread_name_prefix="decode")

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncGenerator[None]:
        model = make_model(chosen)
        warm_up(model, chosen)
        async with Batcher(
            model.collate, model.infer, chosen.limits, model="small-resnet"
        ) as batcher:
            api.state.batcher, api.state.device = batcher, model.device
            yield
        decoders.shutdown()

    api = FastAPI(lifespan=lifespan)

    @api.post("/predict")
    async def predict(request: Request) -> Response:
        body = await read(request)
        image = await decoded(body)
        probabilities = await answered(request, image)
        with stage("postprocess"):
            return JSONResponse({"top": top(probabilities)})

    @api.get("/healthz")
    async def healthz(request: Request) -> dict[str, object]:
        state = request.app.state
        return {"status": "ok", "device": str(state.device), "waiting": state.batcher.waiting}

    async def decoded(body: bytes) -> Image:
        run = asyncio.get_running_loop().run_in_executor
        try:
            return await run(decoders, carry(preprocess), body)
        except NotAnImage as problem:
            raise HTTPException(400, str(problem)) from problem

    @stage("preprocess")
    def preprocess(body: bytes) -> Image:
        return decode(body, chosen.image_side)

    return api


async def read(request: Request) -> bytes:
    """Return the body, if it is not too long."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"more than {MAX_BODY_BYTES} bytes")
    return bytes(body)


async def answered(request: Request, image: Image) -> Image:
    """Return the model's answer, by way of the batcher."""
    batcher: Batcher[Image, Any, Image] = request.app.state.batcher
    try:
        return await batcher.submit(image)
    except (BatcherFull, BatcherClosed) as problem:
        raise HTTPException(503, str(problem), {"Retry-After": "1"}) from problem


def top(probabilities: Image, count: int = 5) -> list[dict[str, float]]:
    """Return the *count* likeliest classes, best first."""
    best = np.argsort(probabilities)[::-1][:count]
    return [{"class": int(c), "probability": round(float(probabilities[c]), 6)} for c in best]


def warm_up(model: Model, chosen: Settings) -> None:
    """Run every batch size once, so that no request pays for a first time."""
    image = np.zeros((3, chosen.image_side, chosen.image_side), np.uint8)
    for size in range(1, chosen.limits.max_size + 1):
        model.infer(model.collate([image] * size))
