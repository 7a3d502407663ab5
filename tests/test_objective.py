import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from slas_trl.objective import clip_indicators, clipped_surrogate_loss, gaussian_kl, importance_ratio


# Every side of the clip range [0.9, 1.2] with both signs of the advantage.
RATIO = torch.tensor([0.5, 0.5, 1.0, 1.0, 1.5, 1.5])
ADVANTAGES = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0])


def test_importance_ratio():
    ratio = importance_ratio(torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([-1.0, -1.0 - math.log(2), -1.0]))
    torch.testing.assert_close(ratio, torch.tensor([1.0, 2.0, math.exp(-1)]))


def test_importance_ratio_is_exactly_1_before_the_first_update_and_has_a_gradient():
    log_prob = torch.tensor([-1.2345, 0.6789], requires_grad=True)
    ratio = importance_ratio(log_prob, log_prob.detach())
    assert ratio.tolist() == [1.0, 1.0]
    ratio.sum().backward()
    assert log_prob.grad is not None and log_prob.grad.tolist() == [1.0, 1.0]  # ∇ρ = ρ ∇log π


def test_clipped_surrogate_loss():
    loss = clipped_surrogate_loss(RATIO, ADVANTAGES, epsilon=0.1, epsilon_high=0.2)
    # -min(1, 1.8), -min(-1, -1.8), -2, 2, -min(3, 2.4), -min(-3, -2.4)
    torch.testing.assert_close(loss, torch.tensor([-1.0, 1.8, -2.0, 2.0, -2.4, 3.0]))


def test_the_clip_range_is_symmetric_by_default():
    loss = clipped_surrogate_loss(torch.tensor([1.01, 0.99]), torch.tensor([1.0, -1.0]), epsilon=1e-4)
    torch.testing.assert_close(loss, torch.tensor([-1.0001, 0.9999]))


def test_clipped_samples_have_no_gradient_and_the_others_minus_the_advantage():
    ratio = RATIO.clone().requires_grad_()
    clipped_surrogate_loss(ratio, ADVANTAGES, epsilon=0.1, epsilon_high=0.2).sum().backward()
    assert ratio.grad is not None and ratio.grad.tolist() == [-2.0, 0.0, -2.0, 2.0, 0.0, 2.0]


def test_the_first_update_is_the_policy_gradient():
    log_prob = torch.tensor([-0.3, -0.4], requires_grad=True)
    advantages = torch.tensor([1.5, -0.5])
    clipped_surrogate_loss(importance_ratio(log_prob, log_prob.detach()), advantages, epsilon=1e-4).sum().backward()
    assert log_prob.grad is not None and log_prob.grad.tolist() == [-1.5, 0.5]


def test_clip_indicators():
    indicators = clip_indicators(RATIO, ADVANTAGES, epsilon=0.1, epsilon_high=0.2)
    assert indicators.low.tolist() == [False, True, False, False, False, False]
    assert indicators.high.tolist() == [False, False, False, False, True, False]
    assert indicators.region.tolist() == [False, True, False, False, True, False]
    assert [indicator.float().mean().item() for indicator in indicators] == pytest.approx([1 / 6, 1 / 6, 1 / 3])


def test_clip_indicators_mark_the_samples_without_gradient():
    generator = torch.Generator().manual_seed(0)
    ratio = (1 + 0.3 * torch.randn(1000, generator=generator)).requires_grad_()
    advantages = torch.randn(1000, generator=generator)
    clipped_surrogate_loss(ratio, advantages, epsilon=0.1, epsilon_high=0.3).sum().backward()
    assert ratio.grad is not None
    assert clip_indicators(ratio, advantages, epsilon=0.1, epsilon_high=0.3).region.equal(ratio.grad == 0)


def test_an_advantage_of_0_is_never_clipped():
    indicators = clip_indicators(torch.tensor([0.1, 9.0]), torch.zeros(2), epsilon=0.1)
    assert not indicators.region.any()


def test_gaussian_kl():
    mean, ref_mean = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    # (1 + 4) / 2 / (2 * 0.25) and 16 / 2 / (2 * 0.25)
    torch.testing.assert_close(gaussian_kl(mean, ref_mean, 0.5), torch.tensor([5.0, 16.0]))


@pytest.mark.parametrize("std_shape", [(), (3, 1, 1, 1), (1, 2, 4, 4)])
def test_gaussian_kl_is_that_of_torch_distributions(std_shape):
    generator = torch.Generator().manual_seed(0)
    mean, ref_mean = torch.randn(2, 3, 2, 4, 4, generator=generator)
    std = 0.1 + torch.rand(std_shape, generator=generator)
    expected = kl_divergence(Normal(mean, std), Normal(ref_mean, std)).flatten(1).mean(dim=1)
    torch.testing.assert_close(gaussian_kl(mean, ref_mean, std), expected)


def test_gaussian_kl_gradient():
    mean = torch.tensor([[1.0, 3.0]], requires_grad=True)
    gaussian_kl(mean, torch.zeros(1, 2), 2.0).sum().backward()
    assert mean.grad is not None
    torch.testing.assert_close(mean.grad, torch.tensor([[1 / 8, 3 / 8]]))  # (μ - μ_ref) / (std² · elements)
    assert gaussian_kl(mean, mean, 2.0).item() == 0


@pytest.mark.parametrize("function", [clipped_surrogate_loss, clip_indicators])
def test_clip_errors(function):
    with pytest.raises(ValueError, match=r"ratio and advantages must have the same shape, got \(2, 1\) and \(2,\)"):
        function(torch.ones(2, 1), torch.ones(2), 0.1)
    with pytest.raises(ValueError, match="epsilon and epsilon_high must be >= 0, got -0.1 and -0.1"):
        function(torch.ones(2), torch.ones(2), -0.1)
    with pytest.raises(ValueError, match="epsilon and epsilon_high must be >= 0, got 0.1 and -0.2"):
        function(torch.ones(2), torch.ones(2), 0.1, -0.2)


def test_importance_ratio_errors():
    with pytest.raises(ValueError, match=r"log_prob and old_log_prob must have the same shape, got \(2,\) and \(3,\)"):
        importance_ratio(torch.ones(2), torch.ones(3))
    with pytest.raises(TypeError, match="old_log_prob must be float32, as torch.bfloat16 cannot resolve"):
        importance_ratio(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))


def test_gaussian_kl_errors():
    with pytest.raises(ValueError, match=r"mean and ref_mean must have the same shape, got \(2, 3\) and \(2, 1\)"):
        gaussian_kl(torch.ones(2, 3), torch.ones(2, 1), 1.0)
    with pytest.raises(ValueError, match=r"std must be a scalar or have 2 dimensions as mean does, got \(2,\)"):
        gaussian_kl(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2))
