"""
What `slas-trl compare` makes of finished arms: tables, curves and sample sheets. A paired difference is of the scores
`(seeds, prompts)` of two arms, whose noise is the same; matched KL is where each run is as far from the base as the
one that went least far.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..evaluation.shapes import SCORES
from ..reports.samples import sample_grid
from ..run_files import SAMPLES, write_text
from ..statistics import Estimate, text_table
from ..statistics import mean_over_seeds_and_prompts as estimate
from .compare_arm import BASE, RESULT, TRAINED


Table = dict[str, list[Estimate]]  # by row, of each measure


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of one arm, with S seeds and T evaluations, of which the first is the base's."""

    label: str
    steps: list[int]
    scores: np.ndarray  # (M, S, T, P) of M measures and P prompts
    kl: np.ndarray  # (S, T)

    def at_kl(self, target: float) -> np.ndarray:
        """Scores `(M, S, P)` where each run first is `target` away, interpolated in the root of the KL."""
        found = []
        for i, distance in enumerate(np.sqrt(np.maximum.accumulate(self.kl, axis=1))):
            after = max(1, int(np.searchsorted(distance, math.sqrt(target))))
            width = distance[after] - distance[after - 1]
            share = min(1.0, (math.sqrt(target) - distance[after - 1]) / width) if width > 0 else 1.0
            found.append((1 - share) * self.scores[:, i, after - 1] + share * self.scores[:, i, after])
        return np.stack(found, axis=1)


def write_report(root: Path, labels: Mapping[str, str], seeds: list[int], command: str) -> str:
    """
    Write `comparison.md`, `.json`, `.png` and `samples.png` into `root`, where the results of the base and of all arms
    are, and return the text of the first. The first arm in `labels` is the one that others are compared with. Raises
    `ValueError` when arms of one seed did not start from the same rollout.
    """
    base = _read(root / BASE)
    results = {arm: [_read(root / arm / f"seed-{seed}") for seed in seeds] for arm in labels}
    for seed, of_arms in zip(seeds, zip(*results.values(), strict=True), strict=True):
        if len({json.dumps(result["first_rollout"]) for result in of_arms}) > 1:
            raise ValueError(
                f"The arms of seed {seed} began with different rollouts, maybe on different devices or numbers of "
                f"threads, and cannot be compared. Remove the folders seed-{seed} in {root} and start again."
            )
    report = Report({arm: _runs(labels[arm], base, results[arm]) for arm in labels}, base)
    write_text(root / "comparison.json", json.dumps(report.numbers(command), indent=2) + "\n")
    text = report.text(command)
    write_text(root / "comparison.md", text + "\n")
    report.draw(root / "comparison.png")
    folders = {BASE: root / BASE} | {label: root / arm / f"seed-{seeds[0]}" for arm, label in labels.items()}
    prompts = base["shown_prompts"]
    images = [Image.open(folder / SAMPLES / f"{i}.png") for folder in folders.values() for i in range(len(prompts))]
    captions = [f"{label}: {prompt}" for label in folders for prompt in prompts]
    sample_grid(images, captions, columns=len(prompts)).save(root / "samples.png")
    return text


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULT).read_text(encoding="utf-8"))


def _runs(label: str, base: dict[str, Any], results: list[dict[str, Any]]) -> Runs:
    steps = sorted(int(step) for step in results[0]["evaluations"])
    runs = [[base["evaluations"]["0"], *(result["evaluations"][str(step)] for step in steps)] for result in results]
    scores = np.array([[[at["scores"][name] for at in run] for run in runs] for name in runs[0][0]["scores"]])
    return Runs(label, [0, *steps], scores, np.array([[at["kl"] for at in run] for run in runs]))


