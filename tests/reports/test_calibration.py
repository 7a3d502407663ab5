"""Who pushes, and what trained and held-out rewards say of a run."""

import math

import numpy as np
import pytest

from slas_trl.advantages import compute_advantages
from slas_trl.reports.calibration import narrow_share, read_rewards, read_rollouts, reward_curves, share_by_std
from tests.reports.tiny_runs import down, evaluations, flat, run, up


DECILES = np.linspace(0, 1, 11)
HALVES = (0, 0.5, 1)


class TestShareByStd:
    @pytest.mark.parametrize(
        ("scale_rewards", "gamma", "narrow"),
        [("group", 0.0, 0.5), ("batch", 0.0, 0.091), ("batch", 0.5, 0.031), ("batch", 1.0, 0.010)],
    )
    def test_of_the_papers_example(self, scale_rewards, gamma, narrow):
        rewards = [0.360, 0.370, 0.380, 0.390, 0.366, 0.367, 0.368, 0.369]
        result = compute_advantages(rewards, 4, scale_rewards=scale_rewards, gamma=gamma)
        shares = share_by_std([result.group_std.tolist()], [result.group_abs_advantages.tolist()], HALVES)
        assert shares == pytest.approx([narrow, 1 - narrow], abs=5e-4)

    @pytest.mark.parametrize(
        ("stds", "pushes", "edges", "shares"),
        [
            # Fewer groups than deciles, and groups of equal std, share in proportion.
            ([[1.0, 2.0, 3.0]], [[1.0, 1.0, 2.0]], HALVES, [0.375, 0.625]),
            ([[1.0, 2.0, 3.0]], [[1.0, 1.0, 1.0]], DECILES, [0.1] * 10),
            ([[1.0] * 4], [[4.0, 0.0, 0.0, 0.0]], DECILES, [0.1] * 10),
            # Groups without a difference, or a score, are left out.
            ([[0.0, 0.0, None, 1.0, 3.0]], [[0.0, 0.0, 0.0, 1.0, 3.0]], HALVES, [0.25, 0.75]),
            ([[0.0, None]], [[0.0, 0.0]], HALVES, [math.nan] * 2),
            # All groups became narrower in training; within each rollout the narrow one gets 10%.
            ([[1.0, 3.0], [0.1, 0.3]], [[1.0, 9.0], [1.0, 9.0]], HALVES, [0.1, 0.9]),
        ],
    )
    def test_by_hand(self, stds, pushes, edges, shares):
        assert share_by_std(stds, pushes, edges) == pytest.approx(shares, nan_ok=True)

    def test_the_narrowest_three_tenths(self):
        assert narrow_share(list(range(1, 11)), list(range(1, 11))) == pytest.approx(6 / 55)
        assert math.isnan(narrow_share([], []))


def reading_of(lines, metrics=()):
    return read_rewards(*reward_curves(lines, metrics))


def of_taste(*changes):
    return evaluations(*changes, key="eval_rewards/taste/mean", std="eval_rewards/taste/std")


class TestReading:
    @pytest.mark.parametrize(
        ("lines", "verdict", "said"),
        [
            (run(up, taste=down), "hacking", ["hacking: trained reward rises (+0.8", "held-out taste falls (-0."]),
            (run(up, taste=down, other=up), "hacking", ["though other rises"]),
            # Hacking began half way, and the held-out reward ends where it began: the third fifth is the best.
            (run(up, taste=lambda t: 1 - abs(2 * t - 1)), "hacking", ["taste falls since step 36 (-0."]),
            (run(up, taste=lambda t: t / 2, other=flat), "healthy", ["taste rises (+0.4", "other shows no clear"]),
            (run(up, rollouts=9, taste=down), "too short", ["9 rollouts are too few to tell; it takes 10."]),
            # Nothing is claimed without evidence.
            (run(flat, taste=down), "unclear", ["trained reward shows no clear change (+0.0", "taste falls (-0."]),
            (run(up, noise=2.0, taste=down), "unclear", ["taste shows no clear change"]),
            (run(up, noise=0.001, taste=lambda t: -0.05 * t), "unclear", ["taste shows"]),  # too small to matter
            (run(up), "unclear", ["0 for it to reward_weights"]),
        ],
    )
    def test_verdicts(self, lines, verdict, said):
        reading = reading_of(lines)
        assert reading.verdict == verdict and all(words in reading.text for words in said)

    def test_a_trained_reward_that_falls_in_evaluation(self):
        reading = reading_of(run(up, taste=up), evaluations(0.0, -0.2, -0.5))
        assert reading.verdict == "unclear" and "trained reward in evaluation falls" in reading.text
        few = reading_of(run(up), evaluations(0.0, -0.2, -0.5, samples=20))
        assert few.verdict == "unclear" and "no held-out reward" in few.text

    @pytest.mark.parametrize("rollouts", [10, 12, 65])
    def test_chance_is_hardly_ever_called_hacking(self, rollouts):
        readings = [reading_of(run(up, rollouts, 0.3, seed, taste=flat)) for seed in range(200)]
        assert sum(reading.verdict != "unclear" for reading in readings) <= 0.05 * len(readings)

    def test_held_out_rewards_in_evaluation(self):
        lines = run(up, taste=flat)
        assert reading_of(lines, of_taste(0.0, -0.5)).verdict == "hacking"
        reading = reading_of(lines, of_taste(0.0, 0.5))
        assert reading.verdict == "healthy" and "taste in evaluation rises (+0.50" in reading.text
        for line in lines:  # scored in evaluation alone
            del line["rewards/taste/mean"]
        assert reading_of(lines, of_taste(0.0, -0.5)).verdict == "hacking"

    def test_evaluations_of_several_data_sets(self):
        line = {"eval_hard_reward_std": 1.0, "eval_hard_samples": 100}
        metrics = [line | {"step": step, "eval_hard_reward": step / 10} for step in (1, 2)]
        [curve] = reward_curves(run(up), metrics)[2]
        assert curve.name == "trained reward in evaluation on hard" and curve.changes == pytest.approx([0, 0.1])

    def test_rollouts_without_a_score_and_rewards_without_a_difference(self):
        lines = run(up, taste=flat)
        for line in lines:
            line |= {"rewards/taste/mean": 1.0, "rewards/taste/std": 0.0}
        lines[3] |= {"reward": None, "reward_std_of_images": None}
        assert len(reward_curves(lines, [])[0].steps) == 59
        assert "taste shows no clear change (+0.00 ± 0.00)" in reading_of(lines).text


def test_a_file_without_a_rollout(tmp_path):
    (tmp_path / "calibration.jsonl").write_text('{"step": 3, "weights": {"a": 1}')
    with pytest.raises(ValueError, match="log_completions"):
        read_rollouts(tmp_path / "calibration.jsonl")
