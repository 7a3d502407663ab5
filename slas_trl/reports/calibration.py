"""
Are the advantages calibrated, and is the reward being hacked? The lines of a run's `calibration.jsonl` as numbers.

Divided by its own std, a group whose images hardly differ pushes as hard as one with real differences (Section 4 of
the paper). Whether the model learns what is wanted, only a reward that is not trained on can tell.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..run_files import read_steps
from ..statistics import t_quantile


NARROW_SHARE = 0.3  # the narrowest groups: this share of those that differ at all
BLOCKS = 5  # parts of a run, whose means are compared
FEWEST_ROLLOUTS = 2 * BLOCKS
SMALL = 0.1  # smaller changes, in initial std between images, count as none
LOOK = "Look at the samples."

Record = Mapping[str, Any]  # a line of calibration.jsonl or metrics.jsonl, with its "step"


def read_rollouts(path: str | Path) -> list[dict[str, Any]]:
    """The rollouts of a run's `calibration.jsonl`, by step. Raises `ValueError` if there is none."""
    rollouts = read_steps(path)
    if not rollouts:
        raise ValueError(f"{path} holds no rollout; a run with log_completions writes a line for each.")
    return rollouts


def share_by_std(
    stds: Sequence[Sequence[float | None]], advantages: Sequence[Sequence[float]], edges: Sequence[float]
) -> np.ndarray:
    """
    Share of Σ|A| that groups get between quantiles of their std, relative to the mean std of their rollout. Groups of
    equal std share alike, and one across an edge counts on both sides in proportion.

    `stds` and `advantages` have the std and Σ|A| of each group, by rollout; groups without a difference (0) or a score
    (`None`, NaN) are left out. `edges` are quantiles in [0, 1], rising. Returns `len(edges) - 1` shares; NaN where no
    group has a std, or none an advantage.
    """
    widths, pushes = [], []
    for std, advantage in zip(stds, advantages, strict=True):
        width, push = np.array(std, dtype=np.float64), np.array(advantage, dtype=np.float64)
        kept = width > 0
        if kept.any():
            widths.append(width[kept] / width[kept].mean())
            pushes.append(push[kept])
    total = sum(push.sum() for push in pushes)
    if not total > 0:
        return np.full(len(edges) - 1, math.nan)
    _, which = np.unique(np.concatenate(widths), return_inverse=True)  # sorted by std, equal ones together
    counts = np.bincount(which)
    groups = np.concatenate([[0], counts.cumsum()]) / counts.sum()
    pushed = np.concatenate([[0], np.bincount(which, np.concatenate(pushes)).cumsum()]) / total
    return np.diff(np.interp(edges, groups, pushed))


def narrow_share(std: Sequence[float | None], advantages: Sequence[float]) -> float:
    """Share of one rollout's Σ|A| in the narrowest 30% of its groups; see [`share_by_std`]."""
    return float(share_by_std([std], [advantages], (0, NARROW_SHARE))[0])


@dataclass(frozen=True, eq=False)
class Curve:
    """
    A reward over training, as changes from the start in std between images then; and means over at most five parts of
    the run, or none if there is too little to compare.
    """

    name: str
    steps: np.ndarray  # (n,)
    changes: np.ndarray  # (n,) of the mean over images
    in_evaluation: bool
    spans: list[tuple[int, int]] = field(default_factory=list)  # first and last step of each part
    means: np.ndarray = field(default_factory=lambda: np.array([]))
    errors: np.ndarray = field(default_factory=lambda: np.array([]))  # standard errors
    freedom: float = 0  # degrees of freedom of the errors


@dataclass(frozen=True)
class Change:
    """From an earlier part of the run to its last one, in initial std between images."""

    name: str
    direction: str  # "rises", "falls", or "shows no clear change"
    size: float
    half_width: float  # of its interval
    since: int | None = None  # the step before which it rose, for a fall from a peak

    def __str__(self) -> str:
        since = "" if self.since is None else f" since step {self.since}"
        return f"{self.name} {self.direction}{since} ({self.size:+.2f} ± {self.half_width:.2f})"


@dataclass(frozen=True)
class Reading:
    """The rewards of a run in a word ("healthy", "hacking", "unclear" or "too short") and in a sentence."""

    verdict: str
    text: str


def reward_curves(rollouts: Sequence[Record], metrics: Sequence[Record]) -> tuple[Curve, list[Curve], list[Curve]]:
    """
    Curves of the trained reward (the weighted sum); of the held-out ones (weight 0) on the `rollouts` and, from the
    `metrics`, in evaluation; and of the trained one in evaluation.
    """
    names = [name for name, weight in rollouts[-1]["weights"].items() if not weight]
    held_out = [_curve(name, rollouts, f"rewards/{name}/mean", f"rewards/{name}/std") for name in names]
    evaluated = []
    counted = (key for line in metrics for key in line if re.fullmatch("eval_(.*_)?samples", key))
    for samples in dict.fromkeys(counted):  # "eval_samples", or "eval_hard_samples" for a data set called "hard"
        prefix = samples.removesuffix("_samples")
        where = "in evaluation" + (f" on {prefix.removeprefix('eval_')}" if prefix != "eval" else "")
        for name in names:
            key = f"{prefix}_rewards/{name}"
            held_out.append(_curve(f"{name} {where}", metrics, f"{key}/mean", f"{key}/std", samples))
        name, key = f"trained reward {where}", f"{prefix}_reward"
        evaluated.append(_curve(name, metrics, key, f"{key}_std", samples))
    held_out, evaluated = ([curve for curve in curves if len(curve.steps)] for curves in (held_out, evaluated))
    return _curve("trained reward", rollouts, "reward", "reward_std_of_images"), held_out, evaluated


