"""
The embedded default: a small text-to-image pipeline, the world that it draws, and that world's exact verifier.

`from slas_trl.shapes import load_shapes_pipeline, shapes_prompts`; the rest is in `world`, `verifier` and `pipeline`.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset

    from slas_trl.shapes.pipeline import ShapesPipeline, load_shapes_pipeline

__all__ = ["ShapesPipeline", "load_shapes_pipeline", "shapes_prompts"]

WEIGHTS = Path(__file__).parent / "weights"
_HOMES = {"ShapesPipeline": "slas_trl.shapes.pipeline", "load_shapes_pipeline": "slas_trl.shapes.pipeline"}


def __getattr__(name: str) -> object:
    # The world, its verifier and its prompts are there without torch and diffusers, which take seconds to import.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def shapes_prompts(split: str) -> "Dataset":
    """
    The prompts of the shapes world.

    Args:
        split (`str`): `"train"`, or `"test"` for prompts whose meanings training never sees.

    Returns:
        [`~datasets.Dataset`]: grouped by category, with columns `prompt` and `category`: one of GenEval's six,
        `single_object`, `two_object`, `counting`, `colors`, `position` and `color_attr`. `"test"` has each held-out
        prompt once. `"train"` has 96 rows of each category, since the score counts categories equally: prompts come
        several times in the small ones, and are a sample of the large ones.

    Raises:
        `ValueError`: for another split.
    """
    from datasets import Dataset

    from . import world

    captions = world.captions_of(split) if split != "train" else world.balanced_captions(96)
    return Dataset.from_dict({"prompt": [c.text for c in captions], "category": [c.category for c in captions]})


def weights_folder(name: str) -> Path:
    """
    Where the weights `name`, `"pipeline"` or `"clip"`, are in the installed package.

    Raises:
        `FileNotFoundError`: when the package was installed without them.
    """
    folder = WEIGHTS / name
    if not (folder / {"pipeline": "model_index.json", "clip": "config.json"}[name]).is_file():
        raise FileNotFoundError(
            f"Expected the weights of the shapes world in {folder}, but they are not there. Install the package again "
            "with its data files, or make them with examples/pretrain_shapes.py and copy what it exports there."
        )
    return folder
