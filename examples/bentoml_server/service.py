# mypy: disable-error-code="untyped-decorator"
"""A front service that prepares the text, and a model service that batches."""

from typing import Any

import bentoml
import numpy as np

import stagescope

stagescope.install("bentoml")  # The one line; under `stagescope run` it is not needed.

BYTES = 256
LABELS = ("praise", "question", "complaint")


@bentoml.service
class Model:
    """Counts of bytes to scores; the weights are random, made from a fixed seed."""

    def __init__(self) -> None:
        random = np.random.default_rng(7)
        self.first = random.standard_normal((BYTES, 512)) / BYTES
        self.second = random.standard_normal((512, len(LABELS)))

    @bentoml.api(batchable=True, max_batch_size=16, max_latency_ms=1000)
    def score(self, counts: np.ndarray) -> np.ndarray:
        """Score a batch: one row a text."""
        scores: np.ndarray = np.tanh(counts @ self.first) @ self.second
        return scores


@bentoml.service
class Classifier:
    """What clients call."""

    model = bentoml.depends(Model)

    @bentoml.api
    async def classify(self, text: str) -> dict[str, Any]:
        """Return a text's label."""
        with stagescope.stage("preprocess"):
            counts = np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=BYTES)
        scores = await self.model.to_async.score(counts=counts[None].astype(float))
        return {"label": LABELS[int(scores[0].argmax())]}
