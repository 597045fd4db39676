"""The example's JPEG decoding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.examples.image_server import images
from stagescope.examples.image_server.images import NotAnImage, decode, sample_jpeg


def test_a_sample_is_decoded_to_the_models_input() -> None:
    """The picture that the demo sends becomes three planes of bytes, true to its slopes."""
    tensor = decode(sample_jpeg(), 64)

    assert tensor.shape == (3, 64, 64)
    assert tensor.dtype == np.uint8
    red = tensor[0].astype(float)
    assert red[-8:].mean() - red[:8].mean() > 150  # red grows downwards


def test_a_sample_is_the_same_each_time() -> None:
    """One seed gives one picture, another seed another."""
    assert sample_jpeg(seed=1) == sample_jpeg(seed=1)
    assert sample_jpeg(seed=1) != sample_jpeg(seed=2)


@given(st.binary(max_size=2000))
def test_garbage_is_no_image(body: bytes) -> None:
    """Bytes that are no JPEG give NotAnImage and nothing else."""
    with pytest.raises(NotAnImage):
        decode(body, 8)


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 255))
def test_a_damaged_jpeg_is_decoded_or_refused(cut: int, at: int, value: int) -> None:
    """A JPEG cut short and altered is decoded as far as it goes or refused, never a crash."""
    whole = sample_jpeg(96, 64)
    damaged = bytearray(whole[: len(whole) - cut])
    damaged[at % len(damaged) : at % len(damaged) + 1] = bytes([value])
    try:
        tensor = decode(bytes(damaged), 8)
    except NotAnImage:
        return

    assert tensor.shape == (3, 8, 8)


def test_a_huge_picture_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a JPEG may promise more pixels than memory; that is refused."""
    monkeypatch.setattr(images, "MAX_PIXELS", 95 * 64)

    with pytest.raises(NotAnImage, match="96 x 64 pixels"):
        decode(sample_jpeg(96, 64), 8)


def test_a_grey_jpeg_gets_three_planes() -> None:
    """A picture without colours is served too."""
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.full((20, 20), 77, np.uint8)).save(out, "JPEG")

    assert abs(decode(out.getvalue(), 4).astype(int) - 77).max() <= 2
