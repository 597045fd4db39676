"""`time_module`: calls of a torch module as a stage, plain and compiled, good and bad."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import nn

from stagescope.middleware.hooks.torch import time_module
from stagescope.records import RequestRecord
from stagescope.testing.recording import Recording

MS = 1_000_000
INPUT = torch.ones(2, 4)


class Sleeper(nn.Module):
    """A model that takes as long as it is told, and may fail."""

    def __init__(self, inner: nn.Module | None = None, sleep_s: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.inner = inner
        self.sleep_s = sleep_s

    def forward(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sleep, then multiply."""
        if self.sleep_s:
            time.sleep(self.sleep_s)
        if self.inner is not None:
            tensor = self.inner(tensor)
        if tensor.shape[0] == 3:
            raise ValueError("three is too many")
        result: torch.Tensor = self.linear(tensor)
        return result


@pytest.fixture(autouse=True)
def _our_faults_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our guard would swallow fails the test."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """A small recorder file."""
    with closing(Recording(tmp_path)) as found:
        yield found


def called(recording: Recording, model: nn.Module, tensor: torch.Tensor = INPUT) -> RequestRecord:
    """Call *model* in a request, and give its record."""
    with recording.request():
        model(tensor)
    return recording.requests[-1]


def stages(record: RequestRecord) -> list[tuple[str, bool]]:
    """Return name and failure of each opening."""
    return [(span.stage, span.failed) for span in record.stages]


def test_a_call_is_inference(recording: Recording) -> None:
    """The time that the module took is charged to `inference`, nothing else is."""
    record = called(recording, time_module(Sleeper(sleep_s=0.03)))

    assert stages(record) == [("inference", False)]
    assert 30 * MS <= record.self_ns()["inference"] < 300 * MS


def test_only_the_outermost_of_a_stage_counts(recording: Recording) -> None:
    """A timed module within a timed one is not a second inference; another stage's is its own."""
    model = time_module(Sleeper(time_module(Sleeper(time_module(Sleeper(), "inference.head")))))

    assert stages(called(recording, model)) == [("inference", False), ("inference.head", False)]


def test_a_module_that_raises_is_closed_and_failed(recording: Recording) -> None:
    """The error is the user's, the stage says that it failed, and the next call is as ever."""
    model = time_module(Sleeper(time_module(Sleeper())))
    with pytest.raises(ValueError, match="three is too many"):
        called(recording, model, torch.ones(3, 4))
    assert stages(recording.requests[0]) == [("inference", True)]

    assert stages(called(recording, model)) == [("inference", False)]


def test_a_call_in_an_exception_handler_has_not_failed(recording: Recording) -> None:
    """A fallback model that works, called while an error is handled, is no failure."""
    model = time_module(Sleeper())
    with recording.request():
        try:
            model(torch.ones(3, 4))
        except ValueError:
            model(INPUT)

    assert stages(recording.requests[0]) == [("inference", True), ("inference", False)]


def test_outside_a_request_and_twice_timed_nothing_changes(recording: Recording) -> None:
    """The model gives what it gave; a second `time_module` does nothing."""
    model = Sleeper()
    expected = model(INPUT)
    assert time_module(time_module(model)) is model
    assert torch.equal(model(INPUT), expected)

    assert stages(called(recording, model)) == [("inference", False)]


@pytest.mark.parametrize("way", ["torch.compile", "module.compile"])
def test_a_compiled_module_is_timed_around(recording: Recording, way: str) -> None:
    """The call is timed, without a break in the graph (`fullgraph` would refuse one)."""
    torch._dynamo.reset()
    plain = Sleeper()
    expected = plain(INPUT)
    model: nn.Module
    if way == "torch.compile":
        compiled = torch.compile(plain, backend="eager", fullgraph=True)
        assert isinstance(compiled, nn.Module)
        model = time_module(compiled)
    else:
        plain.compile(backend="eager", fullgraph=True)
        model = time_module(time_module(plain))

    for _ in range(2):
        assert stages(called(recording, model)) == [("inference", False)]
    assert torch.equal(model(INPUT), expected)


def test_compiling_a_timed_module_breaks_nothing(recording: Recording) -> None:
    """Where it is compiled later it works as before, in one graph; it is only not timed."""
    torch._dynamo.reset()
    plain = Sleeper()
    expected = plain(INPUT)
    model = torch.compile(time_module(plain), backend="eager", fullgraph=True)
    assert isinstance(model, nn.Module)

    assert stages(called(recording, model)) == []
    assert torch.equal(model(INPUT), expected)


def test_a_timed_module_can_be_copied_and_pickled(recording: Recording) -> None:
    """The hooks go along and work in the copy."""
    model = time_module(nn.Linear(4, 4))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert stages(called(recording, copied)) == [("inference", False)]
        assert copied.state_dict().keys() == model.state_dict().keys()
