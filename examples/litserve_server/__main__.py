"""`python -m stagescope.examples.litserve_server [PORT]`: serve the classifier.

Needs `pip install litserve torch`.
"""

import sys
from typing import Any

import litserve
import torch
from fastapi import Request

import stagescope

stagescope.install("litserve")  # The one line; under `stagescope run` it is not needed.

BYTES = 256
LONGEST = 512
LABELS = ("praise", "question", "complaint")


class Classifier(litserve.LitAPI):
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
        return self.layers(self.embed(x)).softmax(1)

    def encode_response(self, output: torch.Tensor) -> Any:
        """Give the label and how sure it is."""
        return {"label": LABELS[int(output.argmax())], "score": float(output.max())}


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    api = Classifier(max_batch_size=8, batch_timeout=0.01)
    litserve.LitServer(api, accelerator="auto", timeout=30).run(
        host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False
    )
