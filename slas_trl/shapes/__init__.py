"""
The embedded default: a small text-to-image pipeline, the world that it draws, and that world's exact verifier.

`from slas_trl.shapes import load_shapes_pipeline, shapes_prompts`; the rest is in `world`, `verifier` and `pipeline`.
"""

from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset

    from .pipeline import ShapesPipeline, load_shapes_pipeline

__all__ = ["ShapesPipeline", "load_shapes_pipeline", "shapes_prompts"]

WEIGHTS = Path(__file__).parent / "weights"


def __getattr__(name: str) -> object:
    """The pipeline imports torch and diffusers, which takes seconds; prompts and verifier need neither."""
    if name not in ("ShapesPipeline", "load_shapes_pipeline"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import pipeline

    return getattr(pipeline, name)


def shapes_prompts(split: str) -> "Dataset":
    """
    The prompts of the shapes world.

    Args:
        split (`str`): `"train"`, or `"test"` for prompts whose meanings training never sees.

    Returns:
        [`~datasets.Dataset`]: grouped by category, with columns `prompt` and `category`, one of GenEval's six.
        `"test"` has each held-out prompt once. `"train"` has 96 rows of each category, since the score counts
        categories equally: prompts come several times in the small ones, and are a sample of the large ones.
    """
    from datasets import Dataset

    from . import world

    captions = world.captions_of(split) if split != "train" else world.balanced_captions(96)
    return Dataset.from_dict({"prompt": [c.text for c in captions], "category": [c.category for c in captions]})


def weights_folder(name: str) -> Path:
    """Where the weights `name`, `"pipeline"` or `"clip"`, are. Raises `FileNotFoundError` if they are not."""
    folder = WEIGHTS / name
    if not (folder / {"pipeline": "model_index.json", "clip": "config.json"}[name]).is_file():
        raise FileNotFoundError(f"The weights are not in {folder}: make them with examples/pretrain_shapes.py.")
    return folder
