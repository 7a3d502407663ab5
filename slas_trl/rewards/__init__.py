"""
Rewards: plain callables of prompts and images.

    def reward(prompts: list[str], images: list[PIL.Image.Image], **columns) -> list[float | None]

`columns` are the other columns of the data set, and whatever else the trainer passes; `None` means "no score". A
dictionary of such lists has named components, each of which is logged.

`clip_score` and its like are such callables, with their default options; `ClipScore(model=...)` has others.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


# Where each is. Its libraries are imported when it is asked for, and not because of another one.
_HOMES = {
    "Aesthetic": "aesthetic",
    "ClipScore": "clip_score",
    "HPSv2": "hpsv2",
    "ImageReward": "image_reward",
    "OCR": "ocr",
    "ObjectDetector": "object_detector",
    "PickScore": "pick_score",
    "ProcessReward": "process",
    "RemoteReward": "remote",
    "UnifiedReward": "vlm_judge",
    "VLMJudge": "vlm_judge",
    "aesthetic": "aesthetic",
    "brightness": "pixels",
    "clip_score": "clip_score",
    "hpsv2": "hpsv2",
    "image_reward": "image_reward",
    "incompressibility": "pixels",
    "jpeg_compressibility": "pixels",
    "object_detector": "object_detector",
    "ocr": "ocr",
    "pick_score": "pick_score",
    "remote": "remote",
    "shapes_clip": "shapes",
    "shapes_coloured_area": "shapes",
    "shapes_verifier": "shapes",
    "shapes_verifier_strict": "shapes",
    "unified_reward": "vlm_judge",
    "vlm_judge": "vlm_judge",
}
__all__ = sorted(_HOMES)  # type: ignore[reportUnsupportedDunderAll]

NAMES = [name for name in __all__ if name.islower()]  # those that `reward_funcs` takes as strings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its rewards are {', '.join(NAMES)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Rewards(ModuleType):
    """Importing the file ocr.py sets the attribute `ocr` of its package, which is the reward and not the file."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Rewards
