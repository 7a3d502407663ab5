"""The table of scores before and after training."""

import math

from slas_trl.reports.scores import compare_scores, score_rows


def test_the_change_is_taken_prompt_by_prompt():
    comparison = compare_scores(
        {"taste": [0.1, 0.5, 0.9], "none": [math.nan] * 3}, {"taste": [0.2, 0.6, 1.0], "none": [math.nan, 1, math.nan]}
    )
    assert comparison["taste"]["change"].half_width < 1e-12 < comparison["taste"]["before"].half_width
    assert score_rows(comparison) == [
        ["reward", "before", "after", "change"],
        ["taste", "0.5000 ± 0.9937", "0.6000 ± 0.9937", "+0.1000 ± 0.0000"],
        ["none", "no score", "1.0000", "no score"],
    ]
