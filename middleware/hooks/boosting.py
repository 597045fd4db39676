"""XGBoost, LightGBM and CatBoost: predictions of a booster, and of the wrappers in scikit-learn's style."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.model_calls import wrap_methods
from stagescope.middleware.recording.names import CODES

METHODS: dict[str, int] = dict.fromkeys(
    ("predict", "inplace_predict", "predict_proba", "predict_log_proba", "apply"),
    CODES["inference"],
)


def _install(modules: tuple[str, ...]) -> None:
    for module in modules:
        for found in list(vars(sys.modules[module]).values()):
            if isinstance(found, type) and found.__module__ == module:
                wrap_methods(found, METHODS)


def _wrapping(*modules: str) -> Callable[[], None]:
    return partial(_install, modules)


XGBOOST = Hook("xgboost", "xgboost", ("1.7", "4"), _wrapping("xgboost.core", "xgboost.sklearn"))
LIGHTGBM = Hook(
    "lightgbm", "lightgbm", ("3.3", "5"), _wrapping("lightgbm.basic", "lightgbm.sklearn")
)
CATBOOST = Hook("catboost", "catboost", ("1.1", "2"), _wrapping("catboost.core"))
