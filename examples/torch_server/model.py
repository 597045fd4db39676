"""A small residual network with random weights: real work, nothing to download."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stagescope.examples.image_server.app import Image
from stagescope.examples.image_server.settings import Settings, cores

CLASSES = 1000
SEED = 20


class Block(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.around = nn.Sequential(
            nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the body's output added to the projected input."""
        return torch.relu(self.body(x) + self.around(x))


class Normalise(nn.Module):
    """Bytes to the range that the first convolution expects."""

    def forward(self, images: Tensor) -> Tensor:
        """Return *images* as floats around 0."""
        return images.float().sub_(127.5).div_(58)


def _network(width: int) -> nn.Module:
    return nn.Sequential(
        Normalise(),
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        Block(4 * width, 8 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, CLASSES),
    )


class Classifier:
    """The network on the best device here, behind the two calls that the batcher makes."""

    def __init__(self, chosen: Settings) -> None:
        # One intra-op thread on two cores: the event loop and the decoders need the other.
        torch.set_num_threads(max(1, cores() // 2))
        self.device = _device()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self._network = _network(chosen.width).to(self.device).eval()

    def collate(self, images: Sequence[Image]) -> Tensor:
        """Stack images (3, side, side) into one input."""
        return torch.stack([torch.from_numpy(image) for image in images])

    def infer(self, images: Tensor) -> Sequence[Image]:
        """Return the class probabilities of each image, on the CPU."""
        with torch.inference_mode():
            logits = self._network(images.to(self.device))
            return list(torch.softmax(logits, dim=1).cpu().numpy())


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
