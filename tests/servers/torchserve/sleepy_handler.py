"""A handler whose stages take known times, with a tiny model; it knows nothing of stagescope."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import torch
from ts.torch_handler.base_handler import BaseHandler  # type: ignore[import-not-found]

PREPROCESS_S, INFERENCE_S, POSTPROCESS_S = 0.06, 0.12, 0.03


class SleepyHandler(BaseHandler):  # type: ignore[misc]
    """Sleeps in each stage; a request may ask for an error, or for the worker's death."""

    def initialize(self, context: Any) -> None:
        """Make the model."""
        self.model = torch.nn.Linear(1, 1).eval()
        self.initialized = True

    def preprocess(self, data: list[dict[str, Any]]) -> list[str]:
        """Take the words of the batch; `raise` raises."""
        time.sleep(PREPROCESS_S)
        words = [str((item.get("body") or item.get("data") or {})["word"]) for item in data]
        if "raise" in words:
            raise LookupError("the test asked for it")
        return words

    def inference(self, data: list[str], *args: Any, **kwargs: Any) -> list[str]:
        """Run the model; `die` kills the process."""
        with torch.inference_mode():
            self.model(torch.zeros(1, 1))
        time.sleep(INFERENCE_S)
        if "die" in data:
            os.kill(os.getpid(), signal.SIGKILL)
        return data

    def postprocess(self, data: list[str]) -> list[str]:
        """Answer with the words, and say how large the batch was."""
        time.sleep(POSTPROCESS_S)
        return [json.dumps({"word": word, "size": len(data)}) for word in data]
