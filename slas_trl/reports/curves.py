"""The curves of a run, `training.png`."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..run_files import read_steps


History = Sequence[Mapping[str, float]]  # logged numbers, a record for each step


def plot_training(metrics_path: str | Path, output_path: str | Path) -> None:
    """
    Draw reward, KL, clip fraction and advantage spread of a run's `metrics.jsonl` against steps, into a picture whose
    ending names its format. A metric that was not logged leaves its panel empty, with a word that says so.
    """
    history = read_steps(metrics_path)
    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    reward, kl, clip, spread = figure.subplots(2, 2, sharex=True).flatten()
    steps, means, stds = _series(history, "reward", "reward_std")
    if len(steps):
        label = "± std within a group"
        reward.fill_between(steps, means - stds, means + stds, color="C0", alpha=0.15, lw=0, label=label)
    _draw(reward, history, "Reward", "reward", {"reward": "training", "eval_reward": "evaluation"})
    unit, empty = "KL per latent element (nats)", "not logged: beta is 0"
    _draw(kl, history, "KL to the reference model", unit, {"kl": "KL"}, empty)
    _draw(clip, history, "Clip fraction", "share of clipped ratios", {"clip_ratio/region_mean": "clip fraction"})
    labels = {"advantages/std": "std", "advantages/effective_share": "effective share of the samples"}
    _draw(spread, history, "Advantage spread", "advantage", labels)
    for axes in (kl, clip):  # never negative: a curve that stays at 0 should lie on the floor
        if axes.lines:
            axes.set_ylim(bottom=0)
    figure.savefig(output_path)


def _draw(
    axes: Axes, history: History, title: str, unit: str, labels: Mapping[str, str], empty: str = "not logged"
) -> None:
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.xaxis.set_tick_params(labelbottom=True)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for key, label in labels.items():
        steps, values = _series(history, key)
        if len(steps):
            # A single point has no line, and evaluations are few and far between.
            marker = "o" if len(steps) == 1 or key.startswith("eval_") else None
            axes.plot(steps, values, label=label, marker=marker, linewidth=1.5)
    if not axes.lines:
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", va="center", color="gray")
        axes.set_yticks([])
    elif len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False)


def _series(history: History, *keys: str) -> np.ndarray:
    """Steps, and the values of the keys, `(1 + K, n)`: where all of them are numbers."""
    points = [(record["step"], *(record.get(key, math.nan) for key in keys)) for record in history]
    points = [point for point in points if all(map(math.isfinite, point))]
    return np.array(points).reshape(-1, 1 + len(keys)).T
