"""Marks in real stacks, and what is cut from them."""

import asyncio
import os
import sys
import traceback
from collections.abc import AsyncIterator, Iterator
from types import FrameType

import pytest

from stagescope import stage
from stagescope.agent.stacks.labels import RawStack, StageLabels, stage_of, waits
from stagescope.agent.stacks.source_blocks import Source
from stagescope.middleware.stage import marked
from stagescope.stacks import Frame, frame_text, parse_frame


def _frames() -> tuple[Frame, ...]:
    frames: list[Frame] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        frames.append(Frame(code.co_qualname, code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(frames[::-1])


@stage("preprocess")
def plain() -> tuple[Frame, ...]:
    return _frames()


@stage("inference")
async def coroutine() -> tuple[Frame, ...]:
    return _frames()


@stage("postprocess.own")
def generator() -> Iterator[tuple[Frame, ...]]:
    yield _frames()


@stage("respond")
async def async_generator() -> AsyncIterator[tuple[Frame, ...]]:
    yield _frames()


async def _all() -> dict[str, tuple[Frame, ...]]:
    return {
        "preprocess": plain(),
        "inference": await coroutine(),
        "postprocess.own": next(iter(list(generator()))),
        "respond": await anext(aiter(async_generator())),
    }


def test_every_kind_of_decorated_function_is_marked() -> None:
    """Function, coroutine, generator and async generator; our own frames are cut."""
    for name, frames in asyncio.run(_all()).items():
        (span,) = StageLabels().label(
            os.getpid(), [RawStack(1, "MainThread", 0, 1, 1, frames)], "demand", "in-process"
        )
        assert (span.stage, span.by, span.running) == (name, "marker", True)
        assert not any("/middleware/" in frame.file or "__stage" in frame.function
                       for frame in span.frames)  # fmt: skip
        assert span.frames[-1].file == __file__


def test_the_innermost_of_mark_and_block_wins() -> None:
    """A block in a decorated function, and a decorated function in a block."""
    sources = {"a.py": Source({3: "inference"}), "": Source()}
    mark, block = Frame("__stage_preprocess__", "", 0), Frame("work", "a.py", 3)
    assert stage_of([mark, block], sources) == ("inference", "block")
    assert stage_of([block, mark], sources) == ("preprocess", "marker")
    assert stage_of([Frame("Own.__stage_queue.batch__", "", 0)], sources)[0] == "queue.batch"
    assert stage_of([Frame("work", "a.py", 4)], sources) == ("", "none")


def test_a_marked_function_stays_what_it_was() -> None:
    """Name, signature and traceback are the function's; one copy serves all wrappers."""

    def wrapper() -> None:
        raise KeyError("told")

    def made() -> object:
        def inner() -> None:
            return None

        return marked(inner, "preprocess")

    name = wrapper.__name__
    assert marked(wrapper, "preprocess").__name__ == name
    with pytest.raises(KeyError) as raised:
        wrapper()
    text = "".join(traceback.format_exception(raised.value))
    assert 'raise KeyError("told")' in text
    assert "in __stage_preprocess__" in text
    assert made().__code__ is made().__code__  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("leaf", "idle"),
    [
        (Frame("Condition.wait", "/usr/lib/python3.12/threading.py", 1), True),
        (Frame("EpollSelector.select", "/usr/lib/python3.12/selectors.py", 1), True),
        (Frame("_worker", "/usr/lib/python3.12/concurrent/futures/thread.py", 1), True),
        (Frame("Runner.run", "/usr/lib/python3.12/asyncio/runners.py", 1), True),
        (Frame("get", "/app/views.py", 1), False),
        (Frame("read", "/app/views.py", 2), True),
    ],
)
def test_waiting_is_told_by_the_innermost_frame(leaf: Frame, idle: bool) -> None:
    """By its name in the libraries that wait, by what its line calls elsewhere."""
    source = Source(waits=frozenset({2} if leaf.file.startswith("/app") else ()))
    assert waits([Frame("main", "/app/views.py", 9), leaf], {leaf.file: source}) == idle


def test_threads_of_ours_are_left_out() -> None:
    """The probe and its kin are not the server's."""
    frames = (Frame("run", "/app/a.py", 1),)
    raws = [RawStack(1, name, 0, 1, 1, frames) for name in ("stagescope-probe", "MainThread")]
    assert [s.thread for s in StageLabels().label(1, raws, "window", "py-spy")] == ["MainThread"]


@pytest.mark.parametrize("frame", [Frame("f", "/a (b):c/d.py", 7), Frame("<module>", "x.py", 0)])
def test_a_frame_is_read_as_it_was_written(frame: Frame) -> None:
    """Also where the file's name has parentheses and colons."""
    assert parse_frame(frame_text(frame)) == frame
    assert parse_frame("native") == Frame("native", "", 0)
