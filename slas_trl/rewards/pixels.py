"""Rewards that look at pixels alone, for tests and first runs: it is plain to see whether the policy follows them."""

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from ..images import to_rgb
from .base import describe


_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
_REST = "everything else, the prompt included"


@describe("how little there is to see in a picture, by its size as JPEG", _REST)
def jpeg_compressibility(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """DDPO's reward: minus the size as JPEG of quality 95, in kB (1000 bytes). Compare pictures of one size only."""
    return [-_kilobytes(image) for image in images]


@describe("how much detail or noise a picture has, by its size as JPEG", _REST)
def incompressibility(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """DDPO's other reward: the same size without the minus."""
    return [_kilobytes(image) for image in images]


@describe("how bright a picture is", _REST)
def brightness(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """Mean luminance of a picture, from 0 (black) to 1 (white)."""
    return [float(np.asarray(to_rgb(image)).mean((0, 1)) @ _LUMA) / 255 for image in images]


def _kilobytes(image: Image.Image) -> float:
    file = BytesIO()
    to_rgb(image).save(file, format="JPEG", quality=95)  # as DDPO, https://huggingface.co/papers/2305.13301
    return file.tell() / 1000
