"""Rewards that tests serve, or run in a process of their own."""

import os
import signal
import time
from pathlib import Path

from PIL import Image


def picture(number: int, size: tuple[int, int] = (4, 4)) -> Image.Image:
    """A picture whose score is its number."""
    return Image.new("RGB", size, (number >> 16, number >> 8 & 255, number & 255))


def number_of(image: Image.Image) -> int:
    red, green, blue = image.convert("RGB").getpixel((image.width - 1, image.height - 1))
    return red << 16 | green << 8 | blue


def numbers(prompts, images, completions, **columns):
    """The picture's number. Prompts may ask for something else."""
    assert completions == images
    for prompt in prompts:
        if prompt == "bad":
            raise ValueError("the prompt is bad")
        if prompt == "slow" or prompt.startswith("/"):
            time.sleep(1 if prompt == "slow" else Path(prompt).touch() or 8)
    return [None if prompt == "none" else number_of(image) / 8 for prompt, image in zip(prompts, images, strict=True)]


def with_columns(prompts, images, offset, reference=None, **columns):
    """Components, of which one comes from a column of pictures."""
    given = reference or images
    return {
        "own": [number_of(image) + more["by"][0] for image, more in zip(images, offset, strict=True)],
        "reference": [None if image is None else number_of(image) for image in given],
    }


async def later(prompts, images, **columns):
    return [number_of(image) for image in images]


def in_process(prompts, images, scale: int = 1, **columns):
    """Numbers of the pictures, or what a prompt asks for: the process, an error, or its death."""
    print("a line that is printed")
    for prompt in prompts:
        if prompt == "raise":
            raise KeyError("of a kind")
        if prompt == "exit":
            os._exit(3)
        if os.path.isfile(prompt):  # so that it happens once
            os.remove(prompt)
            os.kill(os.getpid(), signal.SIGKILL)
    return [os.getpid() if p == "process" else scale * number_of(i) for p, i in zip(prompts, images, strict=True)]
