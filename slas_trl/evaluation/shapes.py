"""
How well a pipeline draws the shapes world: sample held-out prompts, verify, and say how sure the figures are.

    value of a prompt      m_p = mean over its images
    category               mean of its k prompts' m_p;   se = std(m_p, ddof 1) / sqrt(k)
    overall                mean of the C categories;      se = sqrt(sum of their se^2) / C

Images of one prompt are alike, so prompts, not images, are what is independent: the standard error is the
cluster-robust one, for prompts like these rather than for these prompts alone. Overall counts categories equally, as
GenEval does (https://huggingface.co/papers/2310.11513). Intervals are Student's t with k - 1 degrees of freedom, and
those of Welch-Satterthwaite for the overall mean; symmetric, so near 0 and 1 they may reach beyond.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import stats

from slas_trl.shapes import world
from slas_trl.shapes.verifier import verify


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SCORES = ("graded", "lenient", "strict")
OVERALL = "overall"
_OURS = ("prompt", "generator", "num_images_per_prompt", "output_type", "return_dict")


@dataclass(frozen=True)
class Estimate:
    """
    A mean over prompts, and how sure it is.

    Attributes:
        mean (`float`): in [0, 1], or a difference of two such means.
        se (`float`): standard error; NaN with a single prompt.
        half_width (`float`): of the 95% interval around the mean; NaN with a single prompt.
        prompts (`int`): number of prompts.
    """

    mean: float
    se: float
    half_width: float
    prompts: int

    @property
    def low(self) -> float:
        """Lower end of the 95% interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the 95% interval."""
        return self.mean + self.half_width

    def to_dict(self) -> dict[str, float | int | None]:
        """Numbers only, with `None` for what is not known."""
        numbers = {name: getattr(self, name) for name in ("mean", "se", "low", "high", "prompts")}
        return {name: None if math.isnan(number) else number for name, number in numbers.items()}


@dataclass(frozen=True, eq=False)
class ShapesReport:
    """
    The scores of one pipeline.

    Attributes:
        prompts (`tuple[str, ...]`): P prompts.
        scores (`dict[str, np.ndarray]`):
            `"graded"`, `"lenient"` and `"strict"` of every image, each `(P, images_per_prompt)`.
        seed (`int`): of the sampling.
    """

    prompts: tuple[str, ...]
    scores: dict[str, np.ndarray]
    seed: int

    @property
    def images_per_prompt(self) -> int:
        """Number of images of each prompt."""
        return self.scores["graded"].shape[1]

    @property
    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """By category, and for `"overall"`: the estimate of each score, `estimates["colors"]["strict"].mean`."""
        return _estimates(self.prompts, {name: values.mean(1) for name, values in self.scores.items()})

    def table(self) -> str:
        """Means with the half widths of their 95% intervals; Markdown, aligned for the terminal."""
        return _table(self.estimates)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON: the estimates, and what [`from_dict`] needs."""
        return {
            "seed": self.seed,
            "images_per_prompt": self.images_per_prompt,
            "estimates": _as_numbers(self.estimates),
            "prompts": list(self.prompts),
            "scores": {name: values.tolist() for name, values in self.scores.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ShapesReport":
        """The report that [`to_dict`] wrote down."""
        scores = {name: np.asarray(data["scores"][name], dtype=np.float64) for name in SCORES}
        return cls(tuple(data["prompts"]), scores, data["seed"])


@dataclass(frozen=True, eq=False)
class ShapesDifference:
    """
    What changed from one report to another, prompt by prompt.

    Attributes:
        prompts (`tuple[str, ...]`): P prompts.
        differences (`dict[str, np.ndarray]`): of each score, after - before, mean over a prompt's images, `(P,)`.
    """

    prompts: tuple[str, ...]
    differences: dict[str, np.ndarray]

    @property
    def estimates(self) -> dict[str, dict[str, Estimate]]:
        """By category, and for `"overall"`: the estimate of each score's difference."""
        return _estimates(self.prompts, self.differences)

    def table(self) -> str:
        """Mean differences with the half widths of their 95% intervals; Markdown, aligned for the terminal."""
        return _table(self.estimates, sign="+")

    def to_dict(self) -> dict[str, Any]:
        """The estimates, for JSON."""
        return {"estimates": _as_numbers(self.estimates)}


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

    Returns:
        [`ShapesReport`]: per category and overall, the mean of the graded, lenient and strict score.

    Raises:
        `ValueError`: for a prompt that is not of this world or comes twice, for no prompts, for numbers below 1, and
            for arguments in `call` that are set here.
    """
    prompts = [c.text for c in world.captions_of("test")] if prompts is None else list(prompts)
    for prompt in prompts:
        world.parse_caption(prompt)  # before time is spent on sampling
    if not prompts or len(set(prompts)) < len(prompts):
        raise ValueError(
            f"Expected prompts that differ, got {len(prompts)} with {len(set(prompts))} different ones. For more "
            "images of a prompt, raise images_per_prompt."
        )
    if images_per_prompt < 1 or batch_size < 1:
        raise ValueError(
            f"Expected at least 1, got images_per_prompt={images_per_prompt} and batch_size={batch_size}."
        )
    if clash := [name for name in _OURS if name in call]:
        raise ValueError(f"The evaluation itself sets {', '.join(clash)} of the pipeline's call. Leave that out.")
    sampler: Any = pipe  # every pipeline's call has its own arguments
    rows = [(place, number) for place in range(len(prompts)) for number in range(images_per_prompt)]
    verdicts = []
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        texts = [prompts[place] for place, _ in part]
        generators = [torch.Generator().manual_seed(_seed_of(seed, *row)) for row in part]
        verdicts += verify(texts, sampler(prompt=texts, generator=generators, **call).images)
    shape = len(prompts), images_per_prompt
    scores = {name: np.array([getattr(v, name) for v in verdicts], dtype=np.float64).reshape(shape) for name in SCORES}
    return ShapesReport(tuple(prompts), scores, seed)


def paired_difference(before: ShapesReport, after: ShapesReport) -> ShapesDifference:
    """
    What changed from one pipeline to another that was evaluated on the same prompts with the same seeds.

    Differences are taken prompt by prompt. What makes a prompt hard for both falls out of the standard error, which is
    therefore smaller than those of the two reports suggest.

    Args:
        before ([`ShapesReport`]): what to compare with.
        after ([`ShapesReport`]): minuend.

    Returns:
        [`ShapesDifference`]: after - before.

    Raises:
        `ValueError`: when prompts, seeds or numbers of images differ.
    """
    for what, a, b in (
        ("prompts", before.prompts, after.prompts),
        ("seed", before.seed, after.seed),
        ("images_per_prompt", before.images_per_prompt, after.images_per_prompt),
    ):
        if a != b:
            shown = "" if what == "prompts" else f": {a} and {b}"
            raise ValueError(
                f"Only reports on equal {what} can be paired, but these two differ{shown}. Evaluate one of them again "
                f"with the other's {what}."
            )
    differences = {name: after.scores[name].mean(1) - before.scores[name].mean(1) for name in SCORES}
    return ShapesDifference(before.prompts, differences)


def compare(before: ShapesReport, after: ShapesReport) -> str:
    """
    A table of two reports and their paired difference: the graded score, and the strict one in brackets, by category.

    Args:
        before ([`ShapesReport`]): what to compare with.
        after ([`ShapesReport`]): on the same prompts, with the same seeds.

    Returns:
        `str`: Markdown, aligned for the terminal. What follows ± is the half width of a 95% interval.

    Raises:
        `ValueError`: when the reports cannot be paired, see [`paired_difference`].
    """
    columns = [(before.estimates, ""), (after.estimates, ""), (paired_difference(before, after).estimates, "+")]
    rows = [["category", "before", "after", "change"]]
    for category in columns[0][0]:
        cells = [
            f"{_written(estimates[category]['graded'], sign)} ({_written(estimates[category]['strict'], sign)})"
            for estimates, sign in columns
        ]
        rows.append([category, *cells])
    return _markdown(rows)


def _seed_of(seed: int, place: int, number: int) -> int:
    """A well mixed 63-bit seed."""
    return int(np.random.SeedSequence((seed, place, number)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _estimates(prompts: Sequence[str], values: Mapping[str, np.ndarray]) -> dict[str, dict[str, Estimate]]:
    """Estimates of each score, from one value per prompt `(P,)`, by category in the world's order and overall."""
    category_of = np.array([world.parse_caption(prompt).category for prompt in prompts])
    rows = {name: np.flatnonzero(category_of == name) for name in world.CATEGORIES}
    result: dict[str, dict[str, Estimate]] = {
        category: {name: _of_category(v[where]) for name, v in values.items()}
        for category, where in rows.items()
        if len(where)
    }
    result[OVERALL] = {name: _of_all([by_score[name] for by_score in result.values()]) for name in values}
    return result


def _of_category(values: np.ndarray) -> Estimate:
    k = len(values)
    if k < 2:
        return Estimate(float(values.mean()), math.nan, math.nan, k)
    se = float(values.std(ddof=1)) / math.sqrt(k)
    return Estimate(float(values.mean()), se, float(stats.t.ppf(0.975, k - 1)) * se, k)


def _of_all(categories: Sequence[Estimate]) -> Estimate:
    variances = np.array([category.se**2 for category in categories])
    total, prompts = float(variances.sum()), [category.prompts for category in categories]
    mean, se = float(np.mean([category.mean for category in categories])), math.sqrt(total) / len(categories)
    if not total > 0:  # no difference between prompts, or too few of them (NaN)
        return Estimate(mean, se, se, sum(prompts))
    # Welch-Satterthwaite: as few degrees of freedom as the categories that contribute most have.
    freedom = total**2 / float((variances**2 / (np.array(prompts) - 1)).sum())
    return Estimate(mean, se, float(stats.t.ppf(0.975, freedom)) * se, sum(prompts))


def _as_numbers(estimates: Mapping[str, Mapping[str, Estimate]]) -> dict[str, dict[str, dict[str, Any]]]:
    return {category: {name: e.to_dict() for name, e in scores.items()} for category, scores in estimates.items()}


def _table(estimates: Mapping[str, Mapping[str, Estimate]], sign: str = "") -> str:
    rows = [["category", "prompts", *SCORES]]
    for category, scores in estimates.items():
        rows.append([category, str(scores["graded"].prompts), *(_written(scores[name], sign) for name in SCORES)])
    return _markdown(rows)


def _written(estimate: Estimate, sign: str) -> str:
    width = "" if math.isnan(estimate.half_width) else f" ± {estimate.half_width:.3f}"
    return f"{estimate.mean:{sign}.3f}{width}"


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
