"""
Rewards: plain callables of prompts and images, as `clip_score`, or `ClipScore(model=...)` with other options.

    def reward(prompts: list[str], images: list[PIL.Image.Image], **columns) -> list[float | None]

`columns` are the other columns of the data set, and whatever else the trainer passes; `None` means "no score". A
dictionary of such lists has named components, each of which is logged. A reward must not write into its arguments.
"""

from importlib import import_module
from typing import Any


# The file of each, imported when it is asked for. None has the name of a reward, which importing it would replace.
_FILES = {
    "aesthetics": ("Aesthetic", "aesthetic"),
    "blip": ("ImageReward", "image_reward"),
    "clip": ("ClipScore", "PickScore", "clip_score", "pick_score"),
    "detector": ("ObjectDetector", "object_detector"),
    "hps": ("HPSv2", "hpsv2"),
    "judge": ("UnifiedReward", "VLMJudge", "unified_reward", "vlm_judge"),
    "pixels": ("brightness", "incompressibility", "jpeg_compressibility"),
    "quoted_text": ("OCR", "ocr"),
    "remote_reward": ("ProcessReward", "RemoteReward", "remote"),
    "shapes": ("shapes_clip", "shapes_coloured_area", "shapes_verifier", "shapes_verifier_strict"),
}
_HOMES = {name: file for file, names in _FILES.items() for name in names}
__all__ = sorted(_HOMES)  # type: ignore[reportUnsupportedDunderAll]

NAMES = [name for name in __all__ if name.islower()]  # those that `reward_funcs` takes as strings


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its rewards are {', '.join(NAMES)}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
