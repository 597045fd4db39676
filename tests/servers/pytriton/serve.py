"""A Triton server of three models of known times: `serve.py READY HTTP GRPC METRICS [OTLP_URL]`.

Runs in the environment that has pytriton. It makes the file READY when it serves, on the three
ports, and ends when its standard input does.
"""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from stagescope.middleware.hooks.hook import install
from stagescope.middleware.stage import stage

PREPROCESS_S, INFERENCE_S, POSTPROCESS_S = 0.02, 0.05, 0.01

install("pytriton")


@batch  # type: ignore[untyped-decorator] # pytriton is not where types are checked
def double(x: Any) -> dict[str, Any]:
    """Double, with marked steps of known length; fail for a negative number."""
    with stage("preprocess"):
        time.sleep(PREPROCESS_S)
    time.sleep(INFERENCE_S)
    if (x < 0).any():
        raise ValueError("a negative number")
    with stage("postprocess"):
        time.sleep(POSTPROCESS_S)
    return {"y": x * 2}


def parameters(requests: Any) -> list[dict[str, Any]]:
    """Return how many parameters each request came with, as the model sees them."""
    return [
        {"y": np.full_like(request["x"], len(request.parameters or {}))} for request in requests
    ]


async def asleep(requests: Any) -> list[dict[str, Any]]:
    """Sleep without holding the event loop."""
    await asyncio.sleep(INFERENCE_S)
    return [{"y": request["x"]} for request in requests]


def main() -> None:
    """Serve until standard input ends."""
    ports = [int(port) for port in sys.argv[2:5]]
    names = ("http_port", "grpc_port", "metrics_port")
    trace = sys.argv[5:] and [
        "mode=opentelemetry", "rate=1", "level=TIMESTAMPS", f"opentelemetry,url={sys.argv[5]}",
    ]  # fmt: skip
    config = TritonConfig(**dict(zip(names, ports, strict=False)), trace_config=trace or None)
    tensor = {"dtype": np.float32, "shape": (1,)}
    batched = ModelConfig(
        max_batch_size=8, batcher=DynamicBatcher(max_queue_delay_microseconds=50_000)
    )
    with Triton(config=config) as triton:
        for name, function in [("double", double), ("parameters", parameters), ("asleep", asleep)]:
            triton.bind(
                name, function, [Tensor(name="x", **tensor)], [Tensor(name="y", **tensor)],
                config=batched,
            )  # fmt: skip
        triton.run()
        Path(sys.argv[1]).touch()
        sys.stdin.read()


if __name__ == "__main__":
    main()
