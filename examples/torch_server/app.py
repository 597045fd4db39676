"""POST /predict: JPEG in, the likeliest classes out.

The event loop only moves bytes: decoding runs on a thread pool, the model on the batcher's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from torch import Tensor

from stagescope import StageMiddleware, carry, stage
from stagescope.examples.torch_server.batcher import Batcher, BatcherClosed, BatcherFull
from stagescope.examples.torch_server.images import NotAnImage, decode
from stagescope.examples.torch_server.model import Classifier, top
from stagescope.examples.torch_server.settings import Settings, settings

MAX_BODY_BYTES = 16_000_000


def create_app(chosen: Settings) -> FastAPI:
    """Make the app; the model is made when it starts."""
    decoders = ThreadPoolExecutor(chosen.decode_threads, thread_name_prefix="decode")

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncGenerator[None]:
        classifier = Classifier(chosen.width)
        classifier.warm_up(chosen.image_side, chosen.limits.max_size)
        async with Batcher(
            classifier.collate, classifier.infer, chosen.limits, model="small-resnet"
        ) as batcher:
            api.state.batcher, api.state.device = batcher, classifier.device
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

    async def decoded(body: bytes) -> Tensor:
        run = asyncio.get_running_loop().run_in_executor
        try:
            return await run(decoders, carry(preprocess), body)
        except NotAnImage as problem:
            raise HTTPException(400, str(problem)) from problem

    @stage("preprocess")
    def preprocess(body: bytes) -> Tensor:
        return decode(body, chosen.image_side)

    return api


async def read(request: Request) -> bytes:
    """Give the body, if it is not too long."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise HTTPException(413, f"more than {MAX_BODY_BYTES} bytes")
    return bytes(body)


async def answered(request: Request, image: Tensor) -> Tensor:
    """Give the model's answer, by way of the batcher."""
    batcher: Batcher[Tensor, Tensor, Tensor] = request.app.state.batcher
    try:
        return await batcher.submit(image)
    except (BatcherFull, BatcherClosed) as problem:
        raise HTTPException(503, str(problem), {"Retry-After": "1"}) from problem


app = StageMiddleware(create_app(settings()), service="torch-server")  # the one line
