"""The routes. No stage is marked: one line times the pipelines, one the requests."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from transformers import TextIteratorStreamer, pipeline

from stagescope import StageMiddleware, install
from stagescope.examples.transformers_server import models

install("transformers.pipelines")  # preprocess, inference, postprocess
install("transformers.generation.utils")  # generate, and streamers

words = models.tokenizer()
classify = pipeline("text-classification", model=models.classifier(), tokenizer=words, device="cpu")
generator = models.generator()

api = FastAPI()


class Texts(BaseModel):
    """What to classify: some texts, in one batch."""

    texts: list[str] = Field(min_length=1, max_length=64)


class Prompt(BaseModel):
    """What to go on from."""

    text: str
    max_new_tokens: int = Field(default=20, ge=1, le=64)


@api.get("/healthz")
def healthz() -> dict[str, str]:
    """Tell that the models are loaded."""
    return {"status": "ok"}


@api.post("/classify")
def classify_texts(asked: Texts) -> list[dict[str, Any]]:
    """Classify each text; the pipeline makes one batch of them."""
    result: list[dict[str, Any]] = classify(asked.texts, batch_size=len(asked.texts))
    return result


@api.post("/generate")
def generate(prompt: Prompt) -> StreamingResponse:
    """Stream new words as server-sent events, as they are generated on a thread."""
    inputs = words(prompt.text, return_tensors="pt", return_token_type_ids=False)
    streamer = TextIteratorStreamer(words, skip_prompt=True)
    asked = dict(
        inputs, streamer=streamer, max_new_tokens=prompt.max_new_tokens,
        min_new_tokens=prompt.max_new_tokens, do_sample=True,
    )  # fmt: skip
    thread = Thread(target=generator.generate, kwargs=asked)
    thread.start()
    return StreamingResponse(_events(streamer, thread), media_type="text/event-stream")


def _events(streamer: TextIteratorStreamer, thread: Thread) -> Iterator[str]:
    for text in streamer:
        if text:
            yield f"data: {text}\n\n"
    thread.join()


app = StageMiddleware(api, service="transformers-server")
