"""
How well a pipeline draws the shapes world: sample held-out prompts, verify, and say how sure the figures are.

    value of a prompt      mean over its images
    category               mean over its prompts
    overall                mean of the categories, which count equally, as in GenEval

Intervals are those of [`~slas_trl.statistics`].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..seeds import generators
from ..shapes import world
from ..shapes.verifier import verify
from ..statistics import Estimate, mean_over_categories, mean_over_prompts, text_table


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SCORES = ("graded", "lenient", "strict")
OVERALL = "overall"
_OURS = ("prompt", "generator", "num_images_per_prompt", "output_type", "return_dict")
Estimates = dict[str, dict[str, Estimate]]  # by category and "overall", of each score


@dataclass(frozen=True, eq=False)
class ShapesReport:
    """The scores of one pipeline on P prompts."""

    prompts: tuple[str, ...]
    scores: dict[str, np.ndarray]  # "graded", "lenient" and "strict" of every image, each (P, images_per_prompt)
    seed: int  # of the sampling
    spec: ClassVar[str] = ".3f"  # of estimates in tables

    @property
    def images_per_prompt(self) -> int:
        """Number of images of each prompt."""
        return self.scores["graded"].shape[1]

    @property
    def estimates(self) -> Estimates:
        """By category, and for `"overall"`: the estimate of each score, `estimates["colors"]["strict"].mean`."""
        category_of = np.array([world.parse_caption(prompt).category for prompt in self.prompts])
        values, result = {name: scores.mean(1) for name, scores in self.scores.items()}, {}
        for category in world.CATEGORIES:
            if (where := category_of == category).any():
                result[category] = {name: mean_over_prompts(v[where]) for name, v in values.items()}
        result[OVERALL] = {name: mean_over_categories([each[name] for each in result.values()]) for name in values}
        return result

    def table(self) -> str:
        """Means with the half widths of their 95% intervals; Markdown, aligned for the terminal."""
        rows = [
            [category, str(scores["graded"].prompts), *(f"{scores[name]:{self.spec}}" for name in SCORES)]
            for category, scores in self.estimates.items()
        ]
        return text_table([["category", "prompts", *SCORES], *rows])

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON: the estimates, and the fields that [`from_dict`] reads."""
        numbers = {c: {name: e.to_dict() for name, e in scores.items()} for c, scores in self.estimates.items()}
        return {
            "seed": self.seed,
            "images_per_prompt": self.images_per_prompt,
            "estimates": numbers,
            "prompts": list(self.prompts),
            "scores": {name: values.tolist() for name, values in self.scores.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ShapesReport":
        """The report that [`to_dict`] wrote down."""
        scores = {name: np.asarray(data["scores"][name], dtype=np.float64) for name in SCORES}
        return cls(tuple(data["prompts"]), scores, data["seed"])


class ShapesDifference(ShapesReport):
    """The change from one report to another: `scores` are after - before, means over a prompt's images, `(P, 1)`."""

    spec = "+.3f"


def evaluate_shapes(
    pipe: "DiffusionPipeline",
    prompts: Sequence[str] | None = None,
    images_per_prompt: int = 4,
    seed: int = 0,
    batch_size: int = 48,
    **call: Any,
) -> ShapesReport:
    """
    Sample prompts of the shapes world by plain calls of the pipeline, and verify the images.

    Every image has a seed of its own, which follows from `seed`, the prompt's place in the list and the image's
    number: the same noise for two pipelines, whatever the batch size, so that [`paired_difference`] can compare them.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): any pipeline; its own scheduler samples.
        prompts (`Sequence[str]`, *optional*): different prompts of the world; by default all held-out ones.
        images_per_prompt (`int`, *optional*, defaults to `4`): images of each prompt.
        seed (`int`, *optional*, defaults to `0`): not negative.
        batch_size (`int`, *optional*, defaults to `48`): images at a time.
        call: further arguments of the pipeline, such as `num_inference_steps`.

    Raises:
        `ValueError`: for prompts of another world, none or equal ones, numbers below 1, and what is set here.
    """
    prompts = [c.text for c in world.captions_of("test")] if prompts is None else list(prompts)
    for prompt in prompts:
        world.parse_caption(prompt)  # before time is spent on sampling
    if not prompts or len(set(prompts)) < len(prompts):
        raise ValueError("Expected different prompts; for more images of a prompt, raise images_per_prompt.")
    if images_per_prompt < 1 or batch_size < 1:
        raise ValueError(f"Expected at least 1, got {images_per_prompt=} and {batch_size=}.")
    if clash := [name for name in _OURS if name in call]:
        raise ValueError(f"The evaluation itself sets {', '.join(clash)} of the pipeline's call. Leave that out.")
    sampler: Any = pipe  # every pipeline's call has its own arguments
    rows = [(place, number) for place in range(len(prompts)) for number in range(images_per_prompt)]
    verdicts = []
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        texts = [prompts[place] for place, _ in part]
        sources = generators((seed, *row) for row in part)
        verdicts += verify(texts, sampler(prompt=texts, generator=sources, **call).images)
    shape = len(prompts), images_per_prompt
    scores = {name: np.array([getattr(v, name) for v in verdicts], dtype=np.float64).reshape(shape) for name in SCORES}
    return ShapesReport(tuple(prompts), scores, seed)


def paired_difference(before: ShapesReport, after: ShapesReport) -> ShapesDifference:
    """
    The change, prompt by prompt, between two pipelines on the same prompts with the same seeds: the standard error is
    without what makes a prompt hard for both. Raises `ValueError` when prompts, seeds or numbers of images differ.
    """
    for name in ("prompts", "seed", "images_per_prompt"):
        if getattr(before, name) != getattr(after, name):
            raise ValueError(f"Only reports on equal {name} can be paired; evaluate one of them again.")
    was, now = ({name: scores.mean(1, keepdims=True) for name, scores in r.scores.items()} for r in (before, after))
    return ShapesDifference(before.prompts, {name: now[name] - was[name] for name in SCORES}, before.seed)


def compare(before: ShapesReport, after: ShapesReport) -> str:
    """
    A table of two reports and their paired difference: the graded score, and the strict one in brackets, by category;
    Markdown, aligned for the terminal. ± is the half width of a 95% interval. Raises as [`paired_difference`].
    """
    reports = before, after, paired_difference(before, after)
    columns = [
        [f"{of['graded']:{report.spec}} ({of['strict']:{report.spec}})" for of in report.estimates.values()]
        for report in reports
    ]
    return text_table([["category", "before", "after", "change"], *zip(before.estimates, *columns, strict=True)])
