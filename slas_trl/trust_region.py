"""
Trust region on γ (Appendix E): how far the advantages may be shaped while an update stays within a KL threshold ζ.

    KL ≈ τ²/2 g̃ᵀ H g̃ ≤ τ²/2 λ_max(H) ‖g̃‖² ≤ τ²/2 λ_max(H) M G        Eq. 84 to 88
    M  = E|x|^(2 (1 + γ)) ≤ B = 2 ζ / (τ² λ_max(H) G)                   Theorem 4, Eq. 83
    γ  ≤ log B / (2 log R) - 1                  if |x| ≤ R, R > 1       Corollary 1, Eq. 91
    (1 + γ) (log(1 + γ) + log(2 C² K²)) ≤ log B if x is sub-Gaussian    Corollary 2, Eq. 95

g̃ is the gradient, τ the learning rate, H the Fisher matrix of the policy and G a bound on E‖∇log π‖². The paper's Δr
is what the policy gradient is multiplied by before it is shaped: here x, the scaled reward of `advantages.py`.

**Units.** log π is the mean over the elements of a latent, as everywhere in this library. So KL, ζ and H are those of
one element, on average over elements, samples and trained steps. g̃ and G are of this log π too, and Eq. 84 to 90 hold
as they stand.

**What is a bound here, and what an estimate.**

- Eq. 84 is of second order: all this is for small updates.
- Eq. 87 takes E‖A ∇log π‖² apart into E[A²] E‖∇log π‖², which holds if |x|^(2 + 2γ) and ‖∇log π‖² are uncorrelated.
- Theorem 4 is about plain ascent, Δθ = τ g̃. Of an update that was made, by whatever optimizer, τ = ‖Δθ‖ / ‖g̃‖ gives
  τ² λ_max ‖g̃‖² / 2 = λ_max ‖Δθ‖² / 2, which bounds its KL to second order. What another γ would have done is an
  extrapolation by M. With AdamW or clipping, a longer gradient hardly makes a longer step, and B is then cautious.
- G ≥ ‖g̃‖² / M by Eq. 87. The largest value that updates showed stands in for G. It is an estimate: E‖∇log π‖² itself
  contains the noise of single samples, which averages out in g̃, and so in the update.
- Power iteration approaches λ_max from below.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from scipy.special import lambertw
from torch import Tensor

from .advantages import check_number, effective_share


# A constant of Eq. 96 that holds for every k >= 2, with the norm of Eq. 94: E[y^p] ≤ Γ(p + 1) E[e^y - 1] for p >= 1.
SUB_GAUSSIAN_CONSTANT = 0.5**0.5


# Theorem 4


def reward_moment(x: Tensor, gamma: float) -> float:
    """M of Eq. 83: the mean over all rows of |x|^(2 (1 + γ)), for x of shape `(N,)`."""
    return x.detach().double().abs().pow(2 * (1 + gamma)).mean().item()


def kl_budget(kl_threshold: float, learning_rate: float, lambda_max: float, g_max: float) -> float:
    """
    B of Eq. 83, 2ζ / (τ² λ_max G): the largest moment with which the KL of an update is at most ζ > 0, in nats per
    element. τ >= 0 is the learning rate of plain ascent, or the effective one ‖Δθ‖ / ‖g̃‖, λ_max >= 0 the largest
    eigenvalue of the Fisher matrix, and G >= 0 a bound on E‖∇log π‖². Infinite if one of these three is 0. Raises
    `ValueError` for values out of range.
    """
    check_number("kl_threshold", kl_threshold, "(0, inf]")
    for name, value in (("learning_rate", learning_rate), ("lambda_max", lambda_max), ("g_max", g_max)):
        check_number(name, value, "[0, inf]")
    divisor = learning_rate**2 * lambda_max * g_max
    return 2 * kl_threshold / divisor if divisor > 0 else math.inf


def largest_gamma(x: Tensor, budget: float, gamma_max: float) -> float:
    """
    The largest γ in [0, `gamma_max`] whose empirical moment meets the budget, M ≤ B.

    log M is convex in γ, but falls at first where many |x| are below 1: the γ that meet B are an interval, and 0 need
    not be among them. Where none is, the γ of the least moment is returned, which comes nearest.

    `x` are scaled rewards `(N,)`, `budget` B > 0, and `gamma_max` >= 0. Raises `ValueError` for values out of range.
    """
    check_number("budget", budget, "(0, inf]")
    check_number("gamma_max", gamma_max, "[0, inf]")
    size = x.detach().double().abs()
    if not (size > 0).any() or reward_moment(size, gamma_max) <= budget:
        return gamma_max
    log_size = size[size > 0].log()

    def rises(gamma: float) -> bool:
        # The sign of d log M / dγ; relative to the largest term, so that none overflows.
        power = 2 * (1 + gamma) * log_size
        return ((power - power.max()).exp() * log_size).sum().item() >= 0

    least = _first(rises, 0.0, gamma_max)
    return _first(lambda gamma: reward_moment(size, gamma) > budget, least, gamma_max)


# Corollaries


@dataclass(frozen=True)
class GammaRange:
    """The γ from `low` to `high`, both included; `high` may be infinite. None is in an `empty` one."""

    low: float
    high: float

    @property
    def empty(self) -> bool:
        return self.low > self.high

    def __contains__(self, gamma: float) -> bool:
        return self.low <= gamma <= self.high


NO_GAMMA, EVERY_GAMMA = GammaRange(math.inf, -math.inf), GammaRange(0.0, math.inf)


def gamma_bound_bounded(budget: float, r_max: float) -> GammaRange:
    """
    Corollary 1: the γ >= 0 with R^(2 (1 + γ)) ≤ B.

    The paper's Eq. 91 is its case R > 1. For R < 1 the logarithm is negative and the inequality turns round: γ has a
    lower bound, above which more shaping is safer. For R = 1 all γ are admissible, or none.

    `budget` is B > 0, and `r_max` R >= 0, a bound on |x|. Raises `ValueError` for values out of range.
    """
    check_number("budget", budget, "(0, inf]")
    check_number("r_max", r_max, "[0, inf]")
    if r_max == 0:
        return EVERY_GAMMA
    if r_max == 1:
        return EVERY_GAMMA if budget >= 1 else NO_GAMMA
    bound = math.log(budget) / (2 * math.log(r_max)) - 1
    if r_max < 1:
        return GammaRange(max(0.0, bound), math.inf)
    return GammaRange(0.0, bound) if bound >= 0 else NO_GAMMA


def gamma_bound_sub_gaussian(budget: float, norm: float, constant: float = SUB_GAUSSIAN_CONSTANT) -> GammaRange:
    """
    Corollary 2: the γ >= 0 with (1 + γ) (log(1 + γ) + log(2 C² K²)) ≤ log B.

    With u = 1 + γ and c = 2 C² K², u log(c u) = log B has the roots u = exp(W(c log B)) / c with Lambert's function W.
    The left side is convex in u, and below log B between the roots of the two branches of W. For c < 1/e it falls at
    first, and γ has a lower bound, too, where B is small.

    `budget` is B > 0, `norm` K >= 0 that of [`sub_gaussian_norm`], and `constant` C > 0 of Eq. 96, (E|x|^k)^(1/k) ≤
    C K √k; by default √½, which holds for all x and all k >= 2. Raises `ValueError` for values out of range.
    """
    check_number("budget", budget, "(0, inf]")
    check_number("norm", norm, "[0, inf]")
    check_number("constant", constant, "(0, inf]")
    c, log_budget = 2 * constant**2 * norm**2, math.log(budget)
    if c == 0:
        return EVERY_GAMMA
    argument = c * log_budget
    if argument < -1 / math.e:  # below the least value of the left side, -1 / (c e)
        return NO_GAMMA
    high = math.exp(lambertw(argument, 0).real) / c if math.isfinite(argument) else math.inf
    low = math.exp(lambertw(argument, -1).real) / c if argument < 0 else 0.0
    return GammaRange(max(0.0, low - 1), high - 1) if high >= 1 else NO_GAMMA


def sub_gaussian_norm(x: Tensor) -> float:
    """The ψ₂ norm of Eq. 94 of the values x `(N,)`: the least K with mean(exp(x² / K²)) ≤ 2."""
    square = x.detach().double().square()
    largest = square.max().item()
    if largest == 0:
        return 0.0

    def suffices(norm: float) -> bool:
        return (square / norm**2).exp().mean().item() <= 2

    # The largest term alone exceeds the one, and all terms as large as it do not exceed the other.
    return _first(suffices, (largest / math.log(2 * len(square))) ** 0.5, (largest / math.log(2)) ** 0.5)


# Fisher matrix


class GaussianStep(Protocol):
    """A step policy N(mean, std²): `mean` `(B, ...)` with its graph, `std` broadcastable to it."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def std(self) -> Tensor: ...


