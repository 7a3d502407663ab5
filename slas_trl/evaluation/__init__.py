"""Evaluation: prompts in, images sampled as any user would sample them, scores with their uncertainty out."""

from .shapes import ShapesDifference, ShapesReport, evaluate_shapes, paired_difference


__all__ = ["ShapesDifference", "ShapesReport", "evaluate_shapes", "paired_difference"]
