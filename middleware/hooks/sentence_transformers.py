"""Sentence Transformers: `encode` and `predict` are `inference`, tokenising a part of `preprocess`."""

from __future__ import annotations

import sys
from functools import partial

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.model_calls import timed_call, timed_part
from stagescope.middleware.patching import wrap

CLASSES = ("SentenceTransformer", "CrossEncoder", "SparseEncoder", "MultiVectorEncoder")
CALLS = ("encode", "encode_query", "encode_document", "predict", "rank")
PARTS = {
    "tokenize": "preprocess.tokenize",
    "preprocess": "preprocess.tokenize",
    "forward": "inference.forward",
}


def install() -> None:
    """Wrap what of these each class has: not every version has all of them."""
    library = sys.modules["sentence_transformers"]
    for owner in [getattr(library, name) for name in CLASSES if hasattr(library, name)]:
        for name in CALLS:
            if hasattr(owner, name):
                wrap(owner, name, timed_call)
        for name, part in PARTS.items():
            if hasattr(owner, name):
                wrap(owner, name, partial(timed_part, name=part))


HOOK = Hook("sentence_transformers", "sentence-transformers", ("2.2", "7"), install)
