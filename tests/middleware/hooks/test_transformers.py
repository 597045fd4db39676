"""Hugging Face pipelines under their hook, in a real server: stages of known length, by request."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from transformers import (
    AsyncTextIteratorStreamer,
    TextClassificationPipeline,
    TextIteratorStreamer,
    TokenClassificationPipeline,
    pipeline,
)

from stagescope.examples.transformers_server import models
from stagescope.identity import format_traceparent
from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.hooks.hook import install
from stagescope.records import RequestRecord
from stagescope.stages import stage_of
from stagescope.testing import wait_until
from stagescope.testing.recording import Recording
from tests.support.serving import served

MS = 1_000_000
PREPROCESS_S, FORWARD_S, POSTPROCESS_S = 0.03, 0.06, 0.02
BUSY_S = 5
"""By so much a machine that does much else may be late."""

assert install("transformers.pipelines")
assert install("transformers.generation.utils")


class Sleeping(TextClassificationPipeline):  # type: ignore[misc] # of no type
    """A user's own pipeline, each step of which takes a known time."""

    def preprocess(self, inputs: Any, **options: Any) -> Any:
        """Sleep and tokenize; fail where it is asked to."""
        time.sleep(PREPROCESS_S)
        if inputs == "bad":
            raise ValueError("a bad film")
        return super().preprocess(inputs, **options)

    def _forward(self, model_inputs: Any) -> Any:
        time.sleep(FORWARD_S)
        return super()._forward(model_inputs)

    def postprocess(self, model_outputs: Any, **options: Any) -> Any:
        """Sleep and choose."""
        time.sleep(POSTPROCESS_S)
        return super().postprocess(model_outputs, **options)


@pytest.fixture(autouse=True)
def _our_faults_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our guard would swallow fails the test."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """A small recorder file."""
    with closing(Recording(tmp_path)) as found:
        yield found


@pytest.fixture(scope="module")
def sleeping() -> Sleeping:
    """The pipeline of known times, on a tiny model."""
    torch.set_num_threads(1)
    return Sleeping(
        model=models.classifier(layers=1, width=16), tokenizer=models.tokenizer(), device="cpu"
    )


def spans(record: RequestRecord) -> list[str]:
    """Return the record's stages in order of opening, those of HTTP left out."""
    names = [span.stage for span in record.stages]
    return [name for name in names if not name.startswith(("respond", "preprocess.read"))]


def outermost(names: list[str]) -> list[str]:
    """Leave out repetitions: a subclass's method calls that of its base, which is timed too."""
    return [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]


def post(port: int, path: str, body: object, trace_id: str) -> tuple[int, bytes]:
    """Send *body* with a trace id of its own."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        headers = {"traceparent": format_traceparent(trace_id, "00f067aa0ba902b7")}
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_concurrent_requests_have_each_their_own_stages(
    recording: Recording, sleeping: Sleeping
) -> None:
    """Five clients at once, with one to five texts in batches of two: none lost, none mixed up."""

    async def classify(request: Request) -> Response:
        texts = await request.json()
        return JSONResponse(await run_in_threadpool(sleeping, texts, batch_size=2))

    app = StageMiddleware.around(
        Starlette(routes=[Route("/", classify, methods=["POST"])]), recording.recorder
    )
    sent = {f"{many:032x}": many for many in range(1, 6)}
    with served(app) as port, ThreadPoolExecutor(len(sent)) as clients:
        answers = clients.map(
            lambda item: post(port, "/", ["good film"] * item[1], item[0]), sent.items()
        )
        assert [(status, len(json.loads(body))) for status, body in answers] == [
            (200, many) for many in sent.values()
        ]
        wait_until(lambda: len(recording.requests) >= len(sent))

    assert {record.trace_id for record in recording.requests} == sent.keys()
    for record in recording.requests:
        many = sent[record.trace_id]
        batches = (many + 1) // 2
        spent = record.self_ns()
        assert PREPROCESS_S * many <= spent["preprocess"] / 1e9 < PREPROCESS_S * many + BUSY_S
        assert (
            FORWARD_S * batches <= spent["inference.forward"] / 1e9 < FORWARD_S * batches + BUSY_S
        )
        assert POSTPROCESS_S * many <= spent["postprocess"] / 1e9 < POSTPROCESS_S * many + BUSY_S
        assert sum(spent.values()) == record.duration_ns


def test_one_text_goes_through_each_stage_once(recording: Recording, sleeping: Sleeping) -> None:
    """In their order, the model's own call inside the moving of tensors."""
    with recording.request():
        sleeping("good film")

    assert outermost(spans(recording.requests[0])) == [
        "preprocess", "inference", "inference.forward", "postprocess",
    ]  # fmt: skip


def test_an_error_in_the_users_preprocess_is_the_users(
    recording: Recording, sleeping: Sleeping
) -> None:
    """It passes through, the stage is marked failed, and the pipeline goes on working."""
    with recording.request(), pytest.raises(ValueError, match="a bad film"):
        sleeping("bad")
    with recording.request():
        assert sleeping("good film")

    bad, good = recording.requests
    assert [(span.stage, span.failed) for span in bad.stages] == [("preprocess", True)]
    assert not any(span.failed for span in good.stages)


