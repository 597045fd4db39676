"""A Ray Serve application with known times, run by the Python that has Ray: `serving.py PORT`.

Prints a line when it serves, and ends when its standard input does.
"""

# The framework ships no types that hold here.
# mypy: disable-error-code="attr-defined, no-any-return, untyped-decorator"
from __future__ import annotations

import asyncio
import os
import signal
import sys

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

import stagescope
from stagescope import stage

stagescope.install("ray.serve")

api = FastAPI()
SMALL = {"num_cpus": 0.1}


@serve.deployment(ray_actor_options=SMALL, max_ongoing_requests=50)
class Model:
    """Batches of at most four: 20 ms to prepare, 60 ms to run."""

    @serve.batch(max_batch_size=4, batch_wait_timeout_s=0.1)
    async def predict(self, items: list[dict[str, str]]) -> list[str]:
        with stage("preprocess"):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.06)
        if any("fail" in item for item in items):
            raise ArithmeticError("the model's own")
        if any("die" in item for item in items):
            os.kill(os.getpid(), signal.SIGKILL)
        return [item["name"] for item in items]

    async def __call__(self, item: dict[str, str]) -> str:
        return await self.predict(item)


@serve.deployment(ray_actor_options=SMALL, max_ongoing_requests=1)
class Plain:
    """One at a time: 30 ms to prepare, 50 ms to run; `chain` asks the model too."""

    def __init__(self, model: DeploymentHandle) -> None:
        self.model = model

    async def __call__(self, item: dict[str, str]) -> str:
        with stage("preprocess"):
            await asyncio.sleep(0.03)
        await asyncio.sleep(0.05)
        if "fail" in item:
            raise ArithmeticError("the method's own")
        return await self.model.remote(item) if "chain" in item else item["name"]


@serve.deployment(ray_actor_options=SMALL, max_ongoing_requests=50)
@serve.ingress(api)
class Api:
    """The ingress: 10 ms before, 10 ms after."""

    def __init__(self, model: DeploymentHandle, plain: DeploymentHandle) -> None:
        self.handles = {"model": model, "plain": plain}

    @api.post("/{which}")
    async def ask(self, which: str, item: dict[str, str]) -> str:
        with stage("preprocess.tokens"):
            await asyncio.sleep(0.01)
        answer: str = await self.handles[which].remote(item)
        with stage("postprocess"):
            await asyncio.sleep(0.01)
        return answer


if __name__ == "__main__":
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
        model = Model.bind()
        serve.run(Api.bind(model, Plain.bind(model)))
        print("serving", flush=True)
        sys.stdin.read()
    finally:
        serve.shutdown()
        ray.shutdown()
