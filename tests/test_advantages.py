import math

import numpy as np
import pytest
import torch

from slas_trl.advantages import compute_advantages, effective_share, slas_advantages


NAN = math.nan
WIDE = [0.360, 0.370, 0.380, 0.390]
NARROW = [0.366, 0.367, 0.368, 0.369]
SCALINGS = ["batch", "group", "none"]
AGGREGATIONS = ["sum_then_normalize", "normalize_then_sum"]


def random_rewards(groups: int = 6, num_generations: int = 8, seed: int = 0) -> torch.Tensor:
    """Rewards whose level and spread differ from prompt to prompt, in float64."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(groups, num_generations + 2, generator=generator, dtype=torch.float64)
    return (normal[:, :1] + normal[:, 1:2].exp() * normal[:, 2:]).flatten()


def by_group(values: torch.Tensor, num_generations: int) -> torch.Tensor:
    return values.double().view(-1, num_generations)


@pytest.mark.parametrize(
    ("options", "wide", "narrow", "narrow_share"),
    [
        ({"scale_rewards": "group", "gamma": 0}, [0.4472, 1.3416], [0.4472, 1.3416], 0.50),
        ({"scale_rewards": "batch", "gamma": 0}, [0.6293, 1.8880], [0.0629, 0.1888], 0.091),
        ({"scale_rewards": "batch", "gamma": 0.5}, [0.4992, 2.5941], [0.0158, 0.0820], 0.031),
        ({"scale_rewards": "batch", "gamma": 1}, [0.3960, 3.5644], [0.0040, 0.0356], 0.010),
        ({}, [0.4992, 2.5941], [0.0158, 0.0820], 0.031),  # the defaults
    ],
)
def test_the_papers_two_groups(options, wide, narrow, narrow_share):
    advantages = slas_advantages(WIDE + NARROW, num_generations=4, **options)
    expected = [-wide[1], -wide[0], *wide, -narrow[1], -narrow[0], *narrow]
    torch.testing.assert_close(advantages, torch.tensor(expected), atol=6e-5, rtol=0)
    assert (advantages[4:].abs().sum() / advantages.abs().sum()).item() == pytest.approx(narrow_share, abs=5e-4)


def test_the_papers_example_has_a_population_std():
    last = slas_advantages(WIDE, num_generations=4, scale_rewards="group", gamma=0)[3].item()
    assert last == pytest.approx(1.342, abs=5e-4)
    assert last * math.sqrt(3 / 4) == pytest.approx(1.162, abs=5e-4)  # by Lemma 1 and DanceGRPO: the unbiased std


def test_statistics_of_the_papers_two_groups():
    result = compute_advantages(WIDE + NARROW, num_generations=4, gamma=1)
    assert result.batch_std == pytest.approx(7.945e-3, abs=1e-6)
    torch.testing.assert_close(result.group_std, torch.tensor([1.11803e-2, 1.11803e-3]), rtol=1e-4, atol=0)
    torch.testing.assert_close(result.rewards, torch.tensor(WIDE + NARROW))
    torch.testing.assert_close(result.scaled.abs() ** 2, result.advantages.abs())  # x before shaping, here by γ = 1
    assert result.effective_share == pytest.approx(effective_share(result.advantages))
    assert result.clip_fraction == result.frac_reward_zero_std == result.frac_groups_filtered == 0


@pytest.mark.parametrize(("gamma", "share"), [(0, 0.51), (0.25, 0.39), (0.5, 0.30), (1, 0.17), (2, 0.06)])
def test_the_effective_share_falls_with_gamma(gamma, share):
    # HPS-like scores of 32 prompts, which differ in their spread, averaged over 50 rollouts.
    generator = torch.Generator().manual_seed(0)
    spread = 0.01 * torch.exp(0.52 * torch.randn(50, 32, 1, generator=generator))
    rollouts = 0.28 + spread * torch.randn(50, 32, 16, generator=generator)
    shares = [compute_advantages(rewards.flatten(), 16, gamma=gamma).effective_share for rewards in rollouts]
    assert sum(shares) / len(shares) == pytest.approx(share, abs=0.02)


def test_gamma_0_by_group_is_dance_grpo_up_to_ddof():
    groups = random_rewards().view(-1, 8)
    dance_grpo = (groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-8)
    ours = slas_advantages(groups.flatten(), 8, scale_rewards="group", gamma=0)
    torch.testing.assert_close(ours.double(), dance_grpo.flatten() * math.sqrt(8 / 7), rtol=1e-6, atol=1e-6)


def test_gamma_0_with_raw_std_is_trls_batch_scaling_up_to_eps_and_ddof():
    rewards, size = random_rewards(), 8
    mean = rewards.view(-1, size).mean(dim=1).repeat_interleave(size)
    ours = slas_advantages(rewards, size, gamma=0, batch_std_of="raw")
    torch.testing.assert_close(ours.double() * rewards.std(unbiased=False), rewards - mean, rtol=1e-6, atol=1e-6)
    # Missing scores: group means 1.5, 6 and 5, by TRL's nanmean and nanstd.
    std = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0]).std(unbiased=False)
    ours = slas_advantages([1.0, 2.0, NAN, 6.0, 5.0, 5.0], 2, gamma=0, batch_std_of="raw")
    torch.testing.assert_close(ours, torch.tensor([-0.5, 0.5, 0, 0, 0, 0]) / std)


@pytest.mark.parametrize(
    "options", [{}, {"scale_rewards": "group"}, {"batch_std_of": "raw"}, {"shaping_baseline": "zero_sum"}], ids=str
)
def test_scaling_and_shifting_the_rewards_is_no_change(options):
    rewards, options = random_rewards(), {"advantage_clip": 2.0, **options}
    expected = slas_advantages(rewards, 8, **options)
    for k, c in ((1e-6, 0.0), (250.0, -40.0), (1.0, 1000.0)):  # no eps eats small gaps
        torch.testing.assert_close(slas_advantages(k * rewards + c, 8, **options), expected, rtol=1e-5, atol=1e-6)


def test_without_scaling_the_reward_sets_the_scale_and_the_clip_follows():
    rewards = random_rewards()
    options = {"scale_rewards": "none", "gamma": 1, "advantage_clip": 1.5}
    expected = 100**2 * slas_advantages(rewards, 8, **options)
    torch.testing.assert_close(slas_advantages(100 * rewards, 8, **options), expected)
    assert compute_advantages(rewards, 8, **options).clip_fraction > 0


@pytest.mark.parametrize("shaping_baseline", ["mean", "zero_sum"])
@pytest.mark.parametrize("scale_rewards", SCALINGS)
def test_odd_symmetry_and_order(scale_rewards, shaping_baseline):
    """The negative rewards have the negative advantages, and the better image of a prompt has the larger one."""
    rewards = by_group(random_rewards(), 8).sort(dim=1).values.flatten()
    for gamma in (0, 0.7, 3):
        options = {"scale_rewards": scale_rewards, "shaping_baseline": shaping_baseline, "gamma": gamma}
        advantages = slas_advantages(rewards, 8, **options)
        torch.testing.assert_close(slas_advantages(-rewards, 8, **options), -advantages)
        assert (by_group(advantages, 8).diff(dim=1) > 0).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -7.7e5, 1e-12, 2.4e-38])
@pytest.mark.parametrize("scale_rewards", SCALINGS)
def test_a_constant_group_gets_exactly_0(scale_rewards, value):
    for size, gamma in ((3, 0), (7, 0.5), (12, 0.5)):
        options = {"scale_rewards": scale_rewards, "gamma": gamma}
        result = compute_advantages([value] * size, size, **options)
        assert (result.advantages == 0).all() and result.frac_reward_zero_std == 1 and result.batch_std == 0
        assert result.frac_groups_filtered == 0
        # Also beside a group that has something to say.
        beside = slas_advantages([value] * size + [value + i * (abs(value) + 1) for i in range(size)], size, **options)
        assert (beside[:size] == 0).all() and (beside[size:] != 0).any()


def test_differences_below_float32_resolution_are_none():
    one_bit = torch.nextafter(torch.tensor(1000.0), torch.tensor(2000.0)).item()
    result = compute_advantages([1000.0, one_bit, 1.0, 1.001], 2)
    assert result.advantages[:2].tolist() == [0, 0] and result.advantages[2:].abs().min() > 0
    assert result.frac_reward_zero_std == 0.5
    first = torch.tensor([100.1, 100.2, 100.3, 100.4])  # two rewards that cancel each other, but for rounding
    result = compute_advantages(torch.stack([first, 3 * first], dim=1), 4, reward_weights=[3.0, -1.0])
    assert result.rewards.any() and (result.advantages == 0).all()


def test_low_variance_groups_can_be_filtered():
    everything = compute_advantages(WIDE + NARROW, 4)
    filtered = compute_advantages(WIDE + NARROW, 4, min_group_std=5e-3)
    assert filtered.frac_groups_filtered == 0.5 and everything.frac_groups_filtered == 0
    assert (filtered.advantages[4:] == 0).all() and (filtered.scaled[4:] == 0).all()
    assert filtered.advantages[:4].equal(everything.advantages[:4])
    result = compute_advantages([1.0, 1.0, *NARROW[:2], 0.0, 1.0], 2, min_group_std=0.1)  # of three, one is constant
    assert (result.frac_reward_zero_std, result.frac_groups_filtered) == pytest.approx((1 / 3, 2 / 3))


OUTLIER = [1.0] + [0.0] * 15  # Δr = 15/16 and -1/16, std √15/16: x = 3.873 and -0.2582


def test_the_clip_is_before_shaping():
    result = compute_advantages(OUTLIER, 16, gamma=1, advantage_clip=2.0)
    assert result.scaled[0].item() == pytest.approx(2) and result.clip_fraction == pytest.approx(1 / 16)
    assert (result.advantages[0] / result.advantages[1]).item() == pytest.approx(-(2**2) * 15)
    # So the default leaves shaped advantages above 5 alone.
    result = compute_advantages(OUTLIER, 16, gamma=1)
    assert result.advantages[0].item() == pytest.approx(15) and result.clip_fraction == 0


def test_the_clip_is_in_stds_and_may_be_left_out():
    result = compute_advantages([100 * r for r in OUTLIER], 16, gamma=0, scale_rewards="none", advantage_clip=2.0)
    assert result.advantages[0].item() == pytest.approx(2 * 100 * math.sqrt(15) / 16)
    rewards = [1.0] + [0.0] * 99
    assert slas_advantages(rewards, 100, gamma=0)[0].item() == 5
    assert slas_advantages(rewards, 100, gamma=0, advantage_clip=None)[0].item() == pytest.approx(math.sqrt(99))
    assert (slas_advantages([1.0, 1.0], 2, scale_rewards="none", advantage_clip=None) == 0).all()


BINARY = [1.0] * 4 + [0.0] * 12  # 4 successes of 16, as GenEval or OCR would score


def test_skewed_rewards_leave_a_push_around_the_mean_and_none_around_the_zero_sum_baseline():
    options = {"scale_rewards": "none", "advantage_clip": None}
    mean, linear = (slas_advantages(BINARY, 16, gamma=gamma, **options) for gamma in (1, 0))
    options["shaping_baseline"] = "zero_sum"
    assert mean.sum().item() == pytest.approx(1.5)  # 4 * .75² - 12 * .25²
    assert slas_advantages(BINARY, 16, gamma=1, **options).sum().item() == pytest.approx(0, abs=1e-6)
    assert slas_advantages(BINARY, 16, gamma=0, **options).equal(linear)


@pytest.mark.parametrize(("successes", "gamma"), [(1, 0.25), (1, 6), (4, 0.5), (4, 1), (15, 2)])
def test_the_zero_sum_baseline_of_binary_rewards(successes, gamma):
    # k (1 - b)^p = (G - k) b^p for p = 1 + γ has the root b = 1 / (1 + ((G - k) / k)^(1/p)).
    rewards = [1.0] * successes + [0.0] * (16 - successes)
    b = 1 / (1 + ((16 - successes) / successes) ** (1 / (1 + gamma)))
    options = {"scale_rewards": "none", "advantage_clip": None, "shaping_baseline": "zero_sum"}
    advantages = slas_advantages(rewards, 16, gamma=gamma, **options)
    expected = torch.tensor([(1 - b) ** (1 + gamma)] * successes + [-(b ** (1 + gamma))] * (16 - successes))
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("num_generations", "gamma"), [(2, 0.5), (5, 0.01), (5, 2), (16, 0.25), (16, 10)])
@pytest.mark.parametrize("scale_rewards", SCALINGS)
def test_zero_sum_is_zero_in_every_group(num_generations, scale_rewards, gamma):
    rewards = random_rewards(50, num_generations).sigmoid() ** 3  # skewed, some near-constant
    rewards[0], rewards[num_generations : 2 * num_generations] = NAN, 3.0
    options = {"scale_rewards": scale_rewards, "gamma": gamma, "advantage_clip": None, "shaping_baseline": "zero_sum"}
    groups = by_group(slas_advantages(rewards, num_generations, **options), num_generations)
    assert groups.isfinite().all() and groups[0, 0] == 0 and (groups[1] == 0).all()
    # Some are too small for float32 at γ = 10, hence the second term.
    assert (groups.sum(dim=1).abs() <= 1e-6 * groups.abs().sum(dim=1) + 1e-36).all()


def test_zero_sum_with_several_rewards_and_missing_scores():
    rewards = torch.stack([random_rewards(seed=1).exp(), random_rewards(seed=2).exp()], dim=1)
    rewards[3, 0] = rewards[9, 1] = rewards[17] = NAN
    for aggregation in AGGREGATIONS:
        options = {"shaping_baseline": "zero_sum", "multi_objective_aggregation": aggregation, "advantage_clip": None}
        advantages = slas_advantages(rewards, 8, **options)
        torch.testing.assert_close(by_group(advantages, 8).sum(dim=1), torch.zeros(6).double(), rtol=0, atol=1e-5)
        assert advantages[17] == 0


@pytest.mark.parametrize("scale_rewards", SCALINGS)
def test_missing_scores(scale_rewards):
    options = {"scale_rewards": scale_rewards, "gamma": 0.5}
    advantages = slas_advantages([1.0, NAN, 2.0, 6.0], 4, **options)
    assert advantages[1] == 0
    torch.testing.assert_close(advantages[[0, 2, 3]], slas_advantages([1.0, 2.0, 6.0], 3, **options))
    # A group with fewer than two scored rows gets 0, and does not count in the std of the batch.
    rewards = [1.0, 3.0, 5.0, NAN, NAN, NAN]
    result = compute_advantages(rewards, 2, **options)
    assert (result.advantages[2:] == 0).all()
    torch.testing.assert_close(result.advantages[:2], slas_advantages(rewards[:2], 2, **options))
    assert result.group_std[0] == 1 and result.group_std[1:].isnan().all() and result.frac_reward_zero_std == 0
    for batch_std_of in ("centered", "raw"):
        nothing = compute_advantages([NAN] * 8, 4, batch_std_of=batch_std_of, **options)
        assert (nothing.advantages == 0).all() and nothing.effective_share == 0 and nothing.batch_std == 0


# Two rewards of one prompt. The second has none for row 1, which counts as its mean, 25; row 3 has no score at all.
TWO_REWARDS = [[1.0, 10.0], [2.0, NAN], [3.0, 40.0], [NAN, NAN]]


def test_missing_scores_of_several_rewards():
    options = {"gamma": 0, "reward_weights": [2.0, 0.1]}
    result = compute_advantages(TWO_REWARDS, 4, scale_rewards="none", **options)
    torch.testing.assert_close(result.rewards, torch.tensor([3.0, 6.5, 10.0, NAN]), equal_nan=True)
    torch.testing.assert_close(result.advantages, torch.tensor([-3.5, 0.0, 3.5, 0.0]))
    options["multi_objective_aggregation"] = "normalize_then_sum"
    std = math.sqrt(2 / 3)  # of 1, 2, 3; that of 10, 40 is 15
    expected = torch.tensor([-2 / std - 0.1, 0.0, 2 / std + 0.1, 0.0])
    torch.testing.assert_close(slas_advantages(TWO_REWARDS, 4, scale_rewards="group", **options), expected)
    expected = torch.tensor([-1.0, 0, 1, 0]) * math.sqrt(1.5)
    torch.testing.assert_close(slas_advantages(TWO_REWARDS, 4, **options), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_missing_score_of_one_of_two_rewards_is_neither_punished_nor_rewarded(aggregation):
    for level in (0.8, -1.0):
        rewards = torch.tensor([[0.3, level]] * 3 + [[0.3, NAN]])
        result = compute_advantages(rewards, 4, multi_objective_aggregation=aggregation)
        assert result.advantages.tolist() == [0, 0, 0, 0]
        torch.testing.assert_close(result.rewards, torch.full((4,), 0.3 + level))
    rewards = torch.stack([random_rewards(4), 5 + random_rewards(4, seed=1)], dim=1)
    whole, missing = slas_advantages(rewards, 8, multi_objective_aggregation=aggregation), rewards.clone()
    missing[3, 1] = NAN
    others = torch.arange(32) != 3
    found = slas_advantages(missing, 8, multi_objective_aggregation=aggregation)
    assert (found - whole)[others].abs().max() < 0.5
    if aggregation == "sum_then_normalize":
        missing[3, 1] = missing[:8, 1].nanmean()  # by hand: the mean of the seven others of its group
        torch.testing.assert_close(found, slas_advantages(missing, 8))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_reward_that_a_whole_group_lacks_is_left_out_of_that_group(aggregation):
    rewards = torch.tensor([[1.0, NAN], [3.0, NAN], [5.0, 2.0], [7.0, 2.0]])
    options = {"gamma": 0, "multi_objective_aggregation": aggregation}
    result = compute_advantages(rewards, 2, **options)
    torch.testing.assert_close(result.advantages, torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    torch.testing.assert_close(result.rewards, torch.tensor([1.0, 3.0, 7.0, 9.0]))
    # One that scored a single row says nothing either.
    torch.testing.assert_close(slas_advantages([[1.0, NAN], [3.0, 7.0]], 2, **options), torch.tensor([-1.0, 1.0]))


# Weighted by 0.5 and 2 the rows sum to 2.5, 1.5, 5.5, 2.5 (means 2 and 4).
FOUR_ROWS = torch.tensor([[1.0, 1.0], [3.0, 0.0], [3.0, 2.0], [1.0, 1.0]])


def test_several_rewards_summed_first():
    # Δr = ±0.5 and ±1.5, so s² = (0.25 + 2.25) / 2 = 1.25.
    options = {"reward_weights": [0.5, 2.0], "advantage_clip": None}
    expected = torch.tensor([0.5, -0.5, 1.5, -1.5]) / math.sqrt(1.25)
    torch.testing.assert_close(slas_advantages(FOUR_ROWS, 2, gamma=0, **options), expected)
    torch.testing.assert_close(slas_advantages(FOUR_ROWS, 2, gamma=1, **options), expected * expected.abs())


def test_several_rewards_normalized_first():
    # Centered: ∓1, ±1 with batch std 1, and ±0.5, ±0.5 with batch std 0.5.
    options = {"reward_weights": [0.5, 2.0], "multi_objective_aggregation": "normalize_then_sum"}
    expected = torch.tensor([-0.5 + 2, 0.5 - 2, 0.5 + 2, -0.5 - 2])
    by_group = slas_advantages(FOUR_ROWS, 2, gamma=0, scale_rewards="group", **options)
    torch.testing.assert_close(by_group, expected)
    # With a batch std the sum is divided by its own: s² = (2.25 + 6.25) / 2.
    expected /= math.sqrt(4.25)
    torch.testing.assert_close(slas_advantages(FOUR_ROWS, 2, gamma=0, **options), expected)
    torch.testing.assert_close(slas_advantages(FOUR_ROWS, 2, gamma=1, **options), expected * expected.abs())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("batch_std_of", ["centered", "raw"])
def test_a_common_factor_of_the_weights_is_no_change(aggregation, batch_std_of):
    rewards = torch.stack([random_rewards(seed=1), random_rewards(seed=2)], dim=1)
    rewards[5, 0] = rewards[17] = NAN
    options = {"multi_objective_aggregation": aggregation, "batch_std_of": batch_std_of, "advantage_clip": None}
    one, other = (compute_advantages(rewards, 8, reward_weights=w, **options) for w in ([0.7, 1.4], [1, 2]))
    torch.testing.assert_close(one.advantages, other.advantages)
    if batch_std_of == "centered":  # of several rewards too, one batch std is the pivot
        assert (one.scaled.square().sum() / 47).item() == pytest.approx(1)


def test_a_reward_of_weight_0_does_not_count_as_a_score():
    expected = slas_advantages([1.0, NAN, 2.0], 3)
    assert slas_advantages([[1.0, 7.0], [NAN, 8.0], [2.0, 9.0]], 3, reward_weights=[1.0, 0.0]).equal(expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_statistics_are_those_of_the_summed_rewards_in_both_orders(aggregation):
    options = {"reward_weights": [0.5, 2.0], "min_group_std": 1.0, "multi_objective_aggregation": aggregation}
    result = compute_advantages(FOUR_ROWS, 2, **options)
    assert result.group_std.tolist() == [0.5, 1.5] and result.batch_std == pytest.approx(math.sqrt(1.25))
    assert result.frac_groups_filtered == 0.5 and (result.advantages[:2] == 0).all()


def test_effective_share_by_hand():
    for advantages, share in (
        ([1.0, -1.0, 1.0, -1.0], 1.0),
        ([0.0, 0.0, 3.0, 0.0], 0.25),  # rows of advantage 0 count
        ([3.0, -1.0], 0.8),  # 4² / (2 * 10)
        ([0.0, 0.0], 0.0),
        ([3e-30, -1e-30], 0.8),
    ):
        assert effective_share(torch.tensor(advantages)) == pytest.approx(share)


@pytest.mark.parametrize(
    "rewards", [[1, 2, 4, 9], (1.0, 2.0, 4.0, 9.0), np.array([1.0, 2.0, 4.0, 9.0]), torch.tensor([[1], [2], [4], [9]])]
)
def test_lists_arrays_and_tensors(rewards):
    advantages = slas_advantages(rewards, 4)
    assert advantages.dtype == torch.float32 and advantages.shape == (4,)
    assert advantages.equal(slas_advantages(torch.tensor([1.0, 2.0, 4.0, 9.0]), 4))
    ones = torch.tensor([0.0, 1.0, 1.0, 0.0])
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.bool):
        assert slas_advantages(ones.to(dtype), 4).equal(slas_advantages(ones, 4))


VALUE_ERRORS = {
    **dict.fromkeys(("scale_rewards", "batch_std_of", "shaping_baseline", "multi_objective_aggregation"), ["all"]),
    **{"gamma": [-0.1, NAN, 1000.0], "min_group_std": [-1.0], "advantage_clip": [0.0], "num_generations": [1, 2.0, 3]},
    **{"reward_weights": [[1.0, 2.0], [NAN]], "rewards": [[], 1.0, torch.zeros(2, 2, 2), [0.0, math.inf, 1.0, 2.0]]},
}
TYPE_ERRORS = {
    **{"gamma": ["0.5", True, None], "advantage_clip": ["5"], "advantage_clp": [5], "shape_order": ["any"]},
    **{"reward_weights": [["1"]], "rewards": [None, ["a", "b"], [0.0, None, 1.0, 2.0]]},
}


@pytest.mark.parametrize(
    ("error", "name", "value"),
    [
        (error, name, value)
        for error, table in ((ValueError, VALUE_ERRORS), (TypeError, TYPE_ERRORS))
        for name, values in table.items()
        for value in values
    ],
)
def test_what_does_not_fit_is_refused_by_name(error, name, value):
    with pytest.raises(error, match=name):
        slas_advantages(**{"rewards": [0.0, 1.0, 2.0, 30.0], "num_generations": 4, name: value})