Vector = list[Tensor]  # one tensor for each parameter, of its shape


def inner_product(a: Vector, b: Vector) -> float:
    return sum((x * y).sum(dtype=torch.float64).item() for x, y in zip(a, b, strict=True))


class Eigenpair(NamedTuple):
    value: float
    vector: Vector  # of norm 1
    products: int  # that it took


def power_iteration(
    product: Callable[[Vector], Vector],
    start: Vector,
    *,
    min_products: int = 2,
    max_products: int = 20,
    tolerance: float = 0.01,
    inner: Callable[[Vector, Vector], float] = inner_product,
) -> Eigenpair:
    """
    The largest eigenvalue of a positive semi-definite matrix that is known by its products with vectors alone.

    `product` returns the matrix times a vector, and `inner` an inner product. It begins with `start`, which is not 0
    (the eigenvector of a similar matrix saves products), and ends after `min_products` to `max_products` when the
    eigenvalue changes by less than `tolerance` of itself. The value, vᵀHv, is never above the largest eigenvalue, and
    0 where all products are.
    """
    vector, value = _normalized(start, inner), 0.0
    for count in range(1, max_products + 1):
        image = product(vector)
        previous, value = value, inner(vector, image)
        if not 0 < value < math.inf:
            return Eigenpair(value, vector, count)
        vector = _normalized(image, inner)
        if count >= min_products and abs(value - previous) <= tolerance * value:
            break
    return Eigenpair(value, vector, count)