def test_a_chunk_pipeline_is_timed_chunk_by_chunk(recording: Recording) -> None:
    """Where `preprocess` is a generator, it is charged while it makes a chunk, not while it waits."""

    class Chunks(TokenClassificationPipeline):  # type: ignore[misc] # of no type
        def preprocess(self, sentence: Any, **options: Any) -> Any:
            """Take a while for each chunk."""
            for chunk in super().preprocess(sentence, **options):
                time.sleep(PREPROCESS_S)
                yield chunk

        def _forward(self, model_inputs: Any) -> Any:
            time.sleep(FORWARD_S)
            return super()._forward(model_inputs)

    from transformers import BertForTokenClassification

    model = BertForTokenClassification(models.classifier(1, 16).config).eval()
    chunks = Chunks(model=model, tokenizer=models.tokenizer(), device="cpu")
    with recording.request():
        chunks(["the cat saw the dog", "a film"])

    (record,) = recording.requests
    spent = record.self_ns()
    assert {"preprocess", "inference.forward", "postprocess"} <= spent.keys()
    assert 2 * PREPROCESS_S <= spent["preprocess"] / 1e9 < 2 * PREPROCESS_S + BUSY_S
    assert 2 * FORWARD_S <= spent["inference.forward"] / 1e9 < 2 * FORWARD_S + BUSY_S


def test_a_text_generation_pipeline_has_one_inference(recording: Recording) -> None:
    """`generate` inside a pipeline is part of the pipeline's `inference`, not a second one."""
    generate = pipeline(
        "text-generation", model=models.generator(), tokenizer=models.tokenizer(), device="cpu"
    )
    with recording.request():
        generate("the cat", max_new_tokens=4, return_full_text=False)

    assert outermost(spans(recording.requests[0])) == [
        "preprocess", "inference", "inference.forward", "inference.prefill", "inference.decode",
        "postprocess",
    ]  # fmt: skip


TOKEN_S = 0.02


def slowly(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Take a known time for each token (a logits processor)."""
    time.sleep(TOKEN_S)
    return scores


def generating(streamer: Any, tokens: int) -> threading.Thread:
    """Start a `generate` on a thread of its own, as the documentation of streamers shows it."""
    words = models.tokenizer()
    inputs = words("the cat", return_tensors="pt", return_token_type_ids=False)
    options: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    options |= {"do_sample": True, "logits_processor": [slowly]}
    thread = threading.Thread(
        target=models.generator().generate, kwargs=dict(inputs, streamer=streamer, **options)
    )
    thread.start()
    return thread


def test_streams_of_two_requests_are_kept_apart(recording: Recording) -> None:
    """Tokens from a thread of its own are charged to the request that made the streamer."""

    async def generate(request: Request) -> Response:
        streamer = TextIteratorStreamer(models.tokenizer(), skip_prompt=True)
        thread = generating(streamer, int(request.query_params["tokens"]))

        def events() -> Iterator[str]:
            yield from (f"data: {text}\n\n" for text in streamer if text)
            thread.join()

        return StreamingResponse(events(), media_type="text/event-stream")

    app = StageMiddleware.around(
        Starlette(routes=[Route("/", generate, methods=["POST"])]), recording.recorder
    )
    sent = {f"{tokens:032x}": tokens for tokens in (4, 24)}
    with served(app) as port, ThreadPoolExecutor(2) as clients:
        answers = clients.map(
            lambda item: post(port, f"/?tokens={item[1]}", None, item[0]), sent.items()
        )
        assert all(status == 200 for status, _ in answers)
        wait_until(lambda: len(recording.requests) >= 2)

    assert {record.trace_id for record in recording.requests} == sent.keys()
    for record in recording.requests:
        tokens = sent[record.trace_id]
        assert 0 < record.chunk_gaps < tokens
        waited = [span for span in record.stages if span.stage == "inference"]
        # One is the call of `generate`, the others are waits for its tokens: 16 apart, then one.
        assert 2 < len(waited) <= min(tokens + 2, 16) + 2
        inference = [span.self_ns for span in record.stages if stage_of(span.stage) == "inference"]
        assert 0.7 * TOKEN_S * tokens < sum(inference) / 1e9 < TOKEN_S * tokens + BUSY_S
        assert record.stages_dropped == 0


def test_an_async_streamer_is_timed_too(recording: Recording) -> None:
    """Waiting for a token in a coroutine is `inference`."""

    async def read() -> list[str]:
        streamer = AsyncTextIteratorStreamer(models.tokenizer(), skip_prompt=True)
        thread = generating(streamer, 6)
        texts = [text async for text in streamer]
        await asyncio.to_thread(thread.join)
        return texts

    with recording.request():
        assert any(asyncio.run(read()))
    (record,) = recording.requests
    assert spans(record).count("inference") >= 4
    assert not any(span.failed for span in record.stages)


def test_outside_a_request_pipelines_are_as_they_were(
    recording: Recording, sleeping: Sleeping
) -> None:
    """Results come, nothing is recorded, and installing again wraps nothing twice."""
    wrapped = TextClassificationPipeline.preprocess
    assert install("transformers.pipelines")
    assert Sleeping(model=sleeping.model, tokenizer=sleeping.tokenizer, device="cpu")("good film")
    assert TextClassificationPipeline.preprocess is wrapped
    assert recording.read() == []
