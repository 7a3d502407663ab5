"""
The objective of Eq. 2: importance ratio, clipped surrogate and KL penalty, one value per sample.

The paper prints the clip around the product, `clip(ρA, 1 - ε, 1 + ε)`. What PPO defines, and DanceGRPO, Flow-GRPO and
TRL compute, clips the ratio: `min(ρA, clip(ρ, 1 - ε, 1 + ε) A)`. So does this file.

Log-probs are means over the elements of the latent, not sums, so ratios stay within about 1e-4 of 1, and so does the
clip range. They have to be float32: bfloat16 has no number between 1 and 1.0078.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class ClipIndicators(NamedTuple):
    """Which samples the clipping stops, each a `torch.bool` tensor of shape `(B,)`. Their means are the metrics."""

    low: Tensor  # clip_ratio/low_mean
    high: Tensor  # clip_ratio/high_mean
    region: Tensor  # clip_ratio/region_mean: either


def importance_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """
    Importance ratio ρ = p_θ(x'|x) / p_θ_old(x'|x) of a step, from the log-probs in nats.

    Args:
        log_prob (`torch.Tensor` of shape `(B,)`): Log-prob under the current policy, with its gradient.
        old_log_prob (`torch.Tensor` of shape `(B,)`): Log-prob under the policy that sampled.

    Returns a `torch.Tensor` of shape `(B,)`, exactly 1 where both are equal. Raises `ValueError` if the shapes differ
    and `TypeError` for half precision.
    """
    _check_same_shape("log_prob", log_prob, "old_log_prob", old_log_prob)
    for name, value in (("log_prob", log_prob), ("old_log_prob", old_log_prob)):
        if value.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(f"{name} must be float32, as {value.dtype} cannot resolve a ratio within 1e-4 of 1.")
    return (log_prob - old_log_prob).exp()


def clipped_surrogate_loss(
    ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float | None = None
) -> Tensor:
    """
    Negative clipped surrogate of Eq. 2, -min(ρA, clip(ρ, 1 - ε, 1 + ε_high) A).

    Args:
        ratio (`torch.Tensor` of shape `(B,)`): Importance ratio ρ.
        advantages (`torch.Tensor` of shape `(B,)`): Advantages A.
        epsilon (`float`): Lower clip range ε >= 0.
        epsilon_high (`float`, *optional*): Upper clip range, the same as `epsilon` if `None`.

    Returns a `torch.Tensor` of shape `(B,)`, to be averaged. Raises `ValueError` if the shapes differ or a range is
    negative.
    """
    low, high = _clip_range(ratio, advantages, epsilon, epsilon_high)
    return -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)


def clip_indicators(
    ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float | None = None
) -> ClipIndicators:
    """
    Samples that clipping leaves without a gradient: ρ < 1 - ε and A < 0, or ρ > 1 + ε_high and A > 0, as TRL counts.

    Arguments and errors are those of [`clipped_surrogate_loss`].
    """
    low, high = _clip_range(ratio, advantages, epsilon, epsilon_high)
    is_low, is_high = (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0)
    return ClipIndicators(is_low, is_high, is_low | is_high)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: Tensor | float) -> Tensor:
    """
    KL(π_θ‖π_ref) of a step, for two Gaussians of equal variance: the mean over elements of (μ - μ_ref)² / (2 std²).

    Args:
        mean (`torch.Tensor` of shape `(B, ...)`): Mean μ of the step under the policy.
        ref_mean (`torch.Tensor` of shape `(B, ...)`): Mean μ_ref of the step under the reference.
        std (`torch.Tensor` broadcastable to `(B, ...)` or `float`):
            Std of the noise that is added, so with √(-dt) in it, and > 0 (that of the final step may be 0). One value
            per sample is `(B, 1, ...)`.

    Returns a `torch.Tensor` of shape `(B,)`: nats per element, as log-probs are means over elements. Raises
    `ValueError` for shapes that do not fit.
    """
    _check_same_shape("mean", mean, "ref_mean", ref_mean)
    if isinstance(std, Tensor) and std.ndim not in (0, mean.ndim):
        # (B,) would broadcast along the last dimension instead of the batch.
        raise ValueError(f"std must be a scalar or have {mean.ndim} dimensions as mean does, got {tuple(std.shape)}.")
    return ((mean - ref_mean).square() / (2 * std**2)).flatten(1).mean(dim=1)


def _clip_range(ratio: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    _check_same_shape("ratio", ratio, "advantages", advantages)
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    if epsilon < 0 or epsilon_high < 0:
        raise ValueError(f"epsilon and epsilon_high must be >= 0, got {epsilon} and {epsilon_high}.")
    return 1 - epsilon, 1 + epsilon_high


def _check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same shape, got {tuple(value.shape)} and {tuple(other.shape)}."
        )
