"""An app that calls models in every hooked way, lends its timeline, and is asked by its probe.

What it answers is compared with and without us, as in fault_drive.py.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from fastapi import FastAPI
from onnx import TensorProto, helper
from sse_starlette.sse import EventSourceResponse
from transformers import TextClassificationPipeline, TextIteratorStreamer

from stagescope.agent.probe import ask
from stagescope.errors import StagescopeError
from stagescope.examples.transformers_server import models
from stagescope.recorder.spool import PROBE_SUFFIX
from tests.support import fault_drive

HOOKS = ("onnxruntime", "transformers.pipelines", "transformers.generation.utils",
         "sse_starlette")  # fmt: skip
ASKED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("hello", {}), ("dump", {}), ("stacks", {"seconds": 0.03}), ("torch", {}), ("torch", {"driver": True}),
    ("allow_ptrace", {"pid": os.getpid()}), ("memory_snapshot", {}),
)  # fmt: skip
"""What the probe is asked while the app serves; a capture takes too long for hundreds of times."""
CASES: tuple[fault_drive.Case, ...] = tuple(
    ("GET", path, b"") for path in ("/torch", "/onnx", "/onnx-async", "/classify", "/generate",
                                    "/events", "/lent", "/load", "/asked")
)  # fmt: skip


def _onnx() -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "negative", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(made.SerializeToString())


torch.set_num_threads(1)
torch.manual_seed(1)
ROWS = np.ones((2, 4), np.float32)
WEIGHTS = models.classifier(layers=1, width=16)
TOKENIZER = models.tokenizer()
GENERATOR = models.generator(layers=1, width=16)


def models_app(*, bare: bool, spool: Path) -> Any:
    """Make the app; its models are made anew, so that their classes are wrapped as they come."""
    app = FastAPI(openapi_url=None)
    linear = torch.nn.Linear(4, 2, bias=False)
    torch.nn.init.ones_(linear.weight)
    if not bare:
        from stagescope.middleware.hooks.torch import time_module

        assert time_module(linear) is linear
    session = onnxruntime.InferenceSession(_onnx(), providers=["CPUExecutionProvider"])
    classify = TextClassificationPipeline(model=WEIGHTS, tokenizer=TOKENIZER, device="cpu")

    @app.get("/torch")
    async def timed_module() -> list[list[float]]:
        rows: list[list[float]] = linear(torch.ones(1, 4)).tolist()
        return rows

    @app.get("/onnx")
    def run() -> list[list[float]]:
        found: list[list[float]] = session.run(None, {"x": ROWS})[0].tolist()
        return found

    @app.get("/onnx-async")
    async def run_async() -> list[list[float]]:
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Any] = loop.create_future()

        def back(results: Any, _: object, error: str) -> None:
            loop.call_soon_threadsafe(told.set_result, error or results[0].tolist())

        session.run_async(None, {"x": ROWS}, back, None)
        found: list[list[float]] = await asyncio.wait_for(told, 10)
        return found

    @app.get("/classify")
    def classified() -> str:
        return str(classify("a film")[0]["label"])

    @app.get("/generate")
    def generated() -> list[int]:
        streamer = TextIteratorStreamer(TOKENIZER, skip_prompt=True, timeout=10)
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "streamer": streamer}
        ids = torch.tensor([[1, 2, 3]])
        thread = threading.Thread(target=GENERATOR.generate, args=(ids,), kwargs=options)
        thread.start()
        lengths = [len(piece) for piece in streamer]
        thread.join()
        return lengths

    @app.get("/events")
    async def events() -> EventSourceResponse:
        async def tell() -> AsyncIterator[str]:
            for number in range(3):
                await asyncio.sleep(0)
                yield str(number)

        return EventSourceResponse(tell())

    @app.get("/lent")
    def lent() -> str:
        return "done" if bare else _work_elsewhere()

    @app.get("/load")
    def loaded() -> int:
        return len(linear.to("cpu").weight)

    @app.get("/asked")
    def asked() -> str:
        if not bare:
            _ask_probes(spool)
        return "done"

    return app


def _work_elsewhere() -> str:
    """Attach the lent timeline as a worker does, here on a thread without a request."""
    from stagescope import stage
    from stagescope.middleware import process
    from stagescope.middleware.recording.guard import guarded
    from stagescope.middleware.remote import attached, carried, inject

    assert carried("id") == "id"
    lent = None
    with guarded():  # As each hook does that lends.
        lent = inject()
    recorders = [entry[0] for entry in process._open.values() if entry is not None]
    done: list[str] = []

    def work() -> None:
        if not recorders:  # It could not be made, so nothing is lent.
            done.append("done")
            return
        with attached(lent, recorders[0]), stage("inference"):
            done.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return done[0]


def _ask_probes(spool: Path) -> None:
    """Ask everything; an answer may be that it is a fault, and a probe may be missing."""
    for probe in spool.glob(f"*{PROBE_SUFFIX}"):
        for op, question in ASKED:
            with suppress(StagescopeError):
                ask(probe, op, timeout_s=2.0, **question)
