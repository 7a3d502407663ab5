"""Evaluation: prompts in, images sampled as any user would sample them, scores with their uncertainty out."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from slas_trl.evaluation.shapes import ShapesDifference, ShapesReport, evaluate_shapes, paired_difference

__all__ = ["ShapesDifference", "ShapesReport", "evaluate_shapes", "paired_difference"]

_HOMES = {
    "ShapesDifference": "slas_trl.evaluation.shapes",
    "ShapesReport": "slas_trl.evaluation.shapes",
    "evaluate_shapes": "slas_trl.evaluation.shapes",
    "paired_difference": "slas_trl.evaluation.shapes",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
