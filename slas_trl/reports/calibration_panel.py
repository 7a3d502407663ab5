"""The calibration panel: `calibration.png`, four pictures of what [`~slas_trl.reports.calibration`] finds in a run."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..run_files import CALIBRATION, METRICS, read_steps
from ..statistics import t_quantile
from .calibration import NARROW_SHARE, Curve, Reading, Record, read_rewards, read_rollouts, reward_curves, share_by_std


# Text on the fourth picture, and the paper behind it.
COLORS = {"hacking": ("#8b1a1a", "#fbe9e7"), "healthy": ("#1b5e20", "#e8f5e9")}
LETTERS = 88  # on a line over a picture
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9}


def plot_calibration(
    calibration_path: str | Path, metrics_path: str | Path | None = None, output_path: str | Path | None = None
) -> Reading:
    """
    Draw a run's calibration panel, while the run goes on or after it was killed: who pushes, what counts of a rollout,
    how much the rewards of one prompt differ, and whether the gain is real. Each picture says how to read it.

    Args:
        calibration_path (`str` or `Path`): A run's `calibration.jsonl`.
        metrics_path (`str` or `Path`, *optional*): Its `metrics.jsonl`; by default the one beside it, if any.
        output_path (`str` or `Path`, *optional*): The picture; by default `calibration.png` in the same folder.

    Returns the [`~slas_trl.reports.calibration.Reading`] of the fourth picture.
    """
    calibration_path = Path(calibration_path)
    rollouts = read_rollouts(calibration_path)
    metrics_path = Path(metrics_path or calibration_path.with_name(METRICS))
    curves = reward_curves(rollouts, read_steps(metrics_path) if metrics_path.is_file() else [])
    reading = read_rewards(*curves)

    figure = Figure(figsize=(13, 10.5), dpi=100)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.06, top=0.86, wspace=0.16, hspace=0.46)
    gammas = sorted({record["gamma"] for record in rollouts})
    gamma = f"{gammas[0]:g}" if len(gammas) == 1 else f"{gammas[0]:.2g} to {gammas[-1]:.2g}"
    groups = sum(len(record["group_std"]) for record in rollouts)
    title = f"Calibration: scale_rewards={rollouts[-1]['scale_rewards']}, γ = {gamma}   "
    title += f"({len(rollouts)} rollouts, {groups} groups)"
    figure.suptitle(title, x=0.06, y=0.975, ha="left", fontsize=14, fontweight="bold")
    *axes, last = figure.subplots(2, 2).flatten()
    for draw, where in zip((_draw_deciles, _draw_shares, _draw_widths), axes, strict=True):
        draw(where, rollouts)
    _draw_rewards(last, *curves, reading)
    figure.savefig(output_path or calibration_path.with_name(CALIBRATION))
    return reading


def _frame(axes: Axes, title: str, how_to_read: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", pad=44)
    text, place = textwrap.fill(how_to_read, LETTERS), ("axes fraction", "offset points")
    axes.annotate(text, (0, 1), (0, 40), *place, va="top", fontsize=9, color="#444444")
    axes.set(xlabel=x, ylabel=y, axisbelow=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if x == "step":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if y.startswith("share"):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _empty(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", color="gray")
    axes.set_yticks([])


def _draw_deciles(axes: Axes, rollouts: Sequence[Record]) -> None:
    title = "Who pushes? Share of Σ|A| by reward std of the group"
    stds, pushes = ([record[key] for record in rollouts] for key in ("group_std", "group_abs_advantage"))
    edges = np.linspace(0, 1, 11).tolist()
    shares = share_by_std(stds, pushes, edges)
    if np.isnan(shares).any():
        _frame(axes, title, "No group had a difference to learn from.", "", "")
        _empty(axes, "all advantages are 0")
        return
    [narrow], [wide] = (share_by_std(stds, pushes, ends) for ends in ((0, NARROW_SHARE), (1 - NARROW_SHARE, 1)))
    differ = sum((std or 0) > 0 for group in stds for std in group)
    _frame(
        axes,
        title,
        f"The narrowest 30% of the groups get {narrow:.0%}, the widest 30% get {wide:.0%}. Bars along the dashed "
        "line: small differences, which may be noise, push like large ones. Rising bars: large differences decide.",
        f"decile of the std, relative to its rollout's; 1 is narrowest ({differ} groups that differ)",
        "share of Σ|A|",
    )
    linear = share_by_std(stds, [[std or 0.0 for std in group] for group in stds], edges)
    places = np.arange(1, 11)
    axes.bar(places, shares, color="C0", width=0.82, label="this run")
    axes.axhline(0.1, color="C3", ls="--", lw=1.8, label="10% each: group std, noise like signal")
    axes.plot(places, linear, color="#222222", ls=":", marker=".", lw=1.5, label="as the std: batch std with γ = 0")
    axes.set_xticks(places, [f"{place}\n{share:.1%}" for place, share in zip(places, shares, strict=True)])
    axes.set_ylim(0, max(0.2, 1.15 * float(max(shares.max(), linear.max()))))
    axes.legend(loc="upper left", **LEGEND)


def _draw_shares(axes: Axes, rollouts: Sequence[Record]) -> None:
    _frame(
        axes,
        "What counts of a rollout?",
        "Groups without any difference teach nothing: many of them ask for other prompts. Effective share below 10%: "
        "a few images decide, lower γ. Cut images: advantage_clip takes back some of the shaping.",
        "step",
        "share",
    )
    steps = np.array([record["step"] for record in rollouts])
    for key, label, color in (
        ("advantages/effective_share", "effective share of the images", "C0"),
        ("frac_reward_zero_std", "groups without any difference", "C1"),
        ("advantages/clip_fraction", "images cut by advantage_clip", "C3"),
    ):
        values = np.array([record[key] for record in rollouts], dtype=np.float64)
        _draw_smoothed(axes, steps, values, color, f"{label}: {values.mean():.1%} on average")
    axes.set(ylim=(-0.02, 1.3), yticks=np.linspace(0, 1, 6))
    axes.legend(loc="upper left", **LEGEND)


def _draw_widths(axes: Axes, rollouts: Sequence[Record]) -> None:
    _frame(
        axes,
        "How much do the rewards of one prompt differ?",
        "Std of the trained reward within each group. A peak near 0: prompts that are always solved, always failed, "
        "or whose images the reward cannot tell apart. min_group_std leaves out the groups below it.",
        "reward std within a group, in units of the reward",
        "share of the groups",
    )
    middle = -(-len(rollouts) // 2)
    halves = [half for half in (rollouts[:middle], rollouts[middle:]) if half]
    widths = [np.array([std for record in half for std in record["group_std"] if std is not None]) for half in halves]
    everything = np.concatenate(widths)
    if not len(everything):
        _empty(axes, "no group had two scores")
        return
    end = max(float(np.quantile(everything, 0.995)), 1e-9)
    bins = np.linspace(0, end, 1 + int(np.clip(len(everything) ** 0.5, 8, 30))).tolist()
    for half, stds, color in zip(halves, widths, ("C0", "C1"), strict=False):
        if len(stds):
            label = f"steps {half[0]['step']} to {half[-1]['step']}, median {np.median(stds):.3g}"
            weights, style = np.full(len(stds), 1 / len(stds)), {"ec": color, "fc": (color, 0.25), "lw": 2}
            axes.hist(stds.clip(max=end), bins, weights=weights, histtype="stepfilled", label=label, **style)
    axes.set(xlim=(0, end), ylim=(0, 1.25 * axes.get_ylim()[1]))
    zero = (everything == 0).mean()
    axes.legend(loc="upper right", title=f"{zero:.1%} of all groups are at 0", ncols=2, **LEGEND)


def _draw_rewards(
    axes: Axes, trained: Curve, held_out: Sequence[Curve], evaluated: Sequence[Curve], reading: Reading
) -> None:
    _frame(
        axes,
        "Is the gain real? Trained and held-out rewards",
        "A real gain lifts both. Hacking looks like this: trained up, held-out down. Points are means over fifths of "
        "the run with 95% intervals; thin lines are single rollouts, squares evaluations.",
        "step",
        "change from the start (1 = std between images then)",
    )
    curves = [(trained, "C0", trained.name)]
    curves += [(curve, f"C{1 + i % 9}", f"held-out: {curve.name}") for i, curve in enumerate(held_out)]
    curves += [(curve, "#222222", curve.name) for curve in evaluated]
    for curve, color, label in curves:
        if len(curve.steps):
            _draw_curve(axes, curve, color, label)
    axes.axhline(0, color="#888888", lw=0.8)
    # Room for the legend above and the reading below, whatever the curves do.
    text = textwrap.fill(reading.text, LETTERS - 8)
    low, high = axes.get_ylim()
    below, above = 0.07 * (2 + text.count("\n")), 0.07 * (1 + -(-len(curves) // 2))
    axes.set_ylim(low - below * (high - low), high + above * (high - low))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", ncols=2, **LEGEND)
    color, paper = COLORS.get(reading.verdict, ("#333333", "#f0f0f0"))
    box = {"facecolor": paper, "edgecolor": color, "boxstyle": "round,pad=0.5"}
    place = {"transform": axes.transAxes, "ha": "center", "va": "bottom"}
    axes.text(0.5, 0.03, text, **place, fontsize=9.5, color=color, bbox=box)


def _draw_curve(axes: Axes, curve: Curve, color: str, label: str) -> None:
    if curve.in_evaluation:
        axes.plot(curve.steps, curve.changes, color=color, lw=1.5, ls="--", marker="s", ms=5, label=label)
    elif not curve.spans:
        _draw_smoothed(axes, curve.steps, curve.changes, color, label)
    else:
        axes.plot(curve.steps, curve.changes, color=color, lw=0.8, alpha=0.35)
        middles = [(first + last) / 2 for first, last in curve.spans]
        bars = t_quantile(curve.freedom) * curve.errors
        axes.errorbar(middles, curve.means, bars, color=color, lw=2, marker="o", ms=6, capsize=4, label=label)


def _draw_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    """Values, and over them their running mean over about a tenth of the run, over fewer values at its ends."""
    reach = len(values) // 20
    smooth = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))]
    axes.plot(steps, values, color=color, lw=0.8, alpha=0.35)
    axes.plot(steps, smooth, color=color, lw=2, marker="o" if len(steps) < 10 else None, ms=4, label=label)
