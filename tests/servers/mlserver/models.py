"""A model with known times, copied by the tests into a folder that MLServer serves."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

from mlserver import MLModel
from mlserver.codecs import InputCodec, register_input_codec
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput

import stagescope
from stagescope import stage

stagescope.install("mlserver")


@register_input_codec
class SlowCodec(InputCodec):  # type: ignore[misc]
    """10 ms each way."""

    ContentType = "slow"

    @classmethod
    def decode_input(cls, request_input: Any) -> list[int]:
        time.sleep(0.01)
        return list(request_input.data.root)

    @classmethod
    def encode_output(cls, name: str, payload: list[int], **_: Any) -> ResponseOutput:
        time.sleep(0.01)
        return ResponseOutput(name=name, shape=[len(payload), 1], datatype="INT64", data=payload)


class Slow(MLModel):  # type: ignore[misc]
    """Answers what it was asked, after 20 ms in `preprocess` and 50 ms."""

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        numbers = self.decode(payload.inputs[0])
        with stage("preprocess"):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.05)
        if -1 in numbers:
            raise ArithmeticError("the model's own")
        if -2 in numbers:
            os.kill(os.getpid(), signal.SIGKILL)
        with stage("tidying"):
            await asyncio.sleep(0.01)
        return InferenceResponse(
            model_name=self.name, outputs=[SlowCodec.encode_output("y", numbers)]
        )
