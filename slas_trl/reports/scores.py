"""Scores before and after training, and the rows of their table."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..statistics import Estimate, mean_over_prompts


Comparison = Mapping[str, Mapping[str, Estimate]]  # by score: "before", "after" and "change"


def compare_scores(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, Estimate]]:
    """
    By reward, the mean "before", "after", and the "change", which is taken prompt by prompt, so that its interval is
    narrower than the other two suggest. Scores are by reward, one per prompt, `(P,)`; NaN is no score.
    """
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
