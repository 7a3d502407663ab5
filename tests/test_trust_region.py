"""Appendix E: moments, bounds on γ, the Fisher matrix's largest eigenvalue, and the schedules of γ."""

import math

import numpy as np
import pytest
import torch

from slas_trl.advantages import compute_advantages, effective_share
from slas_trl.objective import gaussian_kl
from slas_trl.policy import PipelineReplayer
from slas_trl.schedulers.gaussian_step import StochasticScheduler
from slas_trl.trainer import adapters
from slas_trl.trust_region import (
    SUB_GAUSSIAN_CONSTANT,
    FisherProduct,
    GammaRange,
    gamma_bound_bounded,
    gamma_bound_sub_gaussian,
    inner_product,
    kl_budget,
    kl_feedback,
    largest_gamma,
    largest_gamma_of_share,
    power_iteration,
    reward_moment,
    sub_gaussian_norm,
)
from tests.tiny_pipelines import PIPELINES
from tests.tiny_policies import GaussianPolicy, dense_fisher
from tests.trainer.tiny_trainers import lora


GRID = np.linspace(0, 3, 3001)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_moment_by_hand_and_of_advantages():
    x = torch.tensor([-2.0, 1.0, 0.5, 0.0])
    assert reward_moment(x, 0.0) == pytest.approx((4 + 1 + 0.25) / 4)
    assert reward_moment(x, 0.5) == pytest.approx((8 + 1 + 0.125) / 4)
    result = compute_advantages(torch.randn(64, generator=seeded(0)), 8, gamma=0.7)
    assert reward_moment(result.scaled, 0.7) == pytest.approx(result.advantages.square().mean().item(), rel=1e-5)


def test_the_budget_by_hand():
    assert kl_budget(0.02, learning_rate=0.1, lambda_max=4.0, g_max=0.5) == pytest.approx(0.04 / (0.01 * 4 * 0.5))
    assert kl_budget(0.02, 0.0, 4.0, 0.5) == math.inf
    for name, *values in (("kl_threshold", 0.0, 0.1, 1, 1), ("lambda_max", 1, 0.1, math.nan, 1)):
        with pytest.raises(ValueError, match=name):
            kl_budget(*values)


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_gamma_is_that_of_a_grid(seed):
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.standard_t(4, 64) * rng.choice([0.2, 0.7, 1.0, 2.0]))
    moments = x.abs().pow(2 * (1 + torch.tensor(GRID))[:, None]).mean(1).numpy()
    for budget in np.exp(rng.uniform(np.log(moments.min()) - 0.2, np.log(moments.max()) + 0.2, 20)):
        gamma = largest_gamma(x, budget, 3.0)
        admissible = GRID[moments <= budget]
        expected = admissible.max() if len(admissible) else GRID[moments.argmin()]
        assert gamma == pytest.approx(expected, abs=2e-3)
        assert not len(admissible) or reward_moment(x, gamma) <= budget


def test_the_moment_may_fall_before_it_rises():
    x = torch.tensor([0.1] * 30 + [0.8] * 30 + [1.2] * 2)
    first, least, last = (reward_moment(x, gamma) for gamma in (0.0, 2.5, 5.0))
    assert least < last < first
    budget = (least + last) / 2  # neither 0 nor 5 meet it
    gamma = largest_gamma(x, budget, 5.0)
    assert 2.5 < gamma < 5.0 and reward_moment(x, gamma) == pytest.approx(budget)
    assert largest_gamma(x, (first + last) / 2, 5.0) == 5.0  # 0 does not meet it, but 5 does
    nearest = largest_gamma(x, least / 2, 5.0)  # none does
    assert reward_moment(x, nearest) <= min(reward_moment(x, gamma) for gamma in np.linspace(0, 5, 101)) * (1 + 1e-6)


