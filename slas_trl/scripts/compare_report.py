"""
What `slas-trl compare` makes of finished arms: tables, curves and sample sheets.

    score of an arm         V, (seeds, prompts): mean over the images of a prompt
    mean and interval       of V, for other seeds and other prompts, see `statistics.mean_over_seeds_and_prompts`
    paired difference       the same of V_arm - V_other: seeds, prompts and noise are the same in both
    matched KL              V at the update where each run is as far from the base as the run that went least far
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..evaluation.shapes import SCORES
from ..reports.samples import sample_grid
from ..run_files import SAMPLES
from ..statistics import Estimate, text_table
from ..statistics import mean_over_seeds_and_prompts as estimate
from .compare_arm import BASE, RESULT, TRAINED


Scores = dict[str, np.ndarray]  # by measure: (S, P) of S seeds and P prompts
Table = dict[str, dict[str, Estimate]]  # by row and measure


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of one arm: scores `(S, T, P)` of S seeds at T evaluations, of which the first is the base's."""

    label: str
    steps: list[int]
    scores: Scores
    kl: np.ndarray  # (S, T)
    seconds: np.ndarray  # (S,) of training, without evaluations

    def at_kl(self, target: float) -> Scores:
        """
        Scores `(S, P)` where each run first is `target` away from the base, interpolated between evaluations: linearly
        in the distance, which is the root of the KL.
        """
        places = []
        for distance in np.sqrt(np.maximum.accumulate(self.kl, axis=1)):
            after = max(1, int(np.searchsorted(distance, math.sqrt(target))))
            width = distance[after] - distance[after - 1]
            share = (math.sqrt(target) - distance[after - 1]) / width if width > 0 else 1.0
            places.append((after, min(1.0, share)))
        return {
            name: np.stack([(1 - w) * run[i - 1] + w * run[i] for run, (i, w) in zip(values, places, strict=True)])
            for name, values in self.scores.items()
        }


def write_report(root: Path, labels: Mapping[str, str], seeds: list[int], command: str) -> str:
    """
    Write `comparison.md`, `.json`, `.png` and `samples.png` into `root`.

    Args:
        root (`Path`): with the results of the base and of every arm and seed.
        labels (`Mapping[str, str]`): of the arms, by name; the first is what the others are compared with.
        seeds (`list[int]`): of each arm.
        command (`str`): that makes this comparison.

    Returns:
        `str`: the text of `comparison.md`.

    Raises:
        `ValueError`: when arms of one seed did not start from the same rollout.
    """
    base = _read(root / BASE)
    results = {arm: [_read(root / arm / f"seed-{seed}") for seed in seeds] for arm in labels}
    for seed, of_arms in zip(seeds, zip(*results.values(), strict=True), strict=True):
        if len({json.dumps(result["first_rollout"]) for result in of_arms}) > 1:
            raise ValueError(
                f"The arms of seed {seed} began with different rollouts, so they cannot be compared. Were they run on "
                f"different devices or numbers of threads? Remove the folders seed-{seed} in {root} and start again."
            )
    report = Report({arm: _runs(labels[arm], base, results[arm]) for arm in labels}, base)
    (root / "comparison.json").write_text(json.dumps(report.numbers(command), indent=2) + "\n", encoding="utf-8")
    text = report.text(command)
    (root / "comparison.md").write_text(text + "\n", encoding="utf-8")
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
    scores = {name: np.array([[at["scores"][name] for at in run] for run in runs]) for name in runs[0][0]["scores"]}
    kl, seconds = np.array([[at["kl"] for at in run] for run in runs]), np.array([r["seconds"] for r in results])
    return Runs(label, [0, *steps], scores, kl, seconds)


