"""
Are the advantages calibrated, and is the reward being hacked? What `calibration.jsonl` tells of a run, as numbers.

Section 4 of "Power Reinforcement Post-Training of Text-to-Image Models with Super-Linear Advantage Shaping": divided
by its own std, a group whose images hardly differ pushes as hard as one with real differences, and noise is learned as
if it were signal. [`share_by_std`] shows who pushes. Whether what is learned is wanted, only a reward that is not
trained on can tell: [`reward_curves`] and [`read_rewards`].
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit


CALIBRATION_FILE = "calibration.jsonl"
NARROW = 0.3  # the narrowest groups: this share of those that differ at all
BLOCKS = 5  # parts of a run, whose means are compared
FEWEST_ROLLOUTS = 2 * BLOCKS
SMALL = 0.1  # a smaller change, in initial std between images, is none to speak of


def read_rollouts(path: str | Path) -> list[dict[str, Any]]:
    """
    The lines of a run's `calibration.jsonl`, by step. Of a rollout that was sampled twice, by a run that was killed
    and resumed, the last line counts; half a line does not. Raises `ValueError` if there is no whole line.
    """
    rollouts = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        rollouts[record["step"]] = record
    if not rollouts:
        raise ValueError(f"{path} holds no rollout; a run with log_completions writes a line for each.")
    return [rollouts[step] for step in sorted(rollouts)]


def share_by_std(
    stds: Sequence[Sequence[float | None]], advantages: Sequence[Sequence[float]], edges: Sequence[float]
) -> np.ndarray:
    """
    Share of Σ|A| that groups get between quantiles of their std.

    Groups of several rollouts are pooled, each std relative to its rollout's mean: what counts is how narrow a group
    is among those that it was trained with. A group without any difference gets nothing by any method, and would hide
    what the others get: it is left out. Groups of equal std share alike, and one across an edge counts on both sides
    in proportion, so 10 deciles of 12 groups are well defined.

    Args:
        stds (`Sequence[Sequence[float | None]]`): By rollout, std of each group; `None` or NaN is no score.
        advantages (`Sequence[Sequence[float]]`): The same groups' Σ|A|.
        edges (`Sequence[float]`): Quantiles in [0, 1], rising; `np.linspace(0, 1, 11)` for deciles.

    Returns an array of `len(edges) - 1` shares; NaN where no group has a std, or none an advantage.
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
    return float(share_by_std([std], [advantages], (0, NARROW))[0])


@dataclass(frozen=True, eq=False)
class Curve:
    """A reward over training. Arrays are of shape `(n,)`."""

    name: str
    steps: np.ndarray
    values: np.ndarray  # means over images, in units of the reward
    unit: float  # std between images at the start
    errors: np.ndarray | None = None  # standard errors; `None`: to be taken from the scatter between rollouts

    @property
    def parts(self) -> list[np.ndarray]:
        """
        Places of the run in at most five parts, of which the first is the start. One evaluation is a part: averaging
        would say too much of its error, for evaluations draw the same prompts from the same noise.
        """
        places = np.arange(len(self.values))
        if self.errors is None:
            return np.array_split(places, min(BLOCKS, max(1, len(places))))
        chosen = np.linspace(0, len(places) - 1, min(BLOCKS, len(places))).round().astype(int)
        return [places[i : i + 1] for i in chosen]

    @property
    def changes(self) -> np.ndarray:
        """From the start, in std between images then."""
        return (self.values - self.values[self.parts[0]].mean()) / self.unit

    def blocks(self) -> "Blocks | None":
        """Means of the parts; `None` if there are too few rollouts, or evaluations, to compare them."""
        if len(self.values) < (FEWEST_ROLLOUTS if self.errors is None else 2):
            return None
        parts, changes = self.parts, self.changes
        means = np.array([changes[part].mean() for part in parts])
        if self.errors is not None:
            errors, freedom = self.errors[np.concatenate(parts)] / self.unit, 1e9  # known, as good as
        else:
            # Prompts differ from rollout to rollout. What the mean moves within a part counts as scatter too, so this
            # errs towards "no clear change".
            squares = sum(np.square(changes[part] - mean).sum() for part, mean in zip(parts, means, strict=True))
            freedom = len(changes) - BLOCKS
            errors = np.sqrt(squares / freedom / np.array([len(part) for part in parts]))
        spans = [(int(self.steps[part[0]]), int(self.steps[part[-1]])) for part in parts]
        return Blocks(spans, means, errors, freedom)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Means of parts of a run, relative to the first one's, in std between images at the start."""

    spans: list[tuple[int, int]]  # first and last step
    means: np.ndarray
    errors: np.ndarray  # standard errors
    freedom: float  # degrees of freedom of the errors

    def quantile(self, level: float) -> float:
        """Standard errors that a mean exceeds by chance with this probability, in one direction."""
        return float(stdtrit(self.freedom, 1 - level))


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
    """What the rewards of a run say."""

    # "likely hacking", "losing", "mixed", "healthy", "overfitting", "unclear", "no held-out reward" or "too short"
    verdict: str
    text: str