def test_a_budget_that_is_met_or_missed_throughout():
    x = torch.tensor([1.0, 2.0, -3.0])
    assert (largest_gamma(x, 1e6, 1.0), largest_gamma(x, 1e-6, 1.0)) == (1.0, 0.0)
    assert largest_gamma(torch.zeros(8), 1e-9, 1.0) == largest_gamma_of_share(torch.zeros(8), 0.25, 1.0) == 1.0


def agrees(found: GammaRange, admissible: np.ndarray) -> bool:
    """On the grid, but for rounding on the border."""
    inside = np.array([gamma in found for gamma in GRID])
    border = np.array([min(abs(gamma - found.low), abs(gamma - found.high)) < 1e-9 for gamma in GRID])
    return bool((inside == admissible)[~border].all())


@pytest.mark.parametrize("r_max", [0.0, 0.7, 0.999, 1.0, 1.001, 5.0])
def test_corollary_1_is_brute_force(r_max):
    for budget in [1e-9, 0.01, 0.5, 0.97, 1.0, 1.03, 2.0, 50.0, 1e9]:
        assert agrees(gamma_bound_bounded(budget, r_max), r_max ** (2 * (1 + GRID)) <= budget), budget


def test_the_corollaries_by_hand():
    above, below = gamma_bound_bounded(100.0, 5.0), gamma_bound_bounded(0.01, 0.2)
    bound = math.log(100) / (2 * math.log(5)) - 1  # Eq. 91, which turns round below one
    assert (above.low, above.high) == pytest.approx((0.0, bound))
    assert (below.low, below.high) == (pytest.approx(bound), math.inf)
    assert gamma_bound_bounded(1.0, 1.0) == GammaRange(0.0, math.inf)
    assert gamma_bound_bounded(0.99, 1.0).empty and 0.0 not in gamma_bound_bounded(0.99, 1.0)
    # (1 + γ) (log(1 + γ) + log(2 C² K²)) at γ = 1, C = 1, K = 2
    budget = math.exp(2 * (math.log(2) + math.log(8)))
    assert gamma_bound_sub_gaussian(budget, norm=2.0, constant=1.0).high == pytest.approx(1.0)


@pytest.mark.parametrize("c", [0.0, 1e-6, 0.1, 0.25, 1 / math.e, 0.4, 3.0, 50.0])
def test_corollary_2_is_brute_force(c):
    """u log(c u) falls before it rises where c < 1/e: then γ may have a lower bound, or there may be none at all."""
    norm = (c / 2) ** 0.5 / SUB_GAUSSIAN_CONSTANT
    u = 1 + GRID
    kinds = set()
    for budget in np.exp([-50, -20, -8, -3.5, -2, -1, -0.4, -0.05, 0, 0.05, 0.4, 1, 2, 5, 20, 50]):
        with np.errstate(divide="ignore"):
            admissible = u * (np.log(u) + np.log(c)) <= math.log(budget)
        found = gamma_bound_sub_gaussian(budget, norm)
        assert agrees(found, admissible), budget
        kinds.add("none" if found.empty else "all from 0" if found.low == 0 else "from above 0")
    if c == 0.1:
        assert kinds == {"none", "all from 0", "from above 0"}


