"""The model: it doubles arrays, up to eight requests at a time."""

# The framework ships no types that hold here.
# mypy: disable-error-code="misc"
from __future__ import annotations

import asyncio

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

import stagescope

stagescope.install("mlserver")


class Doubler(MLModel):
    """Stands for a model that takes 30 ms a batch."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        numbers = self.decode(payload.inputs[0], default_codec=NumpyCodec)
        await asyncio.sleep(0.03)
        doubled = NumpyCodec.encode_output("doubled", numbers * 2)
        return InferenceResponse(model_name=self.name, outputs=[doubled])