def reward_curves(
    rollouts: Sequence[Mapping[str, Any]], metrics: Mapping[int, Mapping[str, float]]
) -> tuple[Curve, list[Curve], list[Curve]]:
    """
    Curves of the trained reward (the weighted sum); of the held-out ones, which have weight 0, on the rollouts and in
    evaluation; and of the trained one in evaluation. Those without a number are left out.

    Args:
        rollouts (`Sequence[Mapping[str, Any]]`): From [`read_rollouts`].
        metrics (`Mapping[int, Mapping[str, float]]`): Metrics by step, from [`~slas_trl.reporting.read_metrics`].
    """
    trained = _curve_of_rollouts("trained reward", rollouts, "reward", "reward_std_of_images")
    weights = rollouts[-1]["weights"]
    names = [name for name, weight in weights.items() if not weight]
    held_out = [_curve_of_rollouts(name, rollouts, f"rewards/{name}/mean", f"rewards/{name}/std") for name in names]
    evaluated = []
    for key in dict.fromkeys(key for record in metrics.values() for key in record):
        if match := re.fullmatch(r"eval_(?:(.+)_)?rewards/([^/]+)/mean", key):
            if not weights.get(match[2]):
                held_out.append(_curve_of_evaluations(f"{match[2]} in evaluation", match[1], metrics, key))
        elif match := re.fullmatch(r"eval_(?:(.+)_)?reward", key):
            evaluated.append(_curve_of_evaluations("trained reward in evaluation", match[1], metrics, key))
    known = [[curve for curve in curves if len(curve.values)] for curves in (held_out, evaluated)]
    return trained, known[0], known[1]


def read_rewards(trained: Curve, held_out: Sequence[Curve], evaluated: Sequence[Curve]) -> Reading:
    """
    Whether what was trained is what was wanted, as far as these rewards can tell.

    The means of the last fifth of the run and of its first are compared by a t-test, 5% of which is divided among all
    comparisons (Bonferroni). A held-out reward falls too if it is below any other earlier fifth: hacking often begins
    with a gain. Changes below a tenth of the initial std between images count as none. None of it is proof: a held-out
    reward can fall for good reasons, and one that rises may be hacked with the other.
    """
    curves = [trained, *held_out, *evaluated]
    blocks = trained.blocks()
    if blocks is None:
        few = "1 rollout is" if len(trained.values) == 1 else f"{len(trained.values)} rollouts are"
        return Reading("too short", f"{few} too few to tell; it takes {FEWEST_ROLLOUTS}.")
    level = 0.05 / 2 / (BLOCKS - 1) / len(curves)
    change = _change(trained.name, blocks, level, from_any=False)
    others, elsewhere = (
        [_change(c.name, part, level, from_any=True) for c in group if (part := c.blocks()) is not None]
        for group in (held_out, evaluated)
    )
    falling = [c for c in others if c.direction == "falls"]
    rising = [c for c in others if c.direction == "rises"]
    shrunk = [c for c in elsewhere if c.direction == "falls"]
    if change.direction != "rises" and falling and not rising:
        # Hacking too, as a rule: of one part of the reward, at the cost of the others.
        return Reading("losing", f"Losing: held-out {_listed(falling)}, and {change}. Look at the samples.")
    if change.direction != "rises":
        return Reading("unclear", f"No clear gain so far: {change}.")
    if falling and rising:
        text = f"Possible hacking: {change} while held-out {_listed(falling)}, though {_listed(rising)}."
        return Reading("mixed", f"{text} Look at the samples.")
    if falling:
        text = f"Likely hacking: {change} while held-out {_listed(falling)}. Look at the samples."
        return Reading("likely hacking", text)
    if shrunk:
        return Reading("overfitting", f"Likely overfitting: {change} while {_listed(shrunk)}.")
    if rising:
        unmoved = [c for c in others if c not in rising]
        but = f"; {_listed(unmoved)}" if unmoved else ""
        return Reading("healthy", f"Healthy: {change} and held-out {_listed(rising)}{but}.")
    if others:
        text = f"Unclear: {change}, but held-out {_listed(others)}. Neither hacking nor a real gain is shown."
        return Reading("unclear", text)
    return Reading(
        "no held-out reward",
        f"No telling: {change}, but there is no held-out reward, so it may be hacking. Add another reward to "
        "reward_funcs, and 0 for it to reward_weights.",
    )


