"""The routes. The model's time needs no mark; what is done before and after it has one each."""

from __future__ import annotations

import numpy as np
import onnxruntime
from fastapi import FastAPI
from pydantic import BaseModel, Field

from stagescope import StageMiddleware, install, stage
from stagescope.examples.onnxruntime_server.model import FEATURES, network

install("onnxruntime")

session = onnxruntime.InferenceSession(network(), providers=["CPUExecutionProvider"])
api = FastAPI()


class Rows(BaseModel):
    """What to classify: rows of any numbers, cut or filled to the model's width."""

    rows: list[list[float]] = Field(min_length=1, max_length=256)


@api.get("/healthz")
def healthz() -> dict[str, str]:
    """Tell that the model is loaded."""
    return {"status": "ok"}


@api.post("/predict")
def predict(asked: Rows) -> list[int]:
    """Return the class of each row."""
    with stage("preprocess"):
        features = np.zeros((len(asked.rows), FEATURES), np.float32)
        for row, values in zip(features, asked.rows, strict=True):
            row[: len(values)] = values[:FEATURES]
    shares = np.asarray(session.run(["shares"], {"features": features})[0])
    with stage("postprocess"):
        return [int(best) for best in np.argmax(shares, axis=1)]


app = StageMiddleware(api, service="onnxruntime-server")
