"""The LitAPI; LitServe's worker, a process of its own, imports it from here."""

from typing import Any

import litserve
import torch
from fastapi import Request

import stagescope

stagescope.install("litserve")  # The one line; under `stagescope run` it is not needed.

BYTES = 256
LONGEST = 512
LABELS = ("praise", "question", "complaint")


class Classifier(litserve.LitAPI):  # type: ignore[misc] # LitServe is not there to be checked
    """Bytes of a text to a label; the weights are random, made from a fixed seed."""

    def setup(self, device: str) -> None:
        """Make the model, in the worker."""
        torch.manual_seed(7)
        self.embed = torch.nn.EmbeddingBag(BYTES, 256).to(device).eval()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, len(LABELS))
        ).to(device)

    def decode_request(self, request: Request) -> torch.Tensor:
        """Take `{"text": "..."}`, which LitServe has read by now; short texts are padded."""
        body: Any = request
        data = body["text"].encode()[:LONGEST].ljust(LONGEST)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).long()

    @torch.inference_mode()
    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Classify a batch."""
        scores: torch.Tensor = self.layers(self.embed(x)).softmax(1)
        return scores

    def encode_response(self, output: torch.Tensor) -> Any:
        """Return the label and how sure it is."""
        return {"label": LABELS[int(output.argmax())], "score": float(output.max())}