def _curve_of_rollouts(name: str, rollouts: Sequence[Mapping[str, Any]], key: str, std_key: str) -> Curve:
    points = [(r["step"], r[key], r[std_key]) for r in rollouts if r.get(key) is not None]
    steps, values, stds = np.array(points, dtype=np.float64).reshape(-1, 3).T
    first = stds[: max(1, len(stds) // BLOCKS)]
    return Curve(name, steps, values, _unit(first, stds))


def _curve_of_evaluations(
    name: str, data_set: str | None, metrics: Mapping[int, Mapping[str, float]], key: str
) -> Curve:
    std_key = f"{key.removesuffix('/mean')}/std" if key.endswith("/mean") else f"{key}_std"
    samples_key = f"eval_{data_set}_samples" if data_set else "eval_samples"
    points = [
        (step, record[key], record[std_key], record[samples_key])
        for step, record in metrics.items()
        if key in record and math.isfinite(record[key])
    ]
    steps, values, stds, samples = np.array(points, dtype=np.float64).reshape(-1, 4).T
    label = f"{name} on {data_set}" if data_set else name
    return Curve(label, steps, values, _unit(stds[:1], stds), stds / np.sqrt(samples))


def _unit(first: np.ndarray, stds: np.ndarray) -> float:
    """The typical std at the start; a reward that showed no difference then has that of its largest one."""
    for unit in (np.median(first) if len(first) else 0.0, stds.max(initial=0.0)):
        if unit > 0:
            return float(unit)
    return 1.0


def _change(name: str, blocks: Blocks, level: float, from_any: bool) -> Change:
    """From the first block to the last one; or, if the last is clearly below another one, from that."""
    sizes = blocks.means[-1] - blocks.means[:-1]
    widths = blocks.quantile(level) * np.hypot(blocks.errors[-1], blocks.errors[:-1])
    clear = (np.abs(sizes) > widths) & (np.abs(sizes) >= SMALL)
    lower = np.flatnonzero(clear & (sizes < 0)) if from_any else np.flatnonzero(clear[:1] & (sizes[:1] < 0))
    start = 0
    if len(lower):
        start = 0 if lower[0] == 0 else int(lower[np.argmin(sizes[lower])])
    direction = "shows no clear change" if not clear[start] else "rises" if sizes[start] > 0 else "falls"
    since = blocks.spans[start][1] if start else None
    return Change(name, direction, float(sizes[start]), float(widths[start]), since)


def _listed(changes: Sequence[Change]) -> str:
    """Two at most, the largest first."""
    largest = sorted(changes, key=lambda change: -abs(change.size))
    more = f" and {len(changes) - 2} more" if len(changes) > 2 else ""
    return " and ".join(str(change) for change in largest[:2]) + more
