import math

import numpy as np
import pytest
import torch

from slas_trl.advantages import compute_advantages, effective_share, slas_advantages


NAN = math.nan
WIDE = [0.360, 0.370, 0.380, 0.390]
NARROW = [0.366, 0.367, 0.368, 0.369]
SCALINGS = ["batch", "group", "none"]


def random_rewards(groups: int = 6, num_generations: int = 8, seed: int = 0) -> torch.Tensor:
    """Rewards whose level and spread differ from prompt to prompt, in float64."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(groups, num_generations + 2, generator=generator, dtype=torch.float64)
    return (normal[:, :1] + normal[:, 1:2].exp() * normal[:, 2:]).flatten()


def by_group(values: torch.Tensor, num_generations: int) -> torch.Tensor:
    return values.double().view(-1, num_generations)


# --- The paper's two groups ------------------------------------------------------------------------------------------


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
    advantages = slas_advantages(WIDE, num_generations=4, scale_rewards="group", gamma=0)
    torch.testing.assert_close(advantages, torch.tensor([-1.342, -0.447, 0.447, 1.342]), atol=5e-4, rtol=0)
    # Lemma 1 and DanceGRPO divide by the unbiased std, which gives 1.162.
    assert advantages[3].item() * math.sqrt(3 / 4) == pytest.approx(1.162, abs=5e-4)


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


# --- What γ = 0 equals -----------------------------------------------------------------------------------------------


def test_gamma_0_by_group_is_dance_grpo_up_to_ddof():
    rewards, size = random_rewards(), 8
    groups = rewards.view(-1, size)
    dance_grpo = (groups - groups.mean(dim=1, keepdim=True)) / (groups.std(dim=1, keepdim=True) + 1e-8)
    ours = slas_advantages(rewards, size, scale_rewards="group", gamma=0)
    expected = dance_grpo.flatten() * math.sqrt(size / (size - 1))
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)


def test_gamma_0_with_raw_std_is_trls_batch_scaling_up_to_eps_and_ddof():
    rewards, size = random_rewards(), 8
    mean = rewards.view(-1, size).mean(dim=1).repeat_interleave(size)
    trl = (rewards - mean) / (rewards.std() + 1e-4)
    ours = slas_advantages(rewards, size, gamma=0, batch_std_of="raw")
    to_trls_std = rewards.std(unbiased=False) / (rewards.std() + 1e-4)
    torch.testing.assert_close(ours.double() * to_trls_std, trl, rtol=1e-6, atol=1e-6)


def test_gamma_0_with_raw_std_is_trls_batch_scaling_when_scores_are_missing():
    rewards = torch.tensor([1.0, 2.0, NAN, 6.0, 5.0, 5.0])  # group means 1.5, 6 and 5; TRL: nanmean and nanstd
    std = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0]).std(unbiased=False)
    ours = slas_advantages(rewards, 2, gamma=0, batch_std_of="raw")
    torch.testing.assert_close(ours, torch.tensor([-0.5, 0.5, 0, 0, 0, 0]) / std)


def test_gamma_0_without_scaling_is_the_centred_reward():
    advantages = slas_advantages([1.0, 2.0, 6.0, 0.0, 0.0, 3.0], 3, scale_rewards="none", gamma=0)
    torch.testing.assert_close(advantages, torch.tensor([-2.0, -1.0, 3.0, -1.0, -1.0, 2.0]))


@pytest.mark.parametrize(("flag", "name"), [(True, "group"), (False, "none")])
def test_scale_rewards_accepts_the_bools_of_trl(flag, name):
    rewards = random_rewards()
    assert slas_advantages(rewards, 8, scale_rewards=flag).equal(slas_advantages(rewards, 8, scale_rewards=name))


@pytest.mark.parametrize("batch_std_of", ["centered", "raw"])
@pytest.mark.parametrize("scale_rewards", SCALINGS)
def test_gamma_0_is_the_same_in_both_orders(scale_rewards, batch_std_of):
    options = {"gamma": 0, "scale_rewards": scale_rewards, "batch_std_of": batch_std_of}
    one = slas_advantages(random_rewards(), 8, shape_order="scale_then_shape", **options)
    other = slas_advantages(random_rewards(), 8, shape_order="shape_then_scale", **options)
    torch.testing.assert_close(one, other)


# --- Symmetries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shaping_baseline", ["mean", "zero_sum"])
@pytest.mark.parametrize("shape_order", ["scale_then_shape", "shape_then_scale"])
@pytest.mark.parametrize("batch_std_of", ["centered", "raw"])
@pytest.mark.parametrize("scale_rewards", ["batch", "group"])
@pytest.mark.parametrize(("k", "c"), [(1e-3, 0.0), (250.0, -40.0), (1.0, 1000.0)])
def test_scaling_and_shifting_the_rewards_is_no_change(
    k, c, scale_rewards, batch_std_of, shape_order, shaping_baseline
):
    options = {
        "scale_rewards": scale_rewards,
        "batch_std_of": batch_std_of,
        "shape_order": shape_order,
        "shaping_baseline": shaping_baseline,
        "advantage_clip": 2.0,
    }
    rewards = random_rewards()
    expected = slas_advantages(rewards, 8, **options)
    torch.testing.assert_close(slas_advantages(k * rewards + c, 8, **options), expected, rtol=1e-5, atol=1e-6)


def test_each_of_several_rewards_has_its_own_scale_when_normalized_first():
    rewards = torch.stack([random_rewards(seed=1), random_rewards(seed=2)], dim=1)
    options = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [0.7, 1.4]}
    rescaled = rewards * torch.tensor([100.0, 0.01]) + torch.tensor([-3.0, 5.0])
    expected = slas_advantages(rewards, 8, **options)
    torch.testing.assert_close(slas_advantages(rescaled, 8, **options), expected, rtol=1e-5, atol=1e-6)


def test_without_scaling_the_reward_sets_the_scale_and_the_clip_follows():
    rewards = random_rewards()
    options = {"scale_rewards": "none", "gamma": 1, "advantage_clip": 1.5}
    expected = 100**2 * slas_advantages(rewards, 8, **options)
    torch.testing.assert_close(slas_advantages(100 * rewards, 8, **options), expected)
    assert compute_advantages(rewards, 8, **options).clip_fraction > 0


@pytest.mark.parametrize("shaping_baseline", ["mean", "zero_sum"])
@pytest.mark.parametrize("scale_rewards", SCALINGS)
def test_odd_symmetry(scale_rewards, shaping_baseline):
    options = {"scale_rewards": scale_rewards, "shaping_baseline": shaping_baseline, "gamma": 0.7}
    rewards = random_rewards()
    torch.testing.assert_close(slas_advantages(-rewards, 8, **options), -slas_advantages(rewards, 8, **options))


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 3])
@pytest.mark.parametrize("scale_rewards", SCALINGS)
def test_a_better_image_of_the_same_prompt_has_the_larger_advantage(scale_rewards, gamma):
    rewards = by_group(random_rewards(), 8).sort(dim=1).values.flatten()
    advantages = slas_advantages(rewards, 8, scale_rewards=scale_rewards, gamma=gamma)
    assert (by_group(advantages, 8).diff(dim=1) > 0).all()


def test_one_batch_std_is_the_pivot():
    result = [compute_advantages(WIDE + NARROW, 4, gamma=gamma).advantages.abs() for gamma in (0, 0.5, 1)]
    above = result[0] > 1
    assert (result[2] > result[1])[above].all() and (result[1] > result[0])[above].all()
    assert (result[2] < result[1])[~above].all() and (result[1] < result[0])[~above].all()


@pytest.mark.parametrize("gamma", [0, 0.25, 0.5, 1, 2])
@pytest.mark.parametrize("shaping_baseline", ["mean", "zero_sum"])
@pytest.mark.parametrize("advantage_clip", [1.5, 5.0])
def test_shape_then_scale_has_unit_rms_at_every_gamma(advantage_clip, shaping_baseline, gamma):
    def advantages(scale_rewards):
        return slas_advantages(
            random_rewards(),
            8,
            scale_rewards=scale_rewards,
            gamma=gamma,
            shape_order="shape_then_scale",
            shaping_baseline=shaping_baseline,
            advantage_clip=advantage_clip,
        )

    torch.testing.assert_close(advantages("batch").square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(advantages("group").view(-1, 8).square().mean(dim=1), torch.ones(6))


def test_without_scaling_there_is_no_order():
    one, other = (
        slas_advantages(random_rewards(), 8, scale_rewards="none", shape_order=shape_order)
        for shape_order in ("scale_then_shape", "shape_then_scale")
    )
    assert one.equal(other)


def test_the_two_orders_differ_by_one_scalar_per_batch():
    rewards = random_rewards()
    ratio = slas_advantages(rewards, 8, shape_order="shape_then_scale") / slas_advantages(rewards, 8)
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))


def test_groups_scaled_by_themselves_do_not_see_each_other():
    def advantages(rewards):
        return slas_advantages(rewards, 8, scale_rewards="group", shaping_baseline="zero_sum")

    rewards = random_rewards()
    alone = torch.cat([advantages(group) for group in rewards.split(8)])
    torch.testing.assert_close(advantages(rewards), alone)


@pytest.mark.parametrize("shaping_baseline", ["mean", "zero_sum"])
def test_a_million_rewards_are_one_vectorised_computation(shaping_baseline):
    rewards = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) ** 4
    advantages = slas_advantages(rewards, 8, gamma=0.7, shaping_baseline=shaping_baseline)
    assert advantages.shape == (1_000_000,) and advantages.isfinite().all()


# --- No difference, no advantage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1 / 3, -7.7e5, 1e-12, 2.4e-38])
@pytest.mark.parametrize("num_generations", [3, 7, 12])
@pytest.mark.parametrize("scale_rewards", SCALINGS)
def test_a_constant_group_gets_exactly_0(scale_rewards, num_generations, value):
    for gamma in (0, 0.5):
        rewards = [value] * num_generations
        result = compute_advantages(rewards, num_generations, scale_rewards=scale_rewards, gamma=gamma)
        assert (result.advantages == 0).all() and result.frac_reward_zero_std == 1 and result.batch_std == 0
        assert result.frac_groups_filtered == 0
        # Also beside a group that has something to say.
        beside = rewards + [value + i * (abs(value) + 1) for i in range(num_generations)]
        advantages = slas_advantages(beside, num_generations, scale_rewards=scale_rewards, gamma=gamma)
        assert (advantages[:num_generations] == 0).all() and (advantages[num_generations:] != 0).any()


def test_differences_below_float32_resolution_are_none():
    one_bit = torch.nextafter(torch.tensor(1000.0), torch.tensor(2000.0)).item()
    result = compute_advantages([1000.0, one_bit, 1.0, 1.001], 2)
    assert result.advantages[:2].tolist() == [0, 0] and result.advantages[2:].abs().min() > 0
    assert result.frac_reward_zero_std == 0.5


def test_cancelling_rewards_leave_no_difference():
    first = torch.tensor([100.1, 100.2, 100.3, 100.4])
    rewards = torch.stack([first, 3 * first], dim=1)
    result = compute_advantages(rewards, 4, reward_weights=[3.0, -1.0])
    assert result.rewards.any()  # 0, but for the rounding of the second reward
    assert (result.advantages == 0).all()


def test_small_gaps_are_not_eaten_by_an_eps():
    gaps = torch.tensor([-3.0, -1.0, 1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(slas_advantages(1e-6 * gaps, 4), slas_advantages(gaps, 4))


def test_low_variance_groups_can_be_filtered():
    everything = compute_advantages(WIDE + NARROW, 4)
    filtered = compute_advantages(WIDE + NARROW, 4, min_group_std=5e-3)
    assert filtered.frac_groups_filtered == 0.5 and everything.frac_groups_filtered == 0
    assert (filtered.advantages[4:] == 0).all() and (filtered.scaled[4:] == 0).all()
    assert filtered.advantages[:4].equal(everything.advantages[:4])


def test_zero_std_groups_are_counted_apart_from_filtered_ones():
    result = compute_advantages([1.0, 1.0, *NARROW[:2], 0.0, 1.0], 2, min_group_std=0.1)
    assert result.frac_reward_zero_std == pytest.approx(1 / 3)
    assert result.frac_groups_filtered == pytest.approx(2 / 3)


# --- Clipping --------------------------------------------------------------------------------------------------------


OUTLIER = [1.0] + [0.0] * 15  # Δr = 15/16 and -1/16, std √15/16: x = 3.873 and -0.2582


@pytest.mark.parametrize("shape_order", ["scale_then_shape", "shape_then_scale"])
def test_the_clip_is_before_shaping(shape_order):
    result = compute_advantages(OUTLIER, 16, gamma=1, advantage_clip=2.0, shape_order=shape_order)
    assert result.scaled[0].item() == pytest.approx(2) and result.clip_fraction == pytest.approx(1 / 16)
    assert (result.advantages[0] / result.advantages[1]).item() == pytest.approx(-(2**2) * 15)


def test_the_default_clip_leaves_shaped_advantages_above_5_alone():
    result = compute_advantages(OUTLIER, 16, gamma=1)
    assert result.advantages[0].item() == pytest.approx(15) and result.clip_fraction == 0


def test_without_scaling_the_clip_is_in_batch_stds():
    result = compute_advantages([100 * r for r in OUTLIER], 16, gamma=0, scale_rewards="none", advantage_clip=2.0)
    assert result.advantages[0].item() == pytest.approx(2 * 100 * math.sqrt(15) / 16)


def test_no_clip():
    rewards = [1.0] + [0.0] * 99
    assert slas_advantages(rewards, 100, gamma=0)[0].item() == 5
    assert slas_advantages(rewards, 100, gamma=0, advantage_clip=None)[0].item() == pytest.approx(math.sqrt(99))
    assert (slas_advantages([1.0, 1.0], 2, scale_rewards="none", advantage_clip=None) == 0).all()


# --- Zero sum --------------------------------------------------------------------------------------------------------


BINARY = [1.0] * 4 + [0.0] * 12  # 4 successes of 16, as GenEval or OCR would score


def test_skewed_rewards_leave_a_push_around_the_mean_and_none_around_the_zero_sum_baseline():
    options = {"gamma": 1, "scale_rewards": "none", "advantage_clip": None}
    mean = slas_advantages(BINARY, 16, **options)
    zero_sum = slas_advantages(BINARY, 16, **options, shaping_baseline="zero_sum")
    assert mean.sum().item() == pytest.approx(1.5)  # 4 * .75² - 12 * .25²
    assert zero_sum.sum().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1, 2, 6])
@pytest.mark.parametrize("successes", [1, 4, 15])
def test_the_zero_sum_baseline_of_binary_rewards(successes, gamma):
    # k (1 - b)^p = (G - k) b^p for p = 1 + γ has the root b = 1 / (1 + ((G - k) / k)^(1/p)).
    rewards = [1.0] * successes + [0.0] * (16 - successes)
    b = 1 / (1 + ((16 - successes) / successes) ** (1 / (1 + gamma)))
    options = {"scale_rewards": "none", "advantage_clip": None, "shaping_baseline": "zero_sum"}
    advantages = slas_advantages(rewards, 16, gamma=gamma, **options)
    expected = torch.tensor([(1 - b) ** (1 + gamma)] * successes + [-(b ** (1 + gamma))] * (16 - successes))
    torch.testing.assert_close(advantages, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [0.01, 0.25, 0.5, 1, 2, 10])
@pytest.mark.parametrize("scale_rewards", SCALINGS)
@pytest.mark.parametrize("num_generations", [2, 5, 16])
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
    rewards[3, 0] = rewards[9, 1] = NAN
    rewards[17] = NAN
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        options = {"shaping_baseline": "zero_sum", "multi_objective_aggregation": aggregation, "advantage_clip": None}
        advantages = slas_advantages(rewards, 8, **options)
        torch.testing.assert_close(by_group(advantages, 8).sum(dim=1), torch.zeros(6).double(), rtol=0, atol=1e-5)
        assert advantages[17] == 0


def test_zero_sum_at_gamma_0_is_the_mean():
    rewards = random_rewards()
    expected = slas_advantages(rewards, 8, gamma=0)
    assert slas_advantages(rewards, 8, gamma=0, shaping_baseline="zero_sum").equal(expected)


# --- Missing scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_rewards", SCALINGS)
def test_a_row_without_score_gets_0_and_is_left_out_of_the_means(scale_rewards):
    options = {"scale_rewards": scale_rewards, "gamma": 0.5}
    advantages = slas_advantages([1.0, NAN, 2.0, 6.0], 4, **options)
    assert advantages[1] == 0
    torch.testing.assert_close(advantages[[0, 2, 3]], slas_advantages([1.0, 2.0, 6.0], 3, **options))


@pytest.mark.parametrize("scale_rewards", SCALINGS)
def test_a_group_with_fewer_than_two_scored_rows_gets_0(scale_rewards):
    rewards = [1.0, 3.0, 5.0, NAN, NAN, NAN]
    result = compute_advantages(rewards, 2, scale_rewards=scale_rewards)
    assert (result.advantages[2:] == 0).all()
    # Nor does it count in the std of the batch.
    torch.testing.assert_close(result.advantages[:2], slas_advantages(rewards[:2], 2, scale_rewards=scale_rewards))
    assert result.group_std[0] == 1 and result.group_std[1:].isnan().all() and result.frac_reward_zero_std == 0


@pytest.mark.parametrize("scale_rewards", SCALINGS)
@pytest.mark.parametrize("batch_std_of", ["centered", "raw"])
@pytest.mark.parametrize("shape_order", ["scale_then_shape", "shape_then_scale"])
def test_no_score_at_all(scale_rewards, batch_std_of, shape_order):
    options = {"scale_rewards": scale_rewards, "batch_std_of": batch_std_of, "shape_order": shape_order}
    result = compute_advantages([NAN] * 8, 4, **options)
    assert (result.advantages == 0).all() and result.effective_share == 0 and result.batch_std == 0


# Two rewards of one prompt. The second has none for row 1, which counts as its mean, 25; row 3 has no score at all.
TWO_REWARDS = [[1.0, 10.0], [2.0, NAN], [3.0, 40.0], [NAN, NAN]]


def test_missing_scores_of_several_rewards_summed_first():
    result = compute_advantages(TWO_REWARDS, 4, scale_rewards="none", gamma=0, reward_weights=[2.0, 0.1])
    torch.testing.assert_close(result.rewards, torch.tensor([3.0, 6.5, 10.0, NAN]), equal_nan=True)
    torch.testing.assert_close(result.advantages, torch.tensor([-3.5, 0.0, 3.5, 0.0]))


def test_missing_scores_of_several_rewards_normalized_first():
    options = {"gamma": 0, "reward_weights": [2.0, 0.1], "multi_objective_aggregation": "normalize_then_sum"}
    std = math.sqrt(2 / 3)  # of 1, 2, 3; that of 10, 40 is 15
    expected = torch.tensor([-2 / std - 0.1, 0.0, 2 / std + 0.1, 0.0])
    torch.testing.assert_close(slas_advantages(TWO_REWARDS, 4, scale_rewards="group", **options), expected)
    torch.testing.assert_close(
        slas_advantages(TWO_REWARDS, 4, **options), torch.tensor([-1.0, 0, 1, 0]) * math.sqrt(1.5)
    )


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("level", [0.8, -1.0])
def test_a_missing_score_of_one_of_two_rewards_is_neither_punished_nor_rewarded(aggregation, level):
    rewards = torch.tensor([[0.3, level]] * 3 + [[0.3, NAN]])
    result = compute_advantages(rewards, 4, multi_objective_aggregation=aggregation)
    assert result.advantages.tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(result.rewards, torch.full((4,), 0.3 + level))


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_one_missing_score_leaves_the_others_nearly_as_they_were(aggregation):
    rewards = torch.stack([random_rewards(4), 5 + random_rewards(4, seed=1)], dim=1)
    options = {"gamma": 0.5, "multi_objective_aggregation": aggregation}
    whole, missing = slas_advantages(rewards, 8, **options), rewards.clone()
    missing[3, 1] = NAN
    others = torch.arange(32) != 3
    assert (slas_advantages(missing, 8, **options) - whole)[others].abs().max() < 0.5
    reference = missing.clone()  # by hand: the mean of the seven others of its group
    reference[3, 1] = missing[:8, 1].nanmean()
    if aggregation == "sum_then_normalize":
        torch.testing.assert_close(slas_advantages(missing, 8, **options), slas_advantages(reference, 8, **options))


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_a_reward_that_a_whole_group_lacks_is_left_out_of_that_group(aggregation):
    rewards = torch.tensor([[1.0, NAN], [3.0, NAN], [5.0, 2.0], [7.0, 2.0]])
    result = compute_advantages(rewards, 2, gamma=0, multi_objective_aggregation=aggregation)
    torch.testing.assert_close(result.advantages, torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    torch.testing.assert_close(result.rewards, torch.tensor([1.0, 3.0, 7.0, 9.0]))


def test_a_reward_that_scored_one_row_of_a_group_says_nothing_when_normalized_first():
    rewards = [[1.0, NAN], [3.0, 7.0]]
    advantages = slas_advantages(rewards, 2, gamma=0, multi_objective_aggregation="normalize_then_sum")
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0]))


# --- Several rewards -------------------------------------------------------------------------------------------------


# Weighted by 0.5 and 2 the rows sum to 2.5, 1.5, 5.5, 2.5 (means 2 and 4).
FOUR_ROWS = torch.tensor([[1.0, 1.0], [3.0, 0.0], [3.0, 2.0], [1.0, 1.0]])


def test_several_rewards_summed_first():
    # Δr = ±0.5 and ±1.5, so s² = (0.25 + 2.25) / 2 = 1.25.
    options = {"reward_weights": [0.5, 2.0], "advantage_clip": None}
    expected = torch.tensor([0.5, -0.5, 1.5, -1.5]) / math.sqrt(1.25)
    torch.testing.assert_close(slas_advantages(FOUR_ROWS, 2, gamma=0, **options), expected)
    torch.testing.assert_close(slas_advantages(FOUR_ROWS, 2, gamma=1, **options), expected * expected.abs())


def test_several_rewards_normalized_first():
    # Centred: ∓1, ±1 with batch std 1, and ±0.5, ±0.5 with batch std 0.5.
    options = {"reward_weights": [0.5, 2.0], "multi_objective_aggregation": "normalize_then_sum"}
    expected = torch.tensor([-0.5 + 2, 0.5 - 2, 0.5 + 2, -0.5 - 2])
    by_group = slas_advantages(FOUR_ROWS, 2, gamma=0, scale_rewards="group", **options)
    torch.testing.assert_close(by_group, expected)
    # With a batch std the sum is divided by its own: s² = (2.25 + 6.25) / 2.
    expected /= math.sqrt(4.25)
    torch.testing.assert_close(slas_advantages(FOUR_ROWS, 2, gamma=0, **options), expected)
    torch.testing.assert_close(slas_advantages(FOUR_ROWS, 2, gamma=1, **options), expected * expected.abs())


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("batch_std_of", ["centered", "raw"])
def test_a_common_factor_of_the_weights_is_no_change(aggregation, batch_std_of):
    rewards = torch.stack([random_rewards(seed=1), random_rewards(seed=2)], dim=1)
    rewards[5, 0] = rewards[17] = NAN
    options = {"multi_objective_aggregation": aggregation, "batch_std_of": batch_std_of}
    one, other = (slas_advantages(rewards, 8, reward_weights=weights, **options) for weights in ([0.7, 1.4], [1, 2]))
    torch.testing.assert_close(one, other)


def test_one_batch_std_is_the_pivot_of_several_rewards():
    rewards = torch.stack([random_rewards(seed=1), random_rewards(seed=2)], dim=1)
    options = {"multi_objective_aggregation": "normalize_then_sum", "advantage_clip": None}
    scaled = compute_advantages(rewards, 8, reward_weights=[0.7, 1.4], **options).scaled
    assert scaled.square().mean().item() == pytest.approx(1)


def test_normalized_first_by_group_at_gamma_0_is_the_weighted_sum_of_dance_grpo_advantages():
    first, second = random_rewards(seed=1), random_rewards(seed=2)
    options = {"scale_rewards": "group", "gamma": 0, "advantage_clip": None}
    expected = 0.7 * slas_advantages(first, 8, **options) + 1.4 * slas_advantages(second, 8, **options)
    both = {"reward_weights": [0.7, 1.4], "multi_objective_aggregation": "normalize_then_sum", **options}
    torch.testing.assert_close(slas_advantages(torch.stack([first, second], dim=1), 8, **both), expected)


def test_a_reward_of_weight_0_does_not_count_as_a_score():
    rewards = [[1.0, 7.0], [NAN, 8.0], [2.0, 9.0]]
    expected = slas_advantages([1.0, NAN, 2.0], 3)
    assert slas_advantages(rewards, 3, reward_weights=[1.0, 0.0]).equal(expected)


def test_the_statistics_are_those_of_the_summed_rewards_in_both_orders():
    options = {"reward_weights": [0.5, 2.0], "min_group_std": 1.0}
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        result = compute_advantages(FOUR_ROWS, 2, multi_objective_aggregation=aggregation, **options)
        assert result.group_std.tolist() == [0.5, 1.5] and result.batch_std == pytest.approx(math.sqrt(1.25))
        assert result.frac_groups_filtered == 0.5 and (result.advantages[:2] == 0).all()


# --- Effective share -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantages", "share"),
    [
        ([1.0, -1.0, 1.0, -1.0], 1.0),
        ([0.0, 0.0, 3.0, 0.0], 0.25),  # rows of advantage 0 count
        ([3.0, -1.0], 0.8),  # 4² / (2 * 10)
        ([0.0, 0.0], 0.0),
        ([3e-30, -1e-30], 0.8),
    ],
)
def test_effective_share(advantages, share):
    assert effective_share(torch.tensor(advantages)) == pytest.approx(share)


# --- Input and output ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rewards", [[1, 2, 4, 9], (1.0, 2.0, 4.0, 9.0), np.array([1.0, 2.0, 4.0, 9.0]), torch.tensor([[1], [2], [4], [9]])]
)
def test_lists_arrays_and_tensors(rewards):
    advantages = slas_advantages(rewards, 4)
    assert advantages.dtype == torch.float32 and advantages.shape == (4,)
    assert advantages.equal(slas_advantages(torch.tensor([1.0, 2.0, 4.0, 9.0]), 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.bool])
def test_the_result_is_float32_whatever_comes_in(dtype):
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0], dtype=dtype)
    assert slas_advantages(rewards, 3).equal(slas_advantages(rewards.float(), 3))


def test_rewards_are_left_as_they_are_and_advantages_have_no_gradient():
    rewards = torch.tensor([1.0, NAN, 3.0, 2.0], requires_grad=True)
    before = rewards.detach().clone()
    assert not slas_advantages(rewards, 2).requires_grad
    torch.testing.assert_close(rewards.detach(), before, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_rewards": "std"}, "scale_rewards must be one of .* 'std'"),
        ({"shape_order": "shape"}, "shape_order must be one of .* 'shape'"),
        ({"batch_std_of": "all"}, "batch_std_of must be one of .* 'all'"),
        ({"shaping_baseline": "median"}, "shaping_baseline must be one of .* 'median'"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation must be one of .*'sum'"),
        ({"gamma": -0.1}, r"gamma must be in \[0, inf\), got -0.1"),
        ({"gamma": NAN}, "gamma must be in .*, got nan"),
        ({"gamma": 1000.0, "advantage_clip": None}, "gamma=1000.0 makes the advantages overflow"),
        ({"min_group_std": -1.0}, "min_group_std must be in .*, got -1.0"),
        ({"advantage_clip": 0.0}, "advantage_clip must be in .*, got 0.0"),
        ({"reward_weights": [1.0, 2.0]}, r"reward_weights must be 1 finite numbers, one per reward, got \[1.0, 2.0\]"),
        ({"reward_weights": [NAN]}, "reward_weights must be in .*, got nan"),
        ({"num_generations": 3}, "num_generations=3 must divide the 4 rewards"),
        ({"num_generations": 1}, "num_generations must be an int of at least 2, .* got 1"),
        ({"num_generations": 2.0}, "num_generations must be an int of at least 2, .* got 2.0"),
        ({"rewards": [1.0, math.inf, 2.0, -math.inf]}, r"2 rows are not: \[1, 3\]"),
        ({"rewards": []}, r"rewards must be non-empty, of shape \(N,\) or \(N, K\), got \(0,\)"),
        ({"rewards": torch.zeros(2, 2, 2)}, r"got \(2, 2, 2\)"),
        ({"rewards": 1.0}, r"got \(\)"),
    ],
)
def test_value_errors(options, message):
    arguments = {"rewards": [0.0, 1.0, 2.0, 30.0], "num_generations": 4, **options}
    with pytest.raises(ValueError, match=message):
        slas_advantages(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewards": [0.0, None, 1.0, 2.0]}, r"rewards must be numbers \(float\('nan'\) for 'no score'\)"),
        ({"rewards": None}, "rewards must be numbers"),
        ({"rewards": ["a", "b"]}, "rewards must be numbers"),
        ({"reward_weights": ["1"]}, "reward_weights must be a number"),
        ({"gamma": "0.5"}, "gamma must be a number, got '0.5' of type str"),
        ({"gamma": True}, "gamma must be a number, got True of type bool"),
        ({"gamma": None}, "gamma must be a number, got None"),
        ({"advantage_clip": "5"}, "advantage_clip must be a number, got '5'"),
        ({"advantage_clp": 5}, "advantage_clp"),
    ],
)
def test_type_errors(options, message):
    arguments = {"rewards": [0.0, 1.0, 2.0, 3.0], "num_generations": 4, **options}
    with pytest.raises(TypeError, match=message):
        slas_advantages(**arguments)
