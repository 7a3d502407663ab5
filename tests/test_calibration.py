"""Who pushes, and what trained and held-out rewards say of a run."""

import json
import math

import numpy as np
import pytest

from slas_trl.advantages import compute_advantages
from slas_trl.calibration import narrow_share, read_rewards, read_rollouts, reward_curves, share_by_std


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

    def test_group_std_gives_every_decile_its_tenth_and_batch_std_does_not(self):
        rng = np.random.default_rng(0)
        stds, pushes = {"group": [], "batch": []}, {"group": [], "batch": []}
        for _ in range(20):  # 12 groups each: deciles need several rollouts
            rewards = (rng.normal(size=(12, 16)) * rng.uniform(0.01, 1, size=(12, 1))).flatten()
            for scale in stds:
                result = compute_advantages(rewards, 16, scale_rewards=scale, gamma=0.0 if scale == "group" else 1.0)
                stds[scale].append(result.group_std.tolist())
                pushes[scale].append(result.group_abs_advantages.tolist())
        assert share_by_std(stds["group"], pushes["group"], DECILES) == pytest.approx(np.full(10, 0.1), abs=0.01)
        shares = share_by_std(stds["batch"], pushes["batch"], DECILES)
        assert shares[0] < 0.002 and shares[-1] > 0.25 and (np.diff(shares) > 0).all()
        assert shares.sum() == pytest.approx(1)

    def test_fewer_groups_than_deciles(self):
        assert share_by_std([[1.0, 2.0, 3.0]], [[1.0, 1.0, 2.0]], (0, 0.5, 1)) == pytest.approx([0.375, 0.625])
        assert share_by_std([[1.0, 2.0, 3.0]], [[1.0, 1.0, 1.0]], DECILES) == pytest.approx(np.full(10, 0.1))

    def test_groups_of_equal_std_share_alike(self):
        assert share_by_std([[1.0] * 4], [[4.0, 0.0, 0.0, 0.0]], DECILES) == pytest.approx(np.full(10, 0.1))

    def test_groups_without_a_difference_or_a_score_are_left_out(self):
        assert share_by_std([[0.0, 0.0, None, 1.0, 3.0]], [[0.0, 0.0, 0.0, 1.0, 3.0]], HALVES) == pytest.approx(
            [0.25, 0.75]
        )
        assert np.isnan(share_by_std([[0.0, None]], [[0.0, 0.0]], HALVES)).all()
        assert math.isnan(narrow_share([], []))

    def test_a_group_is_narrow_among_those_of_its_rollout(self):
        """All groups became narrower in training; within each rollout the narrow one gets 10%."""
        assert share_by_std([[1.0, 3.0], [0.1, 0.3]], [[1.0, 9.0], [1.0, 9.0]], HALVES) == pytest.approx([0.1, 0.9])

    def test_the_narrowest_three_tenths(self):
        assert narrow_share(list(range(1, 11)), list(range(1, 11))) == pytest.approx(6 / 55)


def run(trained, rollouts=60, noise=0.1, seed=0, **held_out):
    """Lines of `calibration.jsonl`; each reward a function of the time, from 0 to 1, in std between images."""
    rng = np.random.default_rng(seed)
    times = np.linspace(0, 1, rollouts)
    lines = []
    for step, t in enumerate(times, start=1):
        line = {"step": step, "weights": {"trained": 1.0, **dict.fromkeys(held_out, 0.0)}}
        line |= {"reward": 5 + 2 * (trained(t) + noise * rng.normal()), "reward_std_of_images": 2.0}
        for name, curve in held_out.items():
            line[f"rewards/{name}/mean"] = 0.1 * (curve(t) + noise * rng.normal())
            line[f"rewards/{name}/std"] = 0.1
        lines.append(line)
    return lines


def reading_of(lines, metrics=None):
    return read_rewards(*reward_curves(lines, metrics or {}))


def up(t):
    return t


def down(t):
    return -0.6 * t


def flat(t):
    return 0.0


def evaluations(*changes, key="eval_reward", samples=400):
    std = key.replace("reward", "reward_std") if key == "eval_reward" else key.replace("/mean", "/std")
    return {1 + 10 * i: {key: v, std: 1.0, "eval_samples": samples} for i, v in enumerate(changes)}


