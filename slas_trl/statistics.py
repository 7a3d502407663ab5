"""
Means with their uncertainty: over prompts, over categories of prompts, and over training seeds and prompts.

Images of one prompt are alike, so prompts, not images, are what is independent: the standard errors are for prompts
like these rather than for these prompts alone. Intervals are symmetric and Student's t, so near 0 and 1 they may reach
beyond.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit


@dataclass(frozen=True)
class Estimate:
    """A mean, and how sure it is. `f"{estimate:.3f}"` is "0.123 ± 0.045"."""

    mean: float  # in units of the score, or a difference of two such means; NaN without any score
    se: float  # standard error; NaN with a single prompt
    half_width: float  # of the 95% interval around the mean; NaN with a single prompt
    prompts: int  # number of prompts that have a score

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

    def __format__(self, spec: str) -> str:
        """`spec` is that of the mean; a sign in it is not repeated for the half width."""
        if math.isnan(self.mean):
            return "no score"
        width = "" if math.isnan(self.half_width) else f" ± {self.half_width:{spec.lstrip('+')}}"
        return f"{self.mean:{spec}}{width}"


def mean_over_prompts(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean of one value per prompt `(P,)`; NaN is no score. se = std(ddof 1) / √P."""
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return Estimate(float(known.mean()) if len(known) else math.nan, math.nan, math.nan, len(known))
    se = float(known.std(ddof=1)) / math.sqrt(len(known))
    return Estimate(float(known.mean()), se, t_quantile(len(known) - 1) * se, len(known))


def mean_over_categories(categories: Sequence[Estimate]) -> Estimate:
    """
    Mean of C means that counts each equally, as GenEval does (https://huggingface.co/papers/2310.11513), whatever
    their numbers of prompts: se = √(Σ se²) / C, with the degrees of freedom of Welch and Satterthwaite.
    """
    variances = np.array([category.se**2 for category in categories])
    total, prompts = float(variances.sum()), [category.prompts for category in categories]
    mean, se = float(np.mean([category.mean for category in categories])), math.sqrt(total) / len(categories)
    if not total > 0:  # no difference between prompts, or too few of them (NaN)
        return Estimate(mean, se, se, sum(prompts))
    freedom = total**2 / float((variances**2 / (np.array(prompts) - 1)).sum())
    return Estimate(mean, se, t_quantile(freedom) * se, sum(prompts))


def mean_over_seeds_and_prompts(values: np.ndarray) -> Estimate:
    """
    Mean of `(S, P)`, for other training seeds and other prompts; prompts without a score in some run are left out.

    The mean squares of a two-way layout have the expectations E + P V_seed, E + S V_prompt and E, with E the variance
    of what is left, so that (MS_seed + MS_prompt - MS_rest) / (S P) is the variance of the mean, with Satterthwaite's
    degrees of freedom. With one seed, or one prompt, only the others count.
    """
    values = values[:, ~np.isnan(values).any(axis=0)]
    s, p = values.shape
    if not p:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean, of_seeds, of_prompts = values.mean(), values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    freedoms = max(1, s - 1), max(1, p - 1), max(1, (s - 1) * (p - 1))
    seeds = p * np.square(of_seeds - mean).sum() / freedoms[0]
    prompts = s * np.square(of_prompts - mean).sum() / freedoms[1]
    rest = np.square(values - of_seeds - of_prompts + mean).sum() / freedoms[2]
    total = max(seeds + prompts - rest, rest)
    if not total > 0:
        return Estimate(float(mean), 0.0, 0.0, p)
    freedom = total**2 / sum(square**2 / n for square, n in zip((seeds, prompts, rest), freedoms, strict=True))
    se = math.sqrt(total / (s * p))
    return Estimate(float(mean), se, t_quantile(max(1.0, freedom)) * se, p)


Comparison = Mapping[str, Mapping[str, Estimate]]  # by score: "before", "after" and "change"


def compare_scores(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Estimate]]:
    """By reward, the mean "before", "after", and the "change", prompt by prompt. Scores are `(P,)`; NaN is none."""
    return {
        name: {
            "before": mean_over_prompts(before[name]),
            "after": mean_over_prompts(after[name]),
            "change": mean_over_prompts(np.subtract(after[name], before[name])),
        }
        for name in before
    }


def score_rows(comparison: Comparison, first: str = "reward", spec: str = ".4f") -> list[list[str]]:
    """The cells of the table of a comparison, whose `first` column has the names; the first row is the head."""
    rows = [[first, "before", "after", "change"]]
    for name, estimates in comparison.items():
        rows.append([name, *(f"{estimates[column]:{'+' * (column == 'change')}{spec}}" for column in rows[0][1:])])
    return rows


def t_quantile(freedom: float, level: float = 0.025) -> float:
    """Standard errors that a mean exceeds by chance with probability `level`; by default half a 95% interval."""
    return float(stdtrit(freedom, 1 - level))


def evenly_spaced(available: int, wanted: int) -> list[int]:
    """At most `wanted` of the places 0 ... available - 1, not all at the beginning: prompts may be sorted."""
    count = min(available, wanted)
    return [i * available // count for i in range(count)]


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, aligned for the terminal too. The first row is the head; cells are Markdown already."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
