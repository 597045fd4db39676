"""A FastAPI app around one model of each library, without a mark; it takes the times itself.

Run: `python app.py PORT`. Each route answers with the milliseconds that its model took, and what
came before it, by the clock of the app.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import catboost
import lightgbm
import numpy as np
import uvicorn
import xgboost
from fastapi import FastAPI
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from stagescope import StageMiddleware, stage

app = FastAPI()
app.add_middleware(StageMiddleware)

generator = np.random.default_rng(1)
ROWS = generator.random((4000, 20))
LABELS = (ROWS[:, 0] > 0.5).astype(int)


class Slow(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A transformer of the app's own that takes its time."""

    def fit(self, rows: Any, labels: Any = None) -> Slow:
        """Learn nothing."""
        return self

    def transform(self, rows: Any) -> Any:
        """Give back what came."""
        time.sleep(0.02)
        return rows


def spent_ms(work: Callable[[], Any]) -> float:
    """Return how long *work* took."""
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


forest = RandomForestClassifier(60, n_jobs=2).fit(ROWS, LABELS)
booster = xgboost.XGBClassifier(n_estimators=60).fit(ROWS, LABELS)
light = lightgbm.LGBMClassifier(n_estimators=60, verbose=-1).fit(ROWS, LABELS)
light_booster = lightgbm.train({"verbose": -1}, lightgbm.Dataset(ROWS, LABELS), 60)
cat = catboost.CatBoostClassifier(60, verbose=0, allow_writing_files=False).fit(ROWS, LABELS)
steps = make_pipeline(Slow(), LogisticRegression()).fit(ROWS, LABELS)
many = np.repeat(ROWS, 5, axis=0)
matrix = xgboost.DMatrix(many)

MODELS: dict[str, Callable[[], Any]] = {
    "sklearn": lambda: forest.predict(ROWS),
    "sklearn_proba": lambda: forest.predict_proba(ROWS),
    "xgboost": lambda: booster.predict_proba(many),
    "xgboost_booster": lambda: booster.get_booster().predict(matrix),
    "lightgbm": lambda: light.predict(many),
    "lightgbm_booster": lambda: light_booster.predict(many),
    "catboost": lambda: cat.predict_proba(many),
}


@app.post("/model/{name}")
def model(name: str) -> dict[str, float]:
    """Call the model *name*."""
    return {"inference": spent_ms(MODELS[name])}


@app.post("/pipeline")
def pipeline() -> dict[str, float]:
    """Call a pipeline; its transformer sleeps for 20 ms."""
    return {"whole": spent_ms(lambda: steps.predict(ROWS))}


@app.post("/marked")
def marked() -> dict[str, float]:
    """Call a model under a mark."""
    with stage("rerank"):
        return {"rerank": spent_ms(lambda: forest.predict(ROWS))}


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
