"""
Rewards that look at pixels alone, and not at prompts: of no use for pictures, but of much for tests and first runs,
since it is plain to see whether the policy follows them.
"""

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from slas_trl.images import to_rgb


_QUALITY = 95  # that of DDPO, https://huggingface.co/papers/2305.13301
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def jpeg_compressibility(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """
    Minus the size of a picture as JPEG, which is higher the less there is to see: DDPO's reward.

    Args:
        prompts (`list[str]`): ignored.
        images (`list[PIL.Image.Image]`): of any size, but compare those of one size only.
        columns: ignored.

    Returns:
        `list[float]`: below 0, in kB (1000 bytes), at quality 95.
    """
    return [-_kilobytes(image) for image in images]


def incompressibility(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """DDPO's other reward: the same size without the minus, which is higher the more detail or noise there is."""
    return [_kilobytes(image) for image in images]


def brightness(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """
    Mean luminance of a picture.

    Args:
        prompts (`list[str]`): ignored.
        images (`list[PIL.Image.Image]`): of any size.
        columns: ignored.

    Returns:
        `list[float]`: from 0 (black) to 1 (white).
    """
    return [float(np.asarray(to_rgb(image)).mean((0, 1)) @ _LUMA) / 255 for image in images]


def _kilobytes(image: Image.Image) -> float:
    file = BytesIO()
    to_rgb(image).save(file, format="JPEG", quality=_QUALITY)
    return file.tell() / 1000
