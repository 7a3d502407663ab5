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
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..evaluation.shapes import SCORES
from ..reports.samples import sample_grid
from ..run_files import METRICS, SAMPLES, read_steps
from ..statistics import Estimate, evenly_spaced, text_table
from ..statistics import mean_over_seeds_and_prompts as estimate
from .compare_arm import BASE, RESULT


TRAINED = "trained reward"
SHEET_COLUMNS = 6

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
    rewards: dict[int, list[float]]  # of the rollouts, by update: one of each seed

    @cached_property
    def final(self) -> Scores:
        """Scores `(S, P)` after the last update."""
        return {name: values[:, -1] for name, values in self.scores.items()}

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
    folders = {arm: [root / arm / f"seed-{seed}" for seed in seeds] for arm in labels}
    results = {arm: [_read(folder) for folder in folders[arm]] for arm in labels}
    for seed, of_arms in zip(seeds, zip(*results.values(), strict=True), strict=True):
        if len({json.dumps(result["first_rollout"]) for result in of_arms}) > 1:
            raise ValueError(
                f"The arms of seed {seed} began with different rollouts, so they cannot be compared. Were they run on "
                f"different devices or numbers of threads? Remove the folders seed-{seed} in {root} and start again."
            )
    report = Report({arm: _runs(labels[arm], base, results[arm], folders[arm]) for arm in labels}, base)
    (root / "comparison.json").write_text(json.dumps(report.numbers(command), indent=2) + "\n", encoding="utf-8")
    text = report.text(command)
    (root / "comparison.md").write_text(text + "\n", encoding="utf-8")
    report.draw(root / "comparison.png")
    rows = {BASE: root / BASE} | {labels[arm]: folders[arm][0] for arm in labels}
    _sheet(rows, base["shown_prompts"]).save(root / "samples.png")
    return text


