"""The stages of sparrow: `answer` is `inference`, and within it `tokenize` a part of its own."""

from __future__ import annotations

from stagescope.hooks import Hook, part, recognised, wrap


def install() -> None:
    """Wrap what is to be timed; called once, when sparrow is loaded."""
    from sparrow import Model

    wrap(Model, "answer", recognised("inference"))
    wrap(Model, "tokenize", part("preprocess.tokenize"))


HOOK = Hook("sparrow", "stagescope-sparrow", ("0", "9"), install)
