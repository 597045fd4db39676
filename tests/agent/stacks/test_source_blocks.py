"""Blocks of stages in sources: what the AST says is what happens when the code runs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.agent.stacks.labels import stage_of
from stagescope.agent.stacks.source_blocks import read_source
from stagescope.stacks import Frame

FILE = "generated.py"


def _indented(block: list[str]) -> list[str]:
    return [f"    {line}" for line in block]


def _joined(parts: list[list[str]]) -> list[str]:
    return [line for part in parts for line in part]


def _compound(inner: st.SearchStrategy[list[str]]) -> st.SearchStrategy[list[str]]:
    names = st.sampled_from(["preprocess", "inference", "mine.own"])
    headers = st.one_of(
        names.map(lambda name: f"with s('{name}'):"),
        names.map(lambda name: f"with stagescope.stage({name!r}) as _, other():"),
        st.tuples(names, names).map(lambda two: f"with s('{two[0]}'), s('{two[1]}'):"),
        st.sampled_from([
            "with other():", "with NAMED():", "with s(NAME):", "with b.inference():",
            "with b.collate():", "for _ in (0,):", "if True:",
        ]),
    )  # fmt: skip
    bodies = st.lists(inner, min_size=1, max_size=3).map(_joined)
    return st.one_of(
        st.tuples(headers, bodies).map(lambda two: [two[0], *_indented(two[1])]),
        bodies.map(lambda body: ["def f():", *_indented(body), "f()", "later.append(f)"]),
        bodies.map(lambda body: ["try:", *_indented(body), "finally:", "    note()"]),
        bodies.map(lambda body: ["def g():", *_indented(body), "    yield", "later.append(lambda g=g: [*g()])"]),
    )  # fmt: skip


SIMPLE = st.sampled_from([
    ["note()"], ["[note() for _ in (0,)]"], ["(lambda: note())()"],
    ["later.append(lambda: note())"], ["note(", "    *()", ")"],
])  # fmt: skip
PROGRAMS = st.lists(st.recursive(SIMPLE, _compound, max_leaves=12), min_size=1, max_size=4)


@given(PROGRAMS)
def test_frames_tell_the_stage_that_is_open(parts: list[list[str]]) -> None:
    """Wherever a program stands, its stack names the stage opened last, whoever calls whom."""
    head = ["import stagescope", "from stagescope import stage as s", "NAME = 'constant'"]
    lines = [*head, *_joined(parts), "while later: later.pop()()"]
    source = "\n".join(lines)
    sources = {FILE: read_source(source.encode())}
    opened: list[str] = []
    seen = 0

    @contextmanager
    def opening(name: str) -> Iterator[None]:
        opened.append(name)
        yield
        opened.pop()

    def note() -> None:
        nonlocal seen
        seen += 1
        frames = _frames(sys._getframe(1))
        assert stage_of(frames, sources)[0] == (opened[-1] if opened else ""), source

    blank = ["", "", *lines[2:]]  # the imports' lines stay, their names are the world's
    exec(compile("\n".join(blank), FILE, "exec"), _world(opening, note))  # noqa: S102 - what is tested
    assert seen or "note" not in source


def _world(opening: object, note: object) -> dict[str, object]:
    """What the programs use, beside `stage`, whose import is left out."""

    @contextmanager
    def other() -> Iterator[None]:
        yield

    class Batch:
        inference = staticmethod(lambda: opening("inference"))  # type: ignore[operator]
        collate = staticmethod(lambda: opening("batch.collate"))  # type: ignore[operator]

    return {
        "s": opening, "stagescope": SimpleNamespace(stage=opening), "b": Batch, "other": other, "NAMED": other,
        "note": note, "later": [],
    }  # fmt: skip


def _frames(frame: FrameType | None) -> list[Frame]:
    frames: list[Frame] = []
    while frame is not None:
        if frame.f_code.co_filename == FILE:
            frames.append(Frame(frame.f_code.co_qualname, FILE, frame.f_lineno))
        frame = frame.f_back
    return frames[::-1]


@pytest.mark.parametrize(
    "source",
    [
        b"with stage('a'):\n  x()",  # not ours: stagescope is nowhere imported
        b"import stagescope\nwith stage('a'):\n  x()",
        b"from stagescope import stage\nwith stage(name):\n  x()",
        b"from stagescope import stage\nwith stage('a'\n  x()",  # no Python
        b"# stagescope\nwith torch.inference_mode():\n  x()",
        b"# stagescope\nwith engine.inference(1):\n  x()",
        b"\xff\x00stagescope",
        b"",
    ],
)
def test_what_is_no_block_of_ours_is_none(source: bytes) -> None:
    """Foreign names, names that are not written there, and broken files give no stage."""
    assert not read_source(source).stages


def test_every_spelling_of_the_import_counts() -> None:
    """By name, by another name, by module, by the module's other name, inside a function."""
    for head, call in (
        ("from stagescope import stage", "stage"),
        ("from stagescope import stage as s", "s"),
        ("import stagescope", "stagescope.stage"),
        ("import stagescope as sg", "sg.stage"),
        ("import stagescope.middleware.stage", "stagescope.middleware.stage.stage"),
        ("from stagescope.middleware.stage import stage", "stage"),
    ):
        source = f"{head}\nasync def f():\n    with {call}('a'):\n        await x()\n"
        assert read_source(source.encode()).stages == {4: "a"}, head


def test_lines_that_wait_are_told() -> None:
    """A call that waits by its name, in any file."""
    assert read_source(b"x = 1\ntime.sleep(1)\nsleeping = 2\nlock.acquire()\n").waits == {2, 4}
