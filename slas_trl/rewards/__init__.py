"""
Rewards: plain functions of prompts and images.

    def reward(prompts: list[str], images: list[PIL.Image.Image], **columns) -> list[float | None]

`columns` are the other columns of the data set, and whatever else the trainer passes; `None` means "no score".
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from slas_trl.rewards.shapes import shapes_clip, shapes_coloured_area, shapes_verifier, shapes_verifier_strict

__all__ = ["shapes_clip", "shapes_coloured_area", "shapes_verifier", "shapes_verifier_strict"]

_HOMES = {
    "shapes_clip": "slas_trl.rewards.shapes",
    "shapes_coloured_area": "slas_trl.rewards.shapes",
    "shapes_verifier": "slas_trl.rewards.shapes",
    "shapes_verifier_strict": "slas_trl.rewards.shapes",
}


def __getattr__(name: str) -> object:
    # A reward's libraries are imported when that reward is asked for, and not because of another one.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its rewards are {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
