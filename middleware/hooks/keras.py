"""Keras: a call of a model, `predict` and `predict_on_batch` are `inference`; TensorFlow functions too.

Layers and models within a model are part of its call. A SavedModel, and any `tf.function` that the
app calls itself, is called through TensorFlow's `Function` or `ConcreteFunction`.
"""

from __future__ import annotations

import sys

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.model_calls import timed_call
from stagescope.middleware.patching import wrap

FUNCTIONS = "tensorflow.python.eager.polymorphic_function"


def install() -> None:
    """Wrap the methods of `Model`; those that it inherits become its own."""
    for name in ("__call__", "predict", "predict_on_batch"):
        wrap(sys.modules["keras"].Model, name, timed_call)


def install_functions() -> None:
    """Wrap the calls of TensorFlow's functions."""
    wrap(sys.modules[f"{FUNCTIONS}.polymorphic_function"].Function, "__call__", timed_call)
    wrap(sys.modules[f"{FUNCTIONS}.concrete_function"].ConcreteFunction, "__call__", timed_call)


HOOK = Hook("keras", "keras", ("3", "4"), install)
FUNCTIONS_HOOK = Hook(
    f"{FUNCTIONS}.polymorphic_function", "tensorflow", ("2.15", "3"), install_functions
)