DISTRIBUTIONS = {
    "normal": lambda rng: rng.normal(size=400),
    "binary": lambda rng: np.where(rng.random(400) < 0.1, 3.0, -1 / 3),
    "one": lambda rng: np.eye(400)[0] * 20,
    "laplace": lambda rng: rng.laplace(size=400),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_corollaries_hold_for_what_they_bound(name):
    x = torch.tensor(DISTRIBUTIONS[name](np.random.default_rng(0)))
    norm, r_max = sub_gaussian_norm(x), x.abs().max().item()
    assert (x.square() / norm**2).exp().mean().item() == pytest.approx(2.0)
    for gamma in np.linspace(0, 5, 51):
        k = 2 * (1 + gamma)
        assert reward_moment(x, gamma) <= (SUB_GAUSSIAN_CONSTANT * norm) ** k * k ** (k / 2) * (1 + 1e-9)  # Eq. 97
    for budget in np.exp(np.linspace(0, 10, 21)):
        for found in (gamma_bound_bounded(budget, r_max), gamma_bound_sub_gaussian(budget, norm)):
            assert found.empty or reward_moment(x, min(found.high, 20.0)) <= budget * (1 + 1e-9)


def test_the_norm_of_a_constant():
    assert sub_gaussian_norm(torch.tensor([3.0, -3.0])) == pytest.approx(3 / math.log(2) ** 0.5)
    assert sub_gaussian_norm(torch.zeros(4)) == 0.0


@pytest.mark.parametrize("seed", range(3))
def test_power_iteration_is_the_dense_eigenvalue(seed):
    half = torch.randn(20, 12, generator=seeded(seed), dtype=torch.float64)
    matrix = half @ half.T
    start = [torch.randn(4, 5, generator=seeded(seed + 100), dtype=torch.float64)]
    found = power_iteration(lambda v: [(matrix @ v[0].flatten()).view(4, 5)], start, max_products=500, tolerance=1e-12)
    values, vectors = torch.linalg.eigh(matrix)
    assert found.value == pytest.approx(values[-1].item(), rel=1e-6)
    assert (found.vector[0].flatten() @ vectors[:, -1]).abs().item() == pytest.approx(1.0, abs=1e-4)
    again = power_iteration(lambda v: [(matrix @ v[0].flatten()).view(4, 5)], found.vector)
    assert again.products == 2 < found.products and again.value == pytest.approx(found.value)


def test_power_iteration_ends():
    count = []
    found = power_iteration(lambda v: count.append(1) or [2 * v[0]], [torch.ones(3)], min_products=4)
    assert (found.value, found.products, len(count)) == (pytest.approx(2.0), 4, 4)
    assert power_iteration(lambda v: [0 * v[0]], [torch.ones(3)]).value == 0.0
    assert math.isnan(power_iteration(lambda v: [math.nan * v[0]], [torch.ones(3)]).value)


def test_products_are_those_of_the_dense_matrix():
    policy = GaussianPolicy(0)
    parameters = list(policy.parameters())
    before = [p.detach().clone() for p in parameters]
    inputs = [torch.randn(8, 4, generator=seeded(i), dtype=torch.float64) for i in (1, 2)]
    fisher = dense_fisher([policy(x) for x in inputs], parameters)
    product = FisherProduct([lambda x=x: policy(x) for x in inputs], parameters, curvature=1.0)
    for seed in range(3):
        vector = [torch.randn(p.shape, generator=seeded(seed), dtype=torch.float64) for p in parameters]
        flat = torch.cat([part.flatten() for part in vector])
        found = torch.cat([part.flatten() for part in product(vector)])
        torch.testing.assert_close(found, fisher @ flat, rtol=1e-4, atol=1e-6)
        assert product.curvature == pytest.approx((flat @ fisher @ flat).item(), rel=1e-4)
    assert all(torch.equal(p, old) and p.grad is None for p, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize(("family", "checkpointed"), [("sd", False), ("sd3", True), ("flux", False)])
def test_of_a_pipeline_through_the_replayer(family, checkpointed):
    """Fused attention, which has no second derivative, guidance, and layers that are computed again."""
    build, call = PIPELINES[family]
    pipe = build()
    denoiser = pipe.components["unet" if family == "sd" else "transformer"]
    adapters.add_adapter(denoiser, lora(target_modules=["to_q", "to_v"], r=1))
    if checkpointed:
        denoiser.enable_gradient_checkpointing()
    parameters = [p for p in denoiser.parameters() if p.requires_grad]
    for i, parameter in enumerate(parameters):  # as after some training
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=seeded(i))
    before = [p.detach().clone() for p in parameters]
    replayer = PipelineReplayer(pipe)
    rollout = replayer.sample(prompt=["a cat"], num_inference_steps=3, generator=seeded(0), **call)
    policies = [lambda step=step: replayer.replay(rollout, step) for step in rollout.trainable_steps[:2]]
    fisher = dense_fisher([policy() for policy in policies], parameters)
    product = FisherProduct(policies, parameters, curvature=torch.trace(fisher).item())
    start = [torch.randn(p.shape, generator=seeded(9)) for p in parameters]
    random_state = torch.get_rng_state()
    found = power_iteration(product, start, max_products=40, tolerance=1e-4)
    assert found.value == pytest.approx(torch.linalg.eigvalsh(fisher)[-1].item(), rel=0.03)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_theorem_4_bounds_the_kl_of_an_update(seed, gamma):
    policy = GaussianPolicy(seed)
    parameters = list(policy.parameters())
    x = torch.randn(8, 4, generator=seeded(seed), dtype=torch.float64).repeat_interleave(16, 0)
    with torch.no_grad():
        old = policy(x)
        y = old.mean + old.std * torch.randn(old.mean.shape, generator=seeded(seed + 50), dtype=torch.float64)
    rewards = y.sum(1) + 0.3 * torch.randn(len(y), generator=seeded(seed + 99), dtype=torch.float64)
    result = compute_advantages(rewards, 16, gamma=gamma)

    log_prob = StochasticScheduler.log_prob(policy(x).mean.double(), old.std, y)
    scores = [torch.autograd.grad(each, parameters, retain_graph=True) for each in log_prob]
    g_max = np.mean([inner_product(list(score), list(score)) for score in scores])  # E‖∇log π‖²
    gradient = torch.autograd.grad((result.advantages * log_prob).mean(), parameters)
    product = FisherProduct([lambda: policy(x)], parameters, curvature=1.0)
    lambda_max = power_iteration(product, list(gradient), max_products=100, tolerance=1e-6).value
    learning_rate = 0.02
    for parameter, step in zip(parameters, gradient, strict=True):
        parameter.data += learning_rate * step
    kl = gaussian_kl(policy(x).mean, old.mean, old.std).mean().item()

    moment = reward_moment(result.scaled, gamma)
    bound = learning_rate**2 / 2 * lambda_max * moment * g_max  # Eq. 88
    assert bound / 200 < kl <= bound
    # The same with G from the norm of the gradient: tighter, and still a bound.
    norm = inner_product(list(gradient), list(gradient))
    tight = learning_rate**2 / 2 * lambda_max * moment * (norm / moment)
    assert tight / 4 < kl <= tight * 1.01 and tight < bound
    # So a γ within the budget keeps the KL within the threshold.
    assert largest_gamma(result.scaled, kl_budget(bound, learning_rate, lambda_max, g_max), 3.0) == pytest.approx(
        gamma
    )


def test_feedback_on_the_kl():
    cases = {(0.5, 1e-4): 0.5, (0.5, 1.25e-4): 0.4, (0.5, 1.0): 0.25, (0.5, 0.0): 0.6, (0.99, 0.0): 1.0}
    cases |= {(gamma, 5e-5): gamma + 0.1 * math.log(2) for gamma in (0.0, 0.5)}
    for (gamma, kl), expected in cases.items():
        assert kl_feedback(gamma, kl, kl_threshold=1e-4, gamma_max=1.0) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("share", [0.05, 0.2, 0.35, 0.5, 0.99])
def test_the_largest_gamma_of_a_share_is_that_of_a_grid(seed, share):
    x = torch.randn(96, generator=seeded(seed))
    gamma = largest_gamma_of_share(x, share, 3.0)
    shares = np.array([effective_share(x.double().abs().pow(1 + each)) for each in GRID])
    assert (np.diff(shares) < 0).all()
    assert gamma == pytest.approx(GRID[shares >= share].max() if (shares >= share).any() else 0.0, abs=2e-3)
