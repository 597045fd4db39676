"""scikit-learn: `predict` and its like are `inference`, `transform` is `preprocess`.

A pipeline is neither: its transformers are `preprocess`, its last step is `inference`. Estimators
are classes of anybody's, so each class below `BaseEstimator` is wrapped when it is made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.model_calls import wrap_methods
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES

METHODS = {
    "transform": CODES["preprocess"],
    **dict.fromkeys(
        ("predict", "predict_proba", "predict_log_proba", "decision_function", "score_samples",
         "kneighbors", "radius_neighbors"),
        CODES["inference"],
    ),
}  # fmt: skip
HANDS_ON = {"Pipeline", "BaseSearchCV", "FrozenEstimator"}
"""Classes whose methods only call those of other estimators."""


def install() -> None:
    """Wrap the estimators that there are, and each that is defined from now on."""
    base: Any = sys.modules["sklearn.base"].BaseEstimator
    for estimator in _subclasses(base):
        _wrap(estimator)

    def noticed(cls: type, /, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)
        with guarded():
            _wrap(cls)

    if "__init_subclass__" not in vars(base):
        base.__init_subclass__ = classmethod(noticed)


def _wrap(estimator: type) -> None:
    if HANDS_ON.isdisjoint(base.__name__ for base in estimator.__mro__):
        wrap_methods(estimator, METHODS)


def _subclasses(base: type) -> Iterator[type]:
    subclasses: list[type] = base.__subclasses__()
    for subclass in subclasses:
        yield subclass
        yield from _subclasses(subclass)


HOOK = Hook("sklearn.base", "scikit-learn", ("1.2", "2"), install)