def _normalized(vector: Vector, inner: Callable[[Vector, Vector], float]) -> Vector:
    norm = math.sqrt(inner(vector, vector))
    return [part / norm if norm > 0 else part for part in vector]


@dataclass(eq=False)
class FisherProduct:
    """
    v → H v with the Fisher matrix H = E[Jᵀ J / σ²] of Gaussian steps, J being the Jacobian of the step's mean by the
    parameters; the mean over elements, samples and steps, see "Units" above. It is the Hessian of that KL (Eq. 82) at
    the present weights.

    J v is a central difference of the mean along v, which takes two forward passes and works wherever training does
    (fused attention has no second backward pass), and Jᵀ one backward pass. The two points are where the mean has
    moved by `shift` standard deviations (RMS), as far as the curvature is known. The weights are put back to the last
    bit.
    """

    policies: Sequence[Callable[[], GaussianStep]]  # each returns one step's policy at the present weights
    parameters: Sequence[Tensor]  # what is trained
    curvature: float  # a guess of vᵀHv > 0; after each product, it is that of the vector
    gradients: Callable[[Tensor], Vector] | None = None  # of a scalar by the parameters; by default torch's
    inner: Callable[[Vector, Vector], float] = inner_product
    shift: float = 0.003

    def _gradients(self, scalar: Tensor) -> Vector:
        return list(torch.autograd.grad(scalar, list(self.parameters), allow_unused=True, materialize_grads=True))

    def __call__(self, vector: Vector) -> Vector:
        distance = self.shift / math.sqrt(self.curvature)
        ahead, behind = (self._means(vector, step) for step in (distance, -distance))
        total, gradients = [torch.zeros_like(part) for part in vector], self.gradients or self._gradients
        for policy, plus, minus in zip(self.policies, ahead, behind, strict=True):
            here = policy()
            push = (plus - minus) / (2 * distance * here.std**2 * here.mean.numel() * len(self.policies))  # J v / σ²
            for part, gradient in zip(total, gradients((here.mean * push).sum()), strict=True):
                part += gradient
        curvature = self.inner(vector, total)
        if 0 < curvature < math.inf:
            self.curvature = curvature
        return total

    @torch.no_grad()
    def _means(self, vector: Vector, distance: float) -> list[Tensor]:
        with _moved(self.parameters, vector, distance):
            return [policy().mean for policy in self.policies]


@contextmanager
def _moved(parameters: Sequence[Tensor], vector: Vector, distance: float) -> Iterator[None]:
    """The parameters in another place; afterwards they are what they were to the last bit."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter, part in zip(parameters, vector, strict=True):
            parameter.add_(part, alpha=distance)
        yield
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)


# Schedules of γ


def kl_feedback(gamma: float, kl: float, kl_threshold: float, gamma_max: float) -> float:
    """
    The next γ, given the measured KL of the last updates.

    Above ζ, γ shrinks in proportion to ζ / KL, by half at most. Below, it grows by 0.1 log(ζ / KL), by 0.1 at most:
    Corollary 2 lets γ grow no faster than the logarithm of the budget, of which ζ / KL is left. It stays in
    [0, `gamma_max`].
    """
    if kl > kl_threshold:
        return gamma * max(0.5, kl_threshold / kl)
    growth = math.log(kl_threshold / kl) if kl > 0 else math.inf
    return min(gamma_max, gamma + 0.1 * min(1.0, growth))


def largest_gamma_of_share(x: Tensor, min_effective_share: float, gamma_max: float) -> float:
    """
    The largest γ in [0, `gamma_max`] with an effective share (Σ|A|)² / (N ΣA²) of A = |x|^(1 + γ), for x `(N,)`, of at
    least `min_effective_share`. The share falls as γ grows; 0 where not even γ = 0 suffices.
    """
    size = x.detach().double().abs()
    if not (size > 0).any():
        return gamma_max
    size = size / size.max()
    return _first(lambda gamma: effective_share(size.pow(1 + gamma)) < min_effective_share, 0.0, gamma_max)


def _first(holds: Callable[[float], bool], low: float, high: float) -> float:
    """
    Where in [low, high] a condition begins to hold, that holds from there on; `high` where it never does. The value is
    the last float at which bisection did not find it to hold, or `low`.
    """
    if not holds(high):
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low
