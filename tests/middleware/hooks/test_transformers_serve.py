"""A real `transformers serve` in load runs: its one inference thread works for all requests."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stagescope.examples.transformers_server import models
from stagescope.load_run import LoadPlan, run_load
from tests.support.commands import Running, run_command

SERVER = Path(__file__).parent / "transformers_serve.py"
TOKENS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a small random Llama with a tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("llama") / "tiny"
    words = models.tokenizer()
    words.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    words.save_pretrained(folder)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        )
    )  # fmt: skip
    assert llama.generation_config is not None
    llama.generation_config.eos_token_id = None
    llama.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Start the server under `stagescope run`."""
    folder = tmp_path_factory.mktemp("serve")
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = (sys.executable, str(SERVER), str(model), "0", str(folder / "truth"))
    with run_command(
        folder, "--spool", str(folder / "spool"), "--", *command, environment=environment
    ) as running:
        running.port()
        yield running
        assert running.end() in (0, 143, -15)


def loaded(
    server: Running, model: Path, *, stream: bool, rate: float, requests: int
) -> tuple[Any, list[float]]:
    """Run a load test; return the report's stages by name, and the ms of each `generate` in it."""
    folder = server.output.parent
    truth = folder / "truth"
    truth.write_text("")
    body = {
        "model": str(model), "max_tokens": TOKENS, "stream": stream,
        "messages": [{"role": "user", "content": "the cat saw the dog"}],
    }  # fmt: skip
    plan = LoadPlan(
        rate_per_s=rate, duration_s=requests / rate, warmup_s=0, json_text=json.dumps(body),
        spool=folder / "spool", timeout_s=60, out=folder / f"run-{stream}-{rate}-{os.urandom(2).hex()}",
    )  # fmt: skip
    run = run_load(plan, f"http://127.0.0.1:{server.port()}/v1/chat/completions")
    spans = [json.loads(line) for line in truth.read_text().splitlines()]
    return run.report().to_json(), [(end - begun) / 1e6 for begun, end in spans]


@pytest.mark.parametrize("stream", [False, True])
def test_the_models_time_is_inference_and_waiting_for_its_thread_is_queue(
    server: Running, model: Path, *, stream: bool
) -> None:
    """At a third of its capacity and at half beyond it, streaming and not."""
    _, alone = loaded(server, model, stream=stream, rate=2, requests=3)
    capacity = 1e3 / mean(alone)

    for share, requests in ((0.3, 12), (1.5, 30)):
        report, took = loaded(
            server, model, stream=stream, rate=share * capacity, requests=requests
        )
        mean_ms = {one["stage"]: one["mean_ms"] or 0 for one in report["stages"]}
        total = sum(mean_ms.values())
        assert mean_ms["inference"] == pytest.approx(mean(took), rel=0.15), mean_ms
        assert mean_ms["respond"] + mean_ms.get("endpoint", 0) < 0.1 * total, mean_ms
        if share > 1:
            assert mean_ms["queue"] > mean(took), mean_ms
