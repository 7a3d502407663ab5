"""The tables of `slas-trl compare`."""

import numpy as np
import pytest

from slas_trl.scripts.compare_report import TRAINED, Report, Runs


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


def test_report_matches_kl_at_what_all_runs_reach():
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
    report = Report(arms, base)
    assert report.target == pytest.approx(0.1**2)
    assert report.measures == [TRAINED, "held"]  # "judge" is the trained reward itself
    assert report.pairs() == [("linear", "grpo"), ("slas-1", "grpo"), ("slas-1", "linear")]
    difference = report.differences(report.final)["batch std, γ 0 − group std"]
    assert difference["held"].low > 0.35 and difference["held"].high < 0.45
    assert difference[TRAINED].mean == pytest.approx(-0.1, abs=0.01)
    # Where the three runs of group std had gone 0.1 of 0.2, 0.4 and 0.6 of the way
    matched = 0.5 - 0.3 * np.mean([1 / 2, 1 / 4, 1 / 6])
    assert report.estimates(report.matched)["grpo"]["held"].mean == pytest.approx(matched, abs=0.01)
    assert report.numbers("slas-trl compare")["change_from_base"]["grpo"]["held"][0] == pytest.approx(-0.3, abs=0.01)