class Report:
    """Tables and curves of the arms `runs`, by name; the first is what the others are compared with."""

    def __init__(self, runs: dict[str, Runs], base: dict[str, Any]):
        self.base, self.first = base, next(iter(runs.values()))
        self.weights: dict[str, float] = {name: w for name, w in base["reward_weights"].items() if w}
        self.trained_as = " + ".join(name if w == 1 else f"{w:g} × {name}" for name, w in self.weights.items())
        names = list(base["evaluations"]["0"]["scores"])
        # Left out, since another measure is the same.
        hidden = {"shapes_verifier", "shapes_verifier_strict"} if SCORES[0] in names else set()
        hidden |= self.weights.keys() if [*self.weights.values()] == [1.0] else set()
        shown = [i for i, name in enumerate(names) if name not in hidden]
        self.measures = [names[i] for i in shown]
        self.runs = {arm: replace(run, scores=run.scores[shown]) for arm, run in runs.items()}
        self.target = float(min(run.kl.max(axis=1).min() for run in runs.values()))
        start = self.first.scores[shown, :, 0]  # (M, S, P)
        final = {run.label: run.scores[:, :, -1] for run in self.runs.values()}
        matched = {run.label: run.at_kl(self.target) for run in self.runs.values()}
        self.tables: dict[str, Table] = {
            "final": _estimates({"base": start} | final),
            "final_differences": self._differences(final),
            "change_from_base": _estimates({label: scores - start for label, scores in final.items()}),
            "at_matched_kl": _estimates({"base": start} | matched),
            "at_matched_kl_differences": self._differences(matched),
        }

    def _differences(self, scores: Mapping[str, np.ndarray]) -> Table:
        """Each arm less the first one, and each with γ less the linear one, so that std and γ are told apart."""
        names, label = list(self.runs), {name: run.label for name, run in self.runs.items()}
        pairs = [(name, names[0]) for name in names[1:]]
        pairs += [(name, "linear") for name in names if name.startswith("slas-") and "linear" in names[1:]]
        return _estimates({f"{label[a]} − {label[b]}": scores[label[a]] - scores[label[b]] for a, b in pairs})

    def numbers(self, command: str) -> dict[str, Any]:
        """For JSON: tables by row and measure, of mean and interval, and curves by arm."""
        arms = {run.label: arm for arm, run in self.runs.items()}
        numbers = {"command": command, "seeds": len(self.first.kl), "prompts": self.base["prompts"]}
        numbers |= {"matched_kl": self.target, "curves": {}}
        for name, table in self.tables.items():
            ends = {row: [[e.mean, e.low, e.high] for e in cells] for row, cells in table.items()}
            numbers[name] = {arms.get(row, row): dict(zip(self.measures, ends[row], strict=True)) for row in ends}
        for arm, run in self.runs.items():
            means = zip(self.measures, np.nanmean(run.scores, axis=3).tolist(), strict=True)  # (M, S, T)
            numbers["curves"][arm] = {"updates": run.steps, "kl": run.kl.tolist(), **dict(means)}
        return json.loads(json.dumps(numbers), parse_constant=lambda constant: None)  # JSON has no NaN

    def text(self, command: str) -> str:
        seeds = len(self.first.kl)
        over = "seeds and prompts" if seeds > 1 else "prompts alone, since there is one seed"
        parts = [
            "# Comparison of advantages",
            f"`{command}`",
            f"Trained on {self.trained_as}. {seeds} seed{'s' * (seeds > 1)}, {len(self.base['prompts'])} "
            f"held-out prompts with {self.base['eval_images_per_prompt']} images each, drawn by the pipeline's own "
            "sampler with the same noise for all. The arms of a seed began with the same rollout. ± is the half width "
            f"of a 95% interval over {over}, by Student's t. KL is to the base, in nats per latent element, mean over "
            "the trained steps.",
            f"## At equal learning rate: after update {self.first.steps[-1]}",
            self._table("final", has_kl=True),
            "### Paired differences",
            self._table("final_differences", spec="+.3f"),
            f"## At matched KL: where each run is {self.target:.2g} away from the base",
            self._table("at_matched_kl"),
            "### Paired differences",
            self._table("at_matched_kl_differences", spec="+.3f"),
            "## Change from the base after the last update",
            self._table("change_from_base", spec="+.3f"),
        ]
        return "\n\n".join(parts)

    def _table(self, name: str, spec: str = ".3f", has_kl: bool = False) -> str:
        kl = {"base": "0"} | {run.label: f"{estimate(run.kl[:, -1:]):.4f}" for run in self.runs.values()}
        table = [["", *["KL"] * has_kl, *self.measures]]
        for row, cells in self.tables[name].items():
            table.append([row, *[kl.get(row, "")] * has_kl, *(f"{cell:{spec}}" for cell in cells)])
        return text_table(table)

    def draw(self, path: Path) -> None:
        """Curves of the arms over updates, with their intervals, and below against KL."""
        shown = self.measures[:5]
        figure = Figure(figsize=(3.2 * (len(shown) + 1), 6.4), dpi=120, layout="constrained")
        axes = figure.subplots(2, len(shown) + 1)
        for number, run in enumerate(self.runs.values()):
            style = {"color": f"C{number}", "label": run.label}
            for column, scores in enumerate(run.scores[: len(shown)]):
                means = _draw_band(axes[0, column], run.steps, scores, style)
                axes[1, column].plot(run.kl.mean(0), means, marker=".", **style)
            _draw_band(axes[0, -1], run.steps, run.kl[:, :, None], style)
        kinds = {TRAINED: self.trained_as.replace(" + ", "\n+ "), **dict.fromkeys(SCORES, "by the verifier")}
        kinds |= dict.fromkeys(self.weights, "part of it")
        for measure, above, below in zip(shown, *axes[:, :-1], strict=True):
            above.set_title(f"{measure}\n({kinds.get(measure, 'held out')})", fontsize=10)
            # Distances grow with the root of the KL, and arms may differ by orders of magnitude.
            below.set_xscale("function", functions=(np.sqrt, np.square))
            below.xaxis.set_major_locator(MaxNLocator(4))
            below.set(xlabel="KL to the base (nats per element)", xlim=(0, None))
            below.axvline(self.target, color="gray", lw=0.8, ls=":")
        axes[0, -1].set_title("KL to the base", fontsize=10)
        axes[1, -1].set_axis_off()
        axes[1, -1].legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="upper left")
        axes[0, 0].set(ylabel="held-out prompts")
        for each in axes[0]:
            each.set(xlabel="updates")
        for each in axes.flat:
            each.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)


def _estimates(scores: Mapping[str, np.ndarray]) -> Table:
    return {row: [estimate(values) for values in each] for row, each in scores.items()}


def _draw_band(axis: Any, steps: list[int], values: np.ndarray, style: dict[str, str]) -> Sequence[float]:
    """Means and intervals of `(S, T, P)` over the updates; returns the means."""
    bands = [estimate(values[:, t]) for t in range(values.shape[1])]
    means, low, high = zip(*((band.mean, band.low, band.high) for band in bands), strict=True)
    axis.plot(steps, means, **style)
    axis.fill_between(steps, low, high, color=style["color"], alpha=0.12, lw=0)
    return means
