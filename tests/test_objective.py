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


def test_the_first_update_has_a_ratio_of_exactly_1_and_is_the_policy_gradient():
    log_prob = torch.tensor([-1.2345, 0.6789], requires_grad=True)
    ratio = importance_ratio(log_prob, log_prob.detach())
    assert ratio.tolist() == [1.0, 1.0]
    clipped_surrogate_loss(ratio, torch.tensor([1.5, -0.5]), epsilon=1e-4).sum().backward()
    assert log_prob.grad is not None and log_prob.grad.tolist() == [-1.5, 0.5]  # ∇ρ = ρ ∇log π


def test_clipped_surrogate_loss():
    loss = clipped_surrogate_loss(RATIO, ADVANTAGES, epsilon=0.1, epsilon_high=0.2)
    # -min(1, 1.8), -min(-1, -1.8), -2, 2, -min(3, 2.4), -min(-3, -2.4)
    torch.testing.assert_close(loss, torch.tensor([-1.0, 1.8, -2.0, 2.0, -2.4, 3.0]))


def test_clipped_samples_have_no_gradient_and_the_others_minus_the_advantage():
    ratio = RATIO.clone().requires_grad_()
    clipped_surrogate_loss(ratio, ADVANTAGES, epsilon=0.1, epsilon_high=0.2).sum().backward()
    assert ratio.grad is not None and ratio.grad.tolist() == [-2.0, 0.0, -2.0, 2.0, 0.0, 2.0]


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


ONES = torch.ones(2)


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (clipped_surrogate_loss, (torch.ones(2, 1), ONES, 0.1), "advantages"),
        (clip_indicators, (torch.ones(2, 1), ONES, 0.1), "advantages"),
        (clip_indicators, (ONES, ONES, -0.1), "epsilon"),
        (clipped_surrogate_loss, (ONES, ONES, 0.1, -0.2), "epsilon_high"),
        (importance_ratio, (ONES, torch.ones(3)), "old_log_prob"),
        (gaussian_kl, (torch.ones(2, 3), torch.ones(2, 1), 1.0), "ref_mean"),
        (gaussian_kl, (torch.ones(2, 2), torch.ones(2, 2), ONES), "std"),
    ],
)
def test_what_does_not_fit_is_refused(function, arguments, named):
    with pytest.raises(ValueError, match=named):
        function(*arguments)


def test_log_probs_need_float32():
    with pytest.raises(TypeError, match="old_log_prob must be float32"):
        importance_ratio(ONES, ONES.bfloat16())
