"""The image server with its model on ONNX Runtime: what `stagescope demo` starts.

`classifier.onnx` is made by `make_model.py`; running it needs `onnxruntime` and numpy alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from stagescope import StageMiddleware
from stagescope.examples.image_server.app import Image, create_app
from stagescope.examples.image_server.settings import Settings, cores, settings

MODEL = Path(__file__).with_name("classifier.onnx")


class Classifier:
    """The network on the CPU, behind the two calls that the batcher makes."""

    device = "cpu"

    def __init__(self, chosen: Settings) -> None:
        options = onnxruntime.SessionOptions()
        # One thread on two cores: the event loop and the decoders need the other. And threads
        # that spin while they wait would take the cores from them.
        options.intra_op_num_threads = max(1, cores() // 2)
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            chosen.model or MODEL, options, providers=["CPUExecutionProvider"]
        )

    def collate(self, images: Sequence[Image]) -> Image:
        """Stack images (3, side, side) into one input."""
        return np.stack(images)

    def infer(self, images: Image) -> Sequence[Image]:
        """Return the class probabilities of each image."""
        (probabilities,) = self._session.run(None, {"images": images})
        return list(probabilities)


app = StageMiddleware(create_app(settings(), Classifier), service="image-server")  # the one line