def read_rewards(trained: Curve, held_out: Sequence[Curve], evaluated: Sequence[Curve]) -> Reading:
    """
    "hacking" is a trained reward that rises while a held-out one falls, "healthy" is both rising. None of it is proof.
    The means of the last fifth of the run and of its first are compared by a t-test, 5% of which is divided among all
    comparisons (Bonferroni). A held-out reward falls too if it is below any other earlier fifth: hacking often begins
    with a gain.
    """
    if not trained.spans:
        few = "1 rollout is" if len(trained.steps) == 1 else f"{len(trained.steps)} rollouts are"
        return Reading("too short", f"{few} too few to tell; it takes {FEWEST_ROLLOUTS}.")
    level = 0.05 / 2 / (BLOCKS - 1) / (1 + len(held_out) + len(evaluated))
    gain = _change(trained, level, from_any=False)
    others, elsewhere = ([_change(c, level, from_any=True) for c in cs if c.spans] for cs in (held_out, evaluated))
    falling, rising = ([c for c in others if c.direction == direction] for direction in ("falls", "rises"))
    shrunk = [c for c in elsewhere if c.direction == "falls"]
    if gain.direction == "rises" and falling:
        but = f", though {_listed(rising)}" if rising else ""
        return Reading("hacking", f"Likely hacking: {gain} while held-out {_listed(falling)}{but}. {LOOK}")
    if gain.direction == "rises" and rising and not shrunk:
        rest = [c for c in others if c not in rising]
        but = f"; {_listed(rest)}" if rest else ""
        return Reading("healthy", f"Healthy: {gain} and held-out {_listed(rising)}{but}.")
    if gain.direction == "rises" and not others and not shrunk:
        advice = "Add another reward to reward_funcs, and 0 for it to reward_weights."
        return Reading("unclear", f"Unclear: {gain}, but there is no held-out reward, so it may be hacking. {advice}")
    facts = [_listed(shrunk)] * bool(shrunk) + [f"held-out {_listed(others)}"] * bool(others)
    return Reading("unclear", "; ".join([f"Unclear: {gain}", *facts]) + f". {LOOK}")


def _curve(name: str, lines: Sequence[Record], key: str, std_key: str, samples_key: str | None = None) -> Curve:
    """Those of the lines with a number; the unit is the typical std at the start or, where that is 0, the largest."""
    lines = [line for line in lines if line.get(key) is not None and math.isfinite(line[key])]
    count, in_evaluation = len(lines), samples_key is not None
    steps, values, stds = (np.array([line[k] for line in lines], dtype=np.float64) for k in ("step", key, std_key))
    unit = float(np.median(stds[: max(1, count // BLOCKS)])) if count else 1.0
    unit = unit or float(stds.max()) or 1.0
    # An evaluation is a part by itself: all are of the same prompts and noise, so a mean of several is no better.
    parts = np.linspace(0, max(0, count - 1), min(BLOCKS, max(1, count))).round().astype(int)[:, None]
    parts = list(parts) if in_evaluation else np.array_split(np.arange(count), len(parts))
    changes = (values - values[parts[0]].mean()) / unit if count else values
    if count < (2 if in_evaluation else FEWEST_ROLLOUTS):
        return Curve(name, steps, changes, in_evaluation)
    means = np.array([changes[part].mean() for part in parts])
    if in_evaluation:
        errors, freedom = np.array([stds[i] / unit / math.sqrt(lines[i][samples_key]) for [i] in parts]), 1e9  # known
    else:
        # A trend within a part counts as scatter, too: this errs towards "no clear change".
        squares = sum(np.square(changes[part] - mean).sum() for part, mean in zip(parts, means, strict=True))
        freedom = count - BLOCKS
        errors = np.sqrt(squares / freedom / np.array([len(part) for part in parts]))
    spans = [(int(steps[part[0]]), int(steps[part[-1]])) for part in parts]
    return Curve(name, steps, changes, in_evaluation, spans, means, errors, freedom)


def _change(curve: Curve, level: float, from_any: bool) -> Change:
    """From the first part to the last one; or, if the last is clearly below another one, from that."""
    sizes = curve.means[-1] - curve.means[:-1]
    widths = t_quantile(curve.freedom, level) * np.hypot(curve.errors[-1], curve.errors[:-1])
    clear = (np.abs(sizes) > widths) & (np.abs(sizes) >= SMALL)
    lower = np.flatnonzero(clear & (sizes < 0))
    start = int(lower[np.argmin(sizes[lower])]) if from_any and len(lower) and lower[0] else 0
    direction = "shows no clear change" if not clear[start] else "rises" if sizes[start] > 0 else "falls"
    since = curve.spans[start][1] if start else None
    return Change(curve.name, direction, float(sizes[start]), float(widths[start]), since)


def _listed(changes: Sequence[Change]) -> str:
    """Two at most, the largest first."""
    largest = sorted(changes, key=lambda change: -abs(change.size))
    more = f" and {len(changes) - 2} more" if len(changes) > 2 else ""
    return " and ".join(str(change) for change in largest[:2]) + more