def _read(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    weights = result["reward_weights"]
    for evaluation in result["evaluations"].values():
        scores = evaluation["scores"]
        weighted = np.stack([w * np.array(scores[name], dtype=float) for name, w in weights.items() if w])
        # A missing score is left out, unless there is no other.
        total = np.where(np.isnan(weighted).all(axis=0), math.nan, np.nansum(weighted, axis=0))
        evaluation["scores"] = {TRAINED: total, **{name: np.array(v, dtype=float) for name, v in scores.items()}}
    return result


def _runs(label: str, base: dict[str, Any], results: list[dict[str, Any]], folders: list[Path]) -> Runs:
    steps = sorted(int(step) for step in results[0]["evaluations"])
    start = base["evaluations"]["0"]["scores"]
    scores = {
        name: np.stack([[start[name], *(r["evaluations"][str(t)]["scores"][name] for t in steps)] for r in results])
        for name in start
    }
    kl = np.array([[0.0, *(r["evaluations"][str(t)]["kl"] for t in steps)] for r in results])
    rewards: dict[int, list[float]] = {}
    for line in (line for folder in folders for line in read_steps(folder / METRICS) if "reward" in line):
        rewards.setdefault(line["step"], []).append(line["reward"])
    return Runs(label, [0, *steps], scores, kl, np.array([r["seconds"] for r in results]), rewards)


class Report:
    """Tables and curves of the arms `runs`, by name; the first is what the others are compared with."""

    def __init__(self, runs: dict[str, Runs], base: dict[str, Any]):
        self.runs, self.base = runs, base
        self.seeds = len(next(iter(runs.values())).kl)
        self.start: Scores = base["evaluations"]["0"]["scores"]  # (P,) each
        weights: dict[str, float] = {name: w for name, w in base["reward_weights"].items() if w}
        # Left out because another measure is the same: the only trained reward, and rewards that the verifier is.
        hidden: set[str] = set(weights) if list(weights.values()) == [1.0] else set()
        verifier = {"shapes_verifier": "graded", "shapes_verifier_strict": "strict"} if SCORES[0] in self.start else {}
        self.parts = {verifier.get(name, name) for name in weights}  # of the trained reward
        self.measures: list[str] = [name for name in self.start if name not in hidden | verifier.keys()]
        self.trained_as = " + ".join(name if w == 1 else f"{w:g} × {name}" for name, w in weights.items())
        self.target = float(min(run.kl.max(axis=1).min() for run in runs.values()))
        self.final = {name: run.final for name, run in runs.items()}
        self.matched = {name: run.at_kl(self.target) for name, run in runs.items()}
        self.tables: dict[str, Table] = {
            "final": self.estimates(self.final),
            "final_differences": self.differences(self.final),
            "change_from_base": self.estimates(self.final, self.start),
            "at_matched_kl": self.estimates(self.matched),
            "at_matched_kl_differences": self.differences(self.matched),
        }

    def pairs(self) -> list[tuple[str, str]]:
        """Each arm less the first one, and each with γ less the linear one, so that std and γ are told apart."""
        names = list(self.runs)
        pairs = [(name, names[0]) for name in names[1:]]
        if "linear" in names[1:]:
            pairs += [(name, "linear") for name in names if name.startswith("slas-")]
        return pairs

    def estimates(self, scores: Mapping[str, Scores], base: Scores | None = None) -> Table:
        """By arm, of the scores, or of what they are above those of the `base`."""
        of = {arm: values if base is None else _minus(values, base) for arm, values in scores.items()}
        return {arm: {m: estimate(values[m]) for m in self.measures} for arm, values in of.items()}

    def differences(self, scores: Mapping[str, Scores]) -> Table:
        label = {name: run.label for name, run in self.runs.items()}
        return self.estimates({f"{label[a]} − {label[b]}": _minus(scores[a], scores[b]) for a, b in self.pairs()})

    def numbers(self, command: str) -> dict[str, Any]:
        def plain(table: Table) -> dict[str, Any]:
            return {row: {m: [e.mean, e.low, e.high] for m, e in cells.items()} for row, cells in table.items()}

        numbers = {
            "command": command,
            "seeds": self.seeds,
            "prompts": self.base["prompts"],
            "matched_kl": self.target,
            **{name: plain(table) for name, table in self.tables.items()},
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
        kl = {name: estimate(run.kl[:, -1:]) for name, run in self.runs.items()}
        last = next(iter(self.runs.values())).steps[-1]
        parts = [
            "# Comparison of advantages",
            f"`{command}`",
            f"Trained on {self.trained_as}. {self.seeds} seed{'s' * (self.seeds > 1)}, {len(self.base['prompts'])} "
            f"held-out prompts with {self.base['eval_images_per_prompt']} images each, drawn by the pipeline's own "
            "sampler with the same noise for all. The arms of a seed began with the same rollout. ± is the half width "
            f"of a 95% interval over {over}, by Student's t. KL is to the base, in nats per latent element, mean over "
            "the trained steps.",
            f"## At equal learning rate: after update {last}",
            self._table("final", kl),
            "### Paired differences",
            self._table("final_differences"),
            f"## At matched KL: where each run is {self.target:.2g} away from the base",
            self._table("at_matched_kl", {}),
            "### Paired differences",
            self._table("at_matched_kl_differences"),
            "## Change from the base after the last update",
            self._table("change_from_base"),
            "## Cost",
            "\n".join(
                f"* {run.label}: {run.seconds.mean():.0f} s of training for each seed "
                f"[{run.seconds.min():.0f}, {run.seconds.max():.0f}]"
                for run in self.runs.values()
            ),
        ]
        return "\n\n".join(parts)

    def _table(self, name: str, kl: dict[str, Estimate] | None = None) -> str:
        """Of differences, or with a `kl` of scores, over which the base's are."""
        spec, head = ("+.3f" if kl is None else ".3f"), ["", *(["KL"] if kl else []), *self.measures]
        table = [head]
        if kl is not None:
            base = [f"{estimate(np.tile(self.start[m], (self.seeds, 1))):.3f}" for m in self.measures]
            table.append(["base", *(["0"] if kl else []), *base])
        for row, cells in self.tables[name].items():
            label = self.runs[row].label if row in self.runs else row
            distance = [f"{kl[row]:.4f}"] if kl else []
            table.append([label, *distance, *(f"{cells[m]:{spec}}" for m in self.measures)])
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
            updates = sorted(run.rewards)
            axes[1, -1].plot(updates, [np.mean(run.rewards[u]) for u in updates], **style)
        for column, measure in enumerate(shown):
            part = "part of it" if len(self.parts) > 1 else "the same"
            kind = part if measure in self.parts else "held out"
            kind = self.trained_as.replace(" + ", "\n+ ") if measure == TRAINED else kind
            axes[0, column].set_title(f"{measure}\n({kind})", fontsize=10)
            axes[0, column].set(xlabel="updates", ylabel="held-out prompts" if column == 0 else "")
            axes[1, column].set(xlabel="KL to the base (nats per element)")
            # Distances grow with the root of the KL, and arms may differ by orders of magnitude.
            axes[1, column].set_xscale("function", functions=(np.sqrt, np.square))
            axes[1, column].xaxis.set_major_locator(MaxNLocator(4))
            axes[1, column].set_xlim(left=0)
            axes[1, column].axvline(self.target, color="grey", lw=0.8, ls=":")
        for axis, title in zip(axes[:, -1], ("KL to the base", "trained reward of the rollouts"), strict=True):
            axis.set_title(title, fontsize=10)
            axis.set(xlabel="updates")
        axes[0, -1].legend(frameon=False, fontsize=8)
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


def _sheet(folders: dict[str, Path], prompts: list[str]) -> Image.Image:
    """A row of pictures of the base and of each arm: a column has one prompt, and one noise."""
    places = evenly_spaced(len(prompts), SHEET_COLUMNS)
    images, captions = [], []
    for label, folder in folders.items():
        for place in places:
            with Image.open(folder / SAMPLES / f"{place}.png") as image:
                images.append(image.convert("RGB"))
            captions.append(f"{label}: {prompts[place]}")
    return sample_grid(images, captions, columns=len(places))
