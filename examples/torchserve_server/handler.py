"""A handler as one would write it: text in, a label and its probability out, batches in between.

It knows nothing of stagescope: `stagescope run` is enough. To have it timed without that, import
`StagescopeHandlerMixin` from `stagescope.middleware.hooks.torchserve` and put it before
`BaseHandler` among the bases.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from ts.torch_handler.base_handler import BaseHandler  # type: ignore[import-not-found]

LABELS = ("joy", "anger", "fear", "surprise")
WORDS, WIDTH, LENGTH = 4096, 256, 32


class Classifier(BaseHandler):  # type: ignore[misc]
    """Hashes words into a table of embeddings; the weights are random, from a fixed seed."""

    def initialize(self, context: Any) -> None:
        """Make the model."""
        torch.manual_seed(1)
        layer = torch.nn.TransformerEncoderLayer(WIDTH, nhead=4, batch_first=True)
        self.model = torch.nn.Sequential(
            torch.nn.Embedding(WORDS, WIDTH),
            torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False),
        ).eval()
        self.head = torch.nn.Linear(WIDTH, len(LABELS))
        self.initialized = True

    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        """Return one row of word numbers a request, padded with 0."""
        rows = [self._numbers(item.get("body") or item.get("data") or "") for item in data]
        return torch.tensor(rows)

    def _numbers(self, text: str | bytes | bytearray) -> list[int]:
        given = text if isinstance(text, str) else bytes(text).decode("utf-8", "replace")
        numbers = [zlib.crc32(word.encode()) % WORDS for word in given.split()[:LENGTH]]
        return numbers + [0] * (LENGTH - len(numbers))

    def inference(self, data: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return each request's probabilities."""
        with torch.inference_mode():
            return torch.softmax(self.head(self.model(data).mean(dim=1)), dim=1)

    def postprocess(self, data: torch.Tensor) -> list[dict[str, float]]:
        """Return the likeliest label of each."""
        best, index = data.max(dim=1)
        pairs = zip(index.tolist(), best.tolist(), strict=True)
        return [{LABELS[number]: round(share, 4)} for number, share in pairs]
