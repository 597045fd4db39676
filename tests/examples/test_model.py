"""The example servers' models: on ONNX Runtime and on torch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from stagescope.examples.image_server import make_model, onnx
from stagescope.examples.image_server.app import Model, top
from stagescope.examples.image_server.settings import Settings
from stagescope.examples.torch_server import model as torch_model

CLASSES = 1000
SMALL = Settings(width=4, image_side=32)

each_model = pytest.mark.parametrize("make", [onnx.Classifier, torch_model.Classifier])


def image(seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return a picture of random bytes."""
    return np.random.default_rng(seed).integers(0, 256, (3, 32, 32), np.uint8)


@each_model
def test_the_model_is_the_same_at_each_start(make: Callable[[Settings], Model]) -> None:
    """Weights come from a fixed seed, so two servers give one answer."""
    one, other = make(SMALL), make(SMALL)

    assert np.array_equal(
        one.infer(one.collate([image()]))[0], other.infer(other.collate([image()]))[0]
    )


@each_model
def test_a_batch_gives_each_image_its_own_probabilities(make: Callable[[Settings], Model]) -> None:
    """An image's answer does not depend on its companions, and sums to one."""
    model = make(SMALL)
    images = [image(seed) for seed in range(5)]

    together = model.infer(model.collate(images))

    for single, answer in zip(images, together, strict=True):
        assert answer.shape == (CLASSES,)
        assert float(answer.sum()) == pytest.approx(1, abs=1e-4)
        assert np.allclose(answer, model.infer(model.collate([single]))[0], atol=1e-5)


def test_the_onnx_file_is_what_its_script_makes() -> None:
    """`classifier.onnx` is `make_model.network()`, byte for byte."""
    assert make_model.network() == onnx.MODEL.read_bytes()


def test_making_a_model_leaves_the_random_numbers_alone() -> None:
    """The fixed seed is the torch model's own."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    torch_model.Classifier(SMALL)

    assert torch.equal(torch.rand(3), expected)


def test_top_gives_the_likeliest_first() -> None:
    """Class numbers and probabilities come in falling order."""
    assert top(np.array([0.1, 0.6, 0.0, 0.3]), 2) == [
        {"class": 1, "probability": 0.6},
        {"class": 3, "probability": 0.3},
    ]
