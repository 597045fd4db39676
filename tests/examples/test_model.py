"""The example's model."""

import pytest
import torch

from stagescope.examples.torch_server.model import CLASSES, Classifier, top


def test_the_model_is_the_same_at_each_start() -> None:
    """Weights come from a fixed seed, so two servers give one answer."""
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    one, other = Classifier(4), Classifier(4)

    assert torch.equal(one.infer(one.collate([image]))[0], other.infer(other.collate([image]))[0])


def test_a_batch_gives_each_image_its_own_probabilities() -> None:
    """An image's answer does not depend on its companions, and sums to one."""
    model = Classifier(4)
    images = [torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8) for _ in range(5)]

    together = model.infer(model.collate(images))

    for image, answer in zip(images, together, strict=True):
        assert answer.shape == (CLASSES,)
        assert float(answer.sum()) == pytest.approx(1, abs=1e-4)
        assert torch.allclose(answer, model.infer(model.collate([image]))[0], atol=1e-5)


def test_making_a_model_leaves_the_random_numbers_alone() -> None:
    """The fixed seed is the model's own."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Classifier(4)

    assert torch.equal(torch.rand(3), expected)


def test_top_gives_the_likeliest_first() -> None:
    """Class numbers and probabilities come in falling order."""
    assert top(torch.tensor([0.1, 0.6, 0.0, 0.3]), 2) == [
        {"class": 1, "probability": 0.6},
        {"class": 3, "probability": 0.3},
    ]
