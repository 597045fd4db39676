"""JPEG bytes to the model's input, and a picture to send."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

MAX_PIXELS = 50_000_000


class NotAnImage(ValueError):
    """The bytes are no JPEG that can be decoded here."""


def decode(body: bytes, side: int) -> npt.NDArray[np.uint8]:
    """Decode a JPEG and resize it: an array (3, *side*, *side*) of bytes.

    Pillow leaves the GIL while it works, so this belongs on a thread.
    Raises NotAnImage.
    """
    return np.array(_resized(body, side)).transpose(2, 0, 1)


def _resized(body: bytes, side: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(body), formats=["JPEG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise NotAnImage(f"{image.width} x {image.height} pixels are too many")
            image.draft("RGB", (side, side))  # the decoder leaves out detail that nobody will see
            return image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, Image.DecompressionBombError) as problem:
        raise NotAnImage(f"not a JPEG that can be decoded: {problem}") from problem


def sample_jpeg(width: int = 640, height: int = 480, seed: int = 0) -> bytes:
    """Make a JPEG with slopes, edges and noise, of about the size that a photo has."""
    down, right = np.mgrid[0:height, 0:width]
    slopes = np.stack([255 * down / height, 255 * right / width, 64 * ((down // 40) % 2)], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 12, slopes.shape)
    out = io.BytesIO()
    Image.fromarray(np.clip(slopes + noise, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()
