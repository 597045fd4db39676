"""The deployments: an ingress that tokenizes, and a model that takes batches."""

# The framework ships no types that hold here.
# mypy: disable-error-code="attr-defined, no-any-return, untyped-decorator"
from __future__ import annotations

import asyncio

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

import stagescope
from stagescope import stage

stagescope.install("ray.serve")

api = FastAPI()
SMALL = {"num_cpus": 0.2}


@serve.deployment(ray_actor_options=SMALL, max_ongoing_requests=64)
class Scorer:
    """Scores texts, up to eight at a time; stands for a model that takes 30 ms a batch."""

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.01)
    async def score(self, texts: list[list[int]]) -> list[float]:
        with stage("preprocess"):
            padded = [(tokens + [0] * 64)[:64] for tokens in texts]
        await asyncio.sleep(0.03)
        return [sum(row) % 97 / 97 for row in padded]

    async def __call__(self, tokens: list[int]) -> float:
        return await self.score(tokens)


@serve.deployment(ray_actor_options=SMALL, max_ongoing_requests=64)
@serve.ingress(api)
class Ingress:
    """Takes the text in, asks the scorer, answers."""

    def __init__(self, scorer: DeploymentHandle) -> None:
        self._scorer = scorer

    @api.post("/predict")
    async def predict(self, question: dict[str, str]) -> dict[str, float]:
        with stage("preprocess"):
            tokens = [ord(letter) % 64 for letter in question["text"]]
        return {"score": await self._scorer.remote(tokens)}


application = Ingress.bind(Scorer.bind())
