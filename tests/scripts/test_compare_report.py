"""The statistics of `slas-trl compare`."""

import numpy as np
import pytest

from slas_trl.scripts.compare_report import TRAINED, Bootstrap, Report, Runs


def runs(scores: dict[str, np.ndarray], kl: np.ndarray, label: str = "arm") -> Runs:
    return Runs(label, list(range(kl.shape[1])), scores, kl, np.full(len(kl), 10.0), {})


def base_of(prompts: int, **scores: float) -> dict:
    start = {name: np.full(prompts, value) for name, value in scores.items()}
    return {
        "evaluations": {"0": {"scores": start, "kl": 0.0}},
        "reward_weights": {"judge": 1.0},
        "prompts": [f"prompt {i}" for i in range(prompts)],
        "eval_images_per_prompt": 2,
    }


@pytest.mark.parametrize(
    ("seeds", "of_seed", "of_prompt", "of_rest"),
    [(5, 0.5, 1, 1), (5, 1, 0, 0.1), (3, 1, 0.1, 0.1), (2, 0.5, 0.5, 0.5), (5, 0, 0, 1), (5, 0.03, 0.1, 0.4)],
)  # fmt: skip
def test_interval_covers_the_truth_as_often_as_it_says(seeds, of_seed, of_prompt, of_rest):
    """Scores with a part of the seed, one of the prompt and one of both; the truth is 0."""
    rng, prompts, covered = np.random.default_rng(0), 40, []
    bootstrap = Bootstrap(seeds, prompts)
    for _ in range(300):
        values = of_seed * rng.normal(size=(seeds, 1)) + of_prompt * rng.normal(size=(1, prompts))
        values = values + of_rest * rng.normal(size=(seeds, prompts))
        interval = bootstrap(values)
        assert interval.low < interval.mean < interval.high
        assert interval.mean == pytest.approx(values.mean())
        covered.append(interval.low < 0 < interval.high)
    assert np.mean(covered) > (0.91 if seeds > 3 else 0.87)  # two or three give a resample few shapes
    if of_rest < 1 and seeds > 2:
        assert np.mean(covered) < 0.985  # and is not wider than it has to be


def test_with_one_seed_intervals_are_over_prompts():
    values = np.random.default_rng(0).normal(size=(1, 100))
    interval = Bootstrap(1, 100)(values)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * values.std(ddof=1) / 10, rel=0.1)


def test_prompts_without_a_score_are_left_out():
    values = np.ones((2, 10))
    values[:, 3] = np.nan
    values[0, 4] = np.nan
    interval = Bootstrap(2, 10)(values)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((1, 1, 1))
    assert np.isnan(Bootstrap(2, 10)(np.full((2, 10), np.nan)).mean)


def test_a_part_that_rises_alone_is_no_gain_of_the_whole():
    scores = {TRAINED: 0.5, "judge": 0.2, "area": 0.3, "held": 0.5}
    base = base_of(20, **scores) | {"reward_weights": {"judge": 1.0, "area": 1.0}}
    noise = 0.01 * np.random.default_rng(0).normal(size=(3, 20))
    end = {TRAINED: 0.5 + noise, "judge": noise, "area": 0.5 + noise, "held": 0.1 + noise}
    both = {name: np.stack([np.full((3, 20), scores[name]), end[name]], axis=1) for name in scores}
    report = Report({"grpo": runs(both, np.array([[0.0, 0.1]] * 3), "group std")}, base, 3)
    assert report.hacked("grpo") == (["area"], ["judge", "held"])
    assert "area rose while judge, held fell: a part of the reward was hacked" in report.text("slas-trl compare")


def test_scores_at_matched_kl_are_interpolated_run_by_run():
    # Two seeds, three evaluations, one prompt: the second seed is twice as fast.
    kl = np.square([[0.0, 0.1, 0.2], [0.0, 0.2, 0.4]])
    score = np.array([[[0.0], [1.0], [4.0]], [[0.0], [1.0], [4.0]]])
    at = runs({TRAINED: score}, kl).at_kl(0.15**2)
    assert at[TRAINED] == pytest.approx(np.array([[2.5], [0.75]]))
    # Exactly at an evaluation, at the base, and at the end
    assert runs({TRAINED: score}, kl).at_kl(0.2**2)[TRAINED] == pytest.approx(np.array([[4.0], [1.0]]))
    assert runs({TRAINED: score}, kl).at_kl(0.0)[TRAINED] == pytest.approx(np.array([[0.0], [0.0]]))


def test_kl_that_falls_back_counts_where_it_first_was_reached():
    kl = np.square([[0.0, 0.3, 0.1, 0.4]])
    score = np.array([[[0.0], [3.0], [9.0], [9.0]]])
    assert runs({TRAINED: score}, kl).at_kl(0.2**2)[TRAINED] == pytest.approx(np.array([[2.0]]))


def test_report_matches_kl_at_what_all_runs_reach_and_names_the_hacked_arm():
    prompts, rng = 30, np.random.default_rng(0)

    def arm(label: str, end: dict[str, float], distance: float) -> Runs:
        scores = {}
        for name, value in end.items():
            noise = 0.01 * rng.normal(size=(3, 2, prompts))
            noise[:, 0] = 0
            scores[name] = np.array([0.5, value])[None, :, None] + noise
        kl = np.square([[0.0, distance], [0.0, 2 * distance], [0.0, 3 * distance]])
        return runs(scores, kl, label)

    base = base_of(prompts, **{TRAINED: 0.5, "judge": 0.5, "held": 0.5})
    arms = {
        "grpo": arm("group std", {TRAINED: 0.9, "judge": 0.9, "held": 0.2}, 0.2),
        "linear": arm("batch std, γ 0", {TRAINED: 0.8, "judge": 0.8, "held": 0.6}, 0.1),
        "slas-1": arm("batch std, γ 1", {TRAINED: 0.8, "judge": 0.8, "held": 0.7}, 0.1),
    }
    report = Report(arms, base, 3)
    assert report.target == pytest.approx(0.1**2)
    assert report.measures == [TRAINED, "held"]  # "judge" is the trained reward itself
    assert report.hacked("grpo") == ([TRAINED], ["held"])
    assert report.hacked("linear") == report.hacked("slas-1") == ([], [])
    assert report.pairs() == [("linear", "grpo"), ("slas-1", "grpo"), ("slas-1", "linear")]
    difference = report.differences(report.final)["batch std, γ 0 − group std"]
    assert difference["held"].low > 0.35 and difference["held"].high < 0.45
    assert difference[TRAINED].mean == pytest.approx(-0.1, abs=0.01)
    # Where the three runs of group std had gone 0.1 of 0.2, 0.4 and 0.6 of the way
    matched = 0.5 - 0.3 * np.mean([1 / 2, 1 / 4, 1 / 6])
    assert report.estimates(report.matched)["grpo"]["held"].mean == pytest.approx(matched, abs=0.01)
    text = report.text("slas-trl compare")
    assert "group std: trained reward rose while held fell: reward hacking." in text
    assert text.count("reward hacking") == 1
