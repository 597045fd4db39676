"""The server that agent_cost.py measures: Python and a small torch model on worker threads.

`python agent_cost_server.py`: prints its port, serves on loopback until it is terminated.
Each request parses a body in Python (about 1 ms) and goes through a model (about 1 ms), on one of
four threads; eight more threads sleep, as a server's do.
"""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import uvicorn

from stagescope import StageMiddleware, carry, stage

WORKERS, IDLE = 4, 8

torch.set_num_threads(1)
_model = torch.nn.Sequential(
    torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)
).eval()
_pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="work")


def work(body: bytes) -> bytes:
    """Serve one request."""
    with stage("preprocess"):
        numbers = [float(number) for number in json.loads(body)["numbers"]]
        for _ in range(8):
            numbers = [number * 0.5 + 1.0 for number in numbers]
    with stage("inference"), torch.inference_mode():
        batch = torch.tensor(numbers).reshape(-1, 256)
        for _ in range(4):
            batch = _model(batch)
    with stage("postprocess"):
        return json.dumps({"sum": float(batch.sum())}).encode()


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer any POST."""
    if scope["type"] != "http":
        return
    message = await receive()
    loop = asyncio.get_running_loop()
    reply = await loop.run_in_executor(_pool, carry(work), message["body"])
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", b"%d" % len(reply))],
        }
    )
    await send({"type": "http.response.body", "body": reply})


async def main() -> None:
    """Serve on a free port, and print it."""
    for _ in range(IDLE):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    wrapped: Any = StageMiddleware(app, service="agent-cost")
    config = uvicorn.Config(wrapped, port=0, log_level="error", lifespan="off", access_log=False)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving


if __name__ == "__main__":
    asyncio.run(main())
