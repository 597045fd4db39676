"""MLServer's models: `predict` is `inference`, of one request or of a merged batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagescope.middleware.batch_work import working_for
from stagescope.middleware.guard import guarded
from stagescope.middleware.hooks import mlserver_batches
from stagescope.middleware.hooks.hook import wrap
from stagescope.middleware.marks import marked
from stagescope.middleware.names import CODES
from stagescope.middleware.stage import stage

INFERENCE = CODES["inference"]


def initialising(init: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the making of a model: its class is timed from then on, whatever class that is."""

    def init_timed(self: Any, *args: Any, **kwargs: Any) -> None:
        with guarded():
            _time_predict(type(self))
            if "predict_stream" in vars(type(self)):
                wrap(type(self), "predict_stream", stage.of_code(INFERENCE))
        init(self, *args, **kwargs)

    return init_timed


def _time_predict(model: Any) -> None:
    wrap(model, "predict", _predicting)
    # MLServer unwraps `predict` as far as it goes, to find the model that it is bound to: ours
    # is a function of the class like the one inside, which is none.
    vars(model.predict).pop("__wrapped__", None)


def _predicting(predict: Callable[..., Any]) -> Callable[..., Any]:
    async def predict_timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        formed = mlserver_batches.take(args[0]) if args else None
        if formed is None:
            with stage.of_code(INFERENCE):
                return await predict(self, *args, **kwargs)
        with formed, working_for(formed), formed.inference():
            return await predict(self, *args, **kwargs)

    return marked(predict_timed, INFERENCE)