class Report:
    """Tables and curves of the arms `runs`, by name; the first is what the others are compared with."""

    def __init__(self, runs: dict[str, Runs], base: dict[str, Any]):
        self.runs, self.base = runs, base
        self.seeds = len(next(iter(runs.values())).kl)
        self.start: Scores = {name: np.array(v) for name, v in base["evaluations"]["0"]["scores"].items()}  # (P,) each
        self.weights: dict[str, float] = {name: w for name, w in base["reward_weights"].items() if w}
        # Left out because another measure is the same: the only trained reward, and rewards that the verifier is.
        hidden = {"shapes_verifier", "shapes_verifier_strict"} if SCORES[0] in self.start else set()
        hidden |= self.weights.keys() if [*self.weights.values()] == [1.0] else set()
        self.measures: list[str] = [name for name in self.start if name not in hidden]
        self.trained_as = " + ".join(name if w == 1 else f"{w:g} × {name}" for name, w in self.weights.items())
        self.target = float(min(run.kl.max(axis=1).min() for run in runs.values()))
        final = {arm: {name: values[:, -1] for name, values in run.scores.items()} for arm, run in runs.items()}
        matched = {arm: run.at_kl(self.target) for arm, run in runs.items()}
        self.tables: dict[str, Table] = {
            "final": self._estimates(final),
            "final_differences": self._differences(final),
            "change_from_base": self._estimates({arm: _minus(scores, self.start) for arm, scores in final.items()}),
            "at_matched_kl": self._estimates(matched),
            "at_matched_kl_differences": self._differences(matched),
        }

    def _estimates(self, scores: Mapping[str, Scores]) -> Table:
        return {row: {m: estimate(values[m]) for m in self.measures} for row, values in scores.items()}

    def _differences(self, scores: Mapping[str, Scores]) -> Table:
        """Each arm less the first one, and each with γ less the linear one, so that std and γ are told apart."""
        names, label = list(self.runs), {name: run.label for name, run in self.runs.items()}
        pairs = [(name, names[0]) for name in names[1:]]
        pairs += [(name, "linear") for name in names if name.startswith("slas-") and "linear" in names[1:]]
        return self._estimates({f"{label[a]} − {label[b]}": _minus(scores[a], scores[b]) for a, b in pairs})

    def numbers(self, command: str) -> dict[str, Any]:
        """All of it, for JSON."""
        numbers = {
            "command": command,
            "seeds": self.seeds,
            "prompts": self.base["prompts"],
            "matched_kl": self.target,
            **{
                name: {row: {m: [e.mean, e.low, e.high] for m, e in cells.items()} for row, cells in table.items()}
                for name, table in self.tables.items()
            },
            "curves": {
                name: {
                    "updates": run.steps,
                    "kl": run.kl.tolist(),
                    "seconds": run.seconds.tolist(),
                    **{m: np.nanmean(run.scores[m], axis=2).tolist() for m in self.measures},
                }
                for name, run in self.runs.items()
            },
        }
        return json.loads(json.dumps(numbers), parse_constant=lambda constant: None)  # JSON has no NaN

    def text(self, command: str) -> str:
        over = "seeds and prompts" if self.seeds > 1 else "prompts alone, since there is one seed"
        parts = [
            "# Comparison of advantages",
            f"`{command}`",
            f"Trained on {self.trained_as}. {self.seeds} seed{'s' * (self.seeds > 1)}, {len(self.base['prompts'])} "
            f"held-out prompts with {self.base['eval_images_per_prompt']} images each, drawn by the pipeline's own "
            "sampler with the same noise for all. The arms of a seed began with the same rollout. ± is the half width "
            f"of a 95% interval over {over}, by Student's t. KL is to the base, in nats per latent element, mean over "
            "the trained steps.",
            f"## At equal learning rate: after update {next(iter(self.runs.values())).steps[-1]}",
            self._table("final", has_kl=True),
            "### Paired differences",
            self._table("final_differences", spec="+.3f"),
            f"## At matched KL: where each run is {self.target:.2g} away from the base",
            self._table("at_matched_kl"),
            "### Paired differences",
            self._table("at_matched_kl_differences", spec="+.3f"),
            "## Change from the base after the last update",
            self._table("change_from_base", spec="+.3f"),
            "## Cost",
            "\n".join(
                f"* {run.label}: {run.seconds.mean():.0f} s of training for each seed "
                f"[{run.seconds.min():.0f}, {run.seconds.max():.0f}]"
                for run in self.runs.values()
            ),
        ]
        return "\n\n".join(parts)

    def _table(self, name: str, spec: str = ".3f", has_kl: bool = False) -> str:
        """Of scores, over which the base's are, or of differences."""
        rows, labels = dict(self.tables[name]), {arm: run.label for arm, run in self.runs.items()}
        kl = {arm: f"{estimate(run.kl[:, -1:]):.4f}" for arm, run in self.runs.items()} | {BASE: "0"}
        if spec == ".3f":
            rows = self._estimates({BASE: {m: np.tile(v, (self.seeds, 1)) for m, v in self.start.items()}}) | rows
        table = [["", *["KL"] * has_kl, *self.measures]]
        for row, cells in rows.items():
            table.append([labels.get(row, row), *[kl.get(row, "")] * has_kl, *(f"{e:{spec}}" for e in cells.values())])
        return text_table(table)

    def draw(self, path: Path) -> None:
        """Curves of the arms over updates, with their intervals, and below against KL."""
        shown = self.measures[:5]
        figure = Figure(figsize=(3.2 * (len(shown) + 1), 6.4), dpi=120, layout="constrained")
        axes = figure.subplots(2, len(shown) + 1)
        for number, run in enumerate(self.runs.values()):
            style = {"color": f"C{number}", "label": run.label}
            for column, measure in enumerate(shown):
                mean = _draw_band(axes[0, column], run.steps, run.scores[measure], style)
                axes[1, column].plot(run.kl.mean(0), mean, marker=".", **style)
            _draw_band(axes[0, -1], run.steps, run.kl[:, :, None], style)
        kinds = {TRAINED: self.trained_as.replace(" + ", "\n+ "), **dict.fromkeys(SCORES, "by the verifier")}
        kinds |= dict.fromkeys(self.weights, "part of it")
        for column, measure in enumerate(shown):
            axes[0, column].set_title(f"{measure}\n({kinds.get(measure, 'held out')})", fontsize=10)
            axes[0, column].set(xlabel="updates", ylabel="held-out prompts" if column == 0 else "")
            axes[1, column].set(xlabel="KL to the base (nats per element)")
            # Distances grow with the root of the KL, and arms may differ by orders of magnitude.
            axes[1, column].set_xscale("function", functions=(np.sqrt, np.square))
            axes[1, column].xaxis.set_major_locator(MaxNLocator(4))
            axes[1, column].set_xlim(left=0)
            axes[1, column].axvline(self.target, color="grey", lw=0.8, ls=":")
        axes[0, -1].set_title("KL to the base", fontsize=10)
        axes[0, -1].set(xlabel="updates")
        axes[1, -1].set_axis_off()
        axes[1, -1].legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="upper left")
        for each in axes.flat:
            each.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)


def _minus(scores: Scores, others: Scores) -> Scores:
    return {name: scores[name] - others[name] for name in scores}


def _draw_band(axis: Any, steps: list[int], values: np.ndarray, style: dict[str, str]) -> list[float]:
    """Means and intervals of `(S, T, P)` over the updates; returns the means."""
    bands = [estimate(values[:, t]) for t in range(values.shape[1])]
    means = [band.mean for band in bands]
    axis.plot(steps, means, **style)
    ends = [band.low for band in bands], [band.high for band in bands]
    axis.fill_between(steps, *ends, color=style["color"], alpha=0.12, lw=0)
    return means