class TestReading:
    def test_a_hacked_run(self):
        reading = reading_of(run(up, taste=down))
        assert reading.verdict == "likely hacking"
        assert reading.text.startswith("Likely hacking: trained reward rises (+0.8")
        assert "while held-out taste falls (-0." in reading.text

    def test_a_healthy_run(self):
        reading = reading_of(run(up, taste=lambda t: 0.5 * t, other=flat))
        assert reading.verdict == "healthy"
        assert "taste rises (+0.4" in reading.text and "other shows no clear change" in reading.text

    def test_a_gain_that_turns_into_a_loss(self):
        """The held-out reward ends where it began: hacking began half way."""
        reading = reading_of(run(up, taste=lambda t: 1 - abs(2 * t - 1)))
        assert reading.verdict == "likely hacking"
        assert "taste falls since step 36 (-0." in reading.text  # the third fifth is the best

    def test_rewards_that_disagree(self):
        reading = reading_of(run(up, taste=down, other=up))
        assert reading.verdict == "mixed" and "though other rises" in reading.text

    def test_nothing_is_claimed_without_evidence(self):
        assert reading_of(run(up, taste=flat)).verdict == "unclear"
        losing = reading_of(run(flat, taste=down))
        assert losing.verdict == "losing" and losing.text.startswith("Losing: held-out taste falls")
        assert reading_of(run(flat, taste=flat)).verdict == "unclear"
        assert reading_of(run(up, noise=2.0, taste=down)).verdict == "unclear"
        assert reading_of(run(up, noise=0.001, taste=lambda t: -0.05 * t)).verdict == "unclear"  # too small to matter
        assert reading_of(run(up, rollouts=9, taste=down)).text == "9 rollouts are too few to tell; it takes 10."

    def test_without_a_held_out_reward_it_says_how_to_add_one(self):
        reading = reading_of(run(up))
        assert reading.verdict == "no held-out reward" and "0 for it to reward_weights" in reading.text

    @pytest.mark.parametrize("rollouts", [10, 12, 65])
    def test_chance_is_hardly_ever_called_hacking(self, rollouts):
        readings = [reading_of(run(up, rollouts, 0.3, seed, taste=flat)) for seed in range(300)]
        falls = sum("taste falls" in reading.text for reading in readings)
        rises = sum("taste rises" in reading.text for reading in readings)
        assert falls + rises <= 0.05 * len(readings)

    def test_evaluations_count(self):
        lines = run(up)
        falling = evaluations(0.0, -0.2, -0.5)
        assert reading_of(lines, falling).verdict == "overfitting"
        assert reading_of(lines, evaluations(0.0, -0.2, -0.5, samples=20)).verdict == "no held-out reward"
        lines = run(up, taste=flat)
        assert reading_of(lines, evaluations(0.0, -0.5, key="eval_rewards/taste/mean")).verdict == "likely hacking"
        reading = reading_of(lines, evaluations(0.0, 0.5, key="eval_rewards/taste/mean"))
        assert reading.verdict == "healthy" and "taste in evaluation rises (+0.50" in reading.text

    def test_evaluations_of_several_data_sets(self):
        metrics = {
            step: {"eval_hard_reward": step / 10, "eval_hard_reward_std": 1.0, "eval_hard_samples": 100}
            for step in (1, 2)
        }
        [curve] = reward_curves(run(up), metrics)[2]
        assert curve.name == "trained reward in evaluation on hard" and curve.values.tolist() == [0.1, 0.2]

    def test_rollouts_without_a_score_and_rewards_without_a_difference(self):
        lines = run(up, taste=flat)
        for line in lines:
            line |= {"rewards/taste/mean": 1.0, "rewards/taste/std": 0.0}
        lines[3] |= {"reward": None, "reward_std_of_images": None}
        assert len(reward_curves(lines, {})[0].values) == 59
        assert "taste shows no clear change (+0.00 ± 0.00)" in reading_of(lines).text


def test_lines_of_a_killed_and_resumed_run(tmp_path):
    path = tmp_path / "calibration.jsonl"
    lines = [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2}, {"step": 2, "reward": 0.3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "weights": {"a": 1}')
    assert [(line["step"], line["reward"]) for line in read_rollouts(path)] == [(1, 0.1), (2, 0.3)]
    path.write_text("")
    with pytest.raises(ValueError, match="holds no rollout"):
        read_rollouts(path)
