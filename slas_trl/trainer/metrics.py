"""Metrics of a rollout, under TRL's names, and those that are worth a warning."""

import math
import time
from collections import defaultdict

import numpy as np
import torch
from transformers.utils import logging

from ..advantages import Advantages
from ..reports.calibration import narrow_share
from ..statistics import mean_over_prompts
from .distributed import gathered
from .scoring import Scores


logger = logging.get_logger(__name__)


def rollout_metrics(names: list[str], scores: Scores, result: Advantages, gamma: float) -> dict[str, float]:
    """Metrics of the scores of a rollout and the advantages made of them."""
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
    consecutive images each. Left out with fewer than two prompts that have a score.
    """
    means = rewards.view(prompts, -1, len(names)).nanmean(1)
    widths = {name: mean_over_prompts(column.tolist()).half_width for name, column in zip(names, means.T, strict=True)}
    return {f"rewards/{name}/half_width": width for name, width in widths.items() if not math.isnan(width)}


def reward_times(names: list[str], scores: Scores) -> dict[str, float]:
    """Seconds of each reward."""
    return {f"rewards/{name}/time": seconds for name, seconds in zip(names, scores.seconds, strict=True)}


def advantage_problem(result: Advantages, min_group_std: float) -> str | None:
    """Why little can be learned from a rollout, if so."""
    if not (result.group_std > 0).any():
        return "In no group do the rewards differ. Raise the noise (noise_level, eta), or look at the reward."
    if result.frac_groups_filtered == 1:
        return f"The std of every group is below min_group_std ({min_group_std:g}); lower it."
    if result.effective_share < 0.1:
        return f"Few images decide the update: the effective share is {result.effective_share:.2f}. Lower gamma."
    return None


def warn_of_resolution(names: list[str], rewards: torch.Tensor, num_generations: int) -> None:
    """Warn of rewards `(N, K)` whose finest difference is coarser than the typical std within a group."""
    for name, column in zip(names, rewards.double().T, strict=True):
        groups = column.reshape(-1, num_generations)
        std = (groups - groups.nanmean(1, keepdim=True)).square().nanmean(1).sqrt()
        values, std = column[~column.isnan()].unique(), std[std > 0]
        # The gap of a reward with two values is a verdict's, and no rounding.
        if len(std) and len(values) > 2 and (gap := values.diff().min()) >= std.median():
            how = f"resolves differences of {gap:.3g}, but in a group its std is only {std.median():.3g}"
            logger.warning(f"Reward {name!r} {how}: much of the advantage is rounding. Score in float32.")


class MetricMeans:
    """Figures of micro-steps and rollouts until they are logged, and how long those took."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)
        self._images = 0  # sampled since `images_per_second` was logged
        self._start: tuple[float, int] | None = None  # when, and after which update, the last log was
        self._images_since = 0.0

    def start(self, step: int) -> None:
        """Start the clocks before the first micro-step, which follows update `step`."""
        if self._start is None:
            self._images_since = time.perf_counter()
            self._start = self._images_since, step

    def add(self, name: str, value: float) -> None:
        self._values[name].append(value)

    def add_rollout(self, metrics: dict[str, float], images: int) -> None:
        self._images += images
        for name, value in metrics.items():
            self.add(name, value)

    def flush(self, step: int) -> dict[str, float]:
        """Means since the last call over all processes, and step time. Collective: every rank must call this."""
        if self._start is None:
            return {}
        now = time.perf_counter()
        logs = {"step_time": (now - self._start[0]) / max(1, step - self._start[1])}
        self._start = now, step
        if self._images:  # not every update begins with a rollout
            logs["images_per_second"] = self._images / (now - self._images_since)
            self._images_since, self._images = now, 0
        means = {name: float(np.mean(values)) for name, values in self._values.items()}
        everyone = gathered(means)
        self._values.clear()
        return logs | {name: float(np.mean([each[name] for each in everyone])) for name in means}
