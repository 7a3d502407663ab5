"""The tables of `slas-trl compare`."""

import numpy as np
import pytest

from slas_trl.scripts.compare_report import TRAINED, Report, Runs


def runs(scores: np.ndarray, kl: np.ndarray, label: str = "arm") -> Runs:
    return Runs(label, list(range(kl.shape[1])), scores, kl)


TWO_SEEDS = [[0.0, 0.1, 0.2], [0.0, 0.2, 0.4]]  # the second is twice as fast


@pytest.mark.parametrize(
    ("distances", "target", "expected"),
    [
        (TWO_SEEDS, 0.15, [2.5, 0.75]),
        (TWO_SEEDS, 0.2, [4.0, 1.0]),  # at an evaluation
        (TWO_SEEDS, 0.0, [0.0, 0.0]),  # at the base
        ([[0.0, 0.3, 0.1]], 0.2, [2 / 3]),  # a KL that falls back counts where it first was reached
    ],
)
def test_scores_at_matched_kl_are_interpolated_run_by_run(distances, target, expected):
    scores = np.tile(np.array([0.0, 1.0, 4.0])[None, None, :, None], (1, len(distances), 1, 1))
    assert runs(scores, np.square(distances)).at_kl(target**2) == pytest.approx(np.array(expected)[None, :, None])


def test_report_matches_kl_at_what_all_runs_reach():
    prompts, rng = 30, np.random.default_rng(0)
    names = [TRAINED, "judge", "held"]

    def arm(label: str, end: list[float], distance: float) -> Runs:
        noise = 0.01 * rng.normal(size=(3, 3, 2, prompts))
        noise[:, :, 0] = 0
        scores = np.stack([np.full(3, 0.5), end], axis=1)[:, None, :, None] + noise
        return runs(scores, np.square([[0.0, distance], [0.0, 2 * distance], [0.0, 3 * distance]]), label)

    base = {
        "evaluations": {"0": {"scores": {name: [0.5] * prompts for name in names}}},
        "reward_weights": {"judge": 1.0, "held": 0.0},
        "prompts": [f"prompt {i}" for i in range(prompts)],
    }
    arms = {
        "grpo": arm("group std", [0.9, 0.9, 0.2], 0.2),
        "linear": arm("batch std, γ 0", [0.8, 0.8, 0.6], 0.1),
        "slas-1": arm("batch std, γ 1", [0.8, 0.8, 0.7], 0.1),
    }
    report = Report(arms, base)
    assert report.target == pytest.approx(0.1**2)
    assert report.measures == [TRAINED, "held"]  # "judge" is the trained reward itself
    differences = report.tables["final_differences"]
    pairs = ("0 − group std", "1 − group std", "1 − batch std, γ 0")
    assert list(differences) == [f"batch std, γ {pair}" for pair in pairs]
    trained, held = differences["batch std, γ 0 − group std"]
    assert held.low > 0.35 and held.high < 0.45 and trained.mean == pytest.approx(-0.1, abs=0.01)
    # Where the three runs of group std had gone 0.1 of 0.2, 0.4 and 0.6 of the way
    matched = 0.5 - 0.3 * np.mean([1 / 2, 1 / 4, 1 / 6])
    assert report.tables["at_matched_kl"]["group std"][1].mean == pytest.approx(matched, abs=0.01)
    assert report.numbers("slas-trl compare")["change_from_base"]["grpo"]["held"][0] == pytest.approx(-0.3, abs=0.01)
