"""What is logged of a rollout, under TRL's names, and what of it is worth a warning."""

import math

import torch
from scipy.special import stdtrit
from transformers.utils import logging

from ..advantages import Advantages
from ..calibration import narrow_share
from .scoring import Scores, reward_resolution, typical_group_std


logger = logging.get_logger(__name__)


def rollout_metrics(names: list[str], scores: Scores, result: Advantages, gamma: float) -> dict[str, float]:
    """Of the scores of a rollout and the advantages made of them."""
    narrow = narrow_share(result.group_std.tolist(), result.group_abs_advantages.tolist())
    return {
        "reward": result.rewards.nanmean().item(),
        "reward_std": result.group_std.nanmean().item(),
        "frac_reward_zero_std": result.frac_reward_zero_std,
        "frac_groups_filtered": result.frac_groups_filtered,
        "advantages/std": result.advantages.std(correction=0).item(),
        "advantages/abs_max": result.advantages.abs().max().item(),
        "advantages/clip_fraction": result.clip_fraction,
        "advantages/effective_share": result.effective_share,
        "advantages/batch_std": result.batch_std,
        "gamma": gamma,
        **({} if math.isnan(narrow) else {"calibration/narrow_share": narrow}),
        **reward_metrics(names, scores),
    }


def reward_metrics(names: list[str], scores: Scores) -> dict[str, float]:
    """Mean and std of each reward, and of its components, over the images that it scored; the share of the others."""
    metrics = {}
    columns = dict(zip(names, scores.rewards.T, strict=True)) | scores.components
    for name, column in columns.items():
        scored = column[~column.isnan()]
        metrics[f"rewards/{name}/mean"] = scored.mean().item()
        metrics[f"rewards/{name}/std"] = scored.std(correction=0).item() if len(scored) else float("nan")
    for name, column in zip(names, scores.rewards.T, strict=True):
        metrics[f"rewards/{name}/nan_share"] = column.isnan().double().mean().item()
    return metrics


def half_widths(names: list[str], rewards: torch.Tensor, prompts: int) -> dict[str, float]:
    """
    Half width of the 95% interval around the mean of each reward `(N, K)` of `prompts` prompts, N / prompts
    consecutive images each. Student's t on the means of the prompts: images of one prompt are no independent tests of
    the policy. Left out with fewer than two prompts that have a score.
    """
    metrics = {}
    for name, column in zip(names, rewards.T, strict=True):
        means = column.view(prompts, -1).nanmean(1)
        means = means[~means.isnan()]
        if len(means) > 1:
            error = means.std().item() / math.sqrt(len(means))
            metrics[f"rewards/{name}/half_width"] = float(stdtrit(len(means) - 1, 0.975)) * error
    return metrics


def reward_times(names: list[str], scores: Scores) -> dict[str, float]:
    """Seconds of each reward."""
    return {f"rewards/{name}/time": seconds for name, seconds in zip(names, scores.seconds, strict=True)}


def advantage_problem(result: Advantages, min_group_std: float) -> str | None:
    """Why little can be learned from a rollout, if so."""
    if not (result.group_std > 0).any():
        return (
            "In no group do the rewards differ; images like these teach nothing. Look at the reward, or raise the "
            "noise (noise_level, eta) or num_generations."
        )
    if result.frac_groups_filtered == 1:
        return f"The std of every group is below min_group_std ({min_group_std:g}); lower it."
    if result.effective_share < 0.1:
        return (
            f"The effective sample share is {result.effective_share:.2f}, below 0.1: few images decide the update. "
            "Lower gamma, or enlarge the rollout."
        )
    return None


def warn_of_resolution(names: list[str], rewards: torch.Tensor, num_generations: int) -> None:
    """Of rewards `(N, K)` that are coarser than what they should tell apart."""
    for name, column in zip(names, rewards.T, strict=True):
        resolution, spread = reward_resolution(column), typical_group_std(column, num_generations)
        if resolution >= spread > 0:
            logger.warning(
                f"Reward {name!r} resolves differences of {resolution:.3g}, but within a group its values spread by "
                f"only {spread:.3g}: much of the advantage is rounding. Score in float32, or return finer values."
            )
