"""Means and their uncertainty, by hand and against scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from slas_trl.statistics import (
    Estimate,
    compare_scores,
    evenly_spaced,
    mean_over_categories,
    mean_over_prompts,
    mean_over_seeds_and_prompts,
    score_rows,
    t_quantile,
    text_table,
)


def test_an_interval_over_prompts_is_that_of_scipy():
    values = np.random.default_rng(0).normal(size=17)
    estimate = mean_over_prompts([*values, math.nan])
    expected = stats.t.interval(0.95, 16, loc=values.mean(), scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx(expected, rel=1e-12)
    assert estimate.se == pytest.approx(stats.sem(values)) and estimate.prompts == 17
    assert t_quantile(16, 0.1) == pytest.approx(stats.t.ppf(0.9, 16))


def test_few_prompts():
    one, none = mean_over_prompts([0.5, math.nan]), mean_over_prompts([math.nan])
    assert (one.mean, one.prompts) == (0.5, 1) and math.isnan(one.se) and math.isnan(one.half_width)
    assert math.isnan(none.mean) and none.prompts == 0
    assert one.to_dict() == {"mean": 0.5, "se": None, "low": None, "high": None, "prompts": 1}


def test_categories_count_equally_whatever_their_size():
    # Means 0.75 of two prompts and 0.25 of four; standard errors 0.25 and 0.1.
    overall = mean_over_categories([Estimate(0.75, 0.25, 1, 2), Estimate(0.25, 0.1, 1, 4)])
    assert (overall.mean, overall.prompts) == (0.5, 6)
    assert overall.se == pytest.approx(math.sqrt(0.0625 + 0.01) / 2)
    freedom = 0.0725**2 / (0.0625**2 / 1 + 0.01**2 / 3)  # Welch and Satterthwaite
    assert overall.half_width == pytest.approx(overall.se * stats.t.ppf(0.975, freedom))
    assert math.isnan(mean_over_categories([overall, mean_over_prompts([1.0])]).se)
    certain = mean_over_categories([mean_over_prompts([1.0, 1.0])] * 3)
    assert (certain.low, certain.high, certain.prompts) == (1, 1, 6)


def test_seeds_and_prompts_by_hand():
    # Means of the seeds 1 and 2 (of the prompts 0.5, 1.5, 2.5), and nothing else: MS_seed 1.5, MS_prompt 2, MS_rest 0.
    estimate = mean_over_seeds_and_prompts(np.array([[0.0, 1, 2, math.nan], [1, 2, 3, 9]]))
    assert (estimate.mean, estimate.prompts) == (1.5, 3)
    assert estimate.se == pytest.approx(math.sqrt(3.5 / 6))
    freedom = 3.5**2 / (1.5**2 / 1 + 2**2 / 2)
    assert estimate.half_width == pytest.approx(estimate.se * stats.t.ppf(0.975, freedom))


def test_with_one_seed_only_the_prompts_count():
    values = np.random.default_rng(0).normal(size=9)
    one, over_prompts = mean_over_seeds_and_prompts(values[None]), mean_over_prompts(values)
    assert (one.mean, one.se, one.half_width) == pytest.approx(
        (over_prompts.mean, over_prompts.se, over_prompts.half_width)
    )
    seeds = mean_over_seeds_and_prompts(values[:, None])
    assert (seeds.se, seeds.half_width, seeds.prompts) == pytest.approx((one.se, one.half_width, 1))
    assert mean_over_seeds_and_prompts(np.ones((2, 3))).half_width == 0
    assert math.isnan(mean_over_seeds_and_prompts(np.full((2, 1), math.nan)).mean)


def test_estimates_as_text():
    assert f"{Estimate(0.5, 0.1, 0.25, 3):.2f}" == "0.50 ± 0.25"
    assert f"{Estimate(0.5, 0.1, 0.25, 3):+.1f}" == "+0.5 ± 0.2"
    assert f"{mean_over_prompts([0.5]):.1f}" == "0.5" and f"{mean_over_prompts([]):.1f}" == "no score"


@pytest.mark.parametrize(("available", "wanted", "places"), [(10, 4, [0, 2, 5, 7]), (3, 5, [0, 1, 2]), (0, 2, [])])
def test_evenly_spaced(available, wanted, places):
    assert evenly_spaced(available, wanted) == places


def test_a_table():
    assert text_table([["a", "score"], ["long name", "1"]]).splitlines() == [
        "| a         | score |",
        "|-----------|-------|",
        "| long name | 1     |",
    ]


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
