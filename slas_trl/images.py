"""Pictures as rewards and people see them: 8-bit RGB, and one of a video."""

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB, without transparency. White is guessed in modes I and F: 1 (F), 255 or 65535, if none is above."""
    if not image.mode.startswith(("I", "F")):
        return (image.convert("LA") if image.mode == "La" else image).convert("RGB")  # from La there is no other way
    levels = np.nan_to_num(np.asarray(image).astype(np.float32), posinf=0, neginf=0)
    whites = {"I": (255,), "F": (1, 255)}.get(image.mode, ())
    white = next((white for white in whites if levels.max() <= 1.1 * white), 65535)  # some overshoot
    return Image.fromarray((levels / white * 255).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def still(picture: Image.Image | list[Image.Image] | None) -> Image.Image:
    """A picture to look at: of a video its middle frame, and a gray square for one that is missing."""
    if picture is None:
        return Image.new("RGB", (64, 64), "gray")
    return picture[len(picture) // 2] if isinstance(picture, list) else picture
