"""
What `slas-trl compare` makes of finished arms: tables, curves and sample sheets.

    score of an arm         V, (seeds, prompts): mean over the images of a prompt
    mean and interval       of V; bootstrap over seeds and prompts, drawn independently of each other
    paired difference       the same of V_arm - V_other: seeds, prompts and noise are the same in both
    matched KL              V at the update where each run is as far from the base as the run that went least far

A bootstrap of few seeds is too narrow, and one of two factors counts thrice what is due to neither. So its draws give
the interval's shape, and the two-way standard error with Student's t its width. With one seed, intervals are over
prompts alone.
"""

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy import stats

from slas_trl.evaluation.shapes import SCORES
from slas_trl.reporting import read_metrics, sample_grid
from slas_trl.scripts.compare import BASE, RESULT, SAMPLES
from slas_trl.trainer.callbacks import METRICS_FILE


TRAINED = "trained reward"
DRAWS = 4000
SHEET_COLUMNS = 6


@dataclass(frozen=True)
class Interval:
    """A mean with the 95% interval of a bootstrap."""

    mean: float
    low: float
    high: float

    def written(self, sign: str = "") -> str:
        return f"{self.mean:{sign}.3f} [{self.low:{sign}.3f}, {self.high:{sign}.3f}]"


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of one arm: scores `(S, T, P)` of S seeds at T evaluations, of which the first is the base's."""

    label: str
    steps: list[int]
    scores: dict[str, np.ndarray]
    kl: np.ndarray  # (S, T)
    seconds: np.ndarray  # (S,) of training, without evaluations
    rewards: dict[int, list[float]]  # of the rollouts, by update: one of each seed

    @cached_property
    def final(self) -> dict[str, np.ndarray]:
        """Scores `(S, P)` after the last update."""
        return {name: values[:, -1] for name, values in self.scores.items()}

    def at_kl(self, target: float) -> dict[str, np.ndarray]:
        """
        Scores `(S, P)` where each run first is `target` away from the base, interpolated between evaluations: linearly
        in the distance, which is the root of the KL.
        """
        places = []
        for distance in np.sqrt(np.maximum.accumulate(self.kl, axis=1)):
            after = max(1, int(np.searchsorted(distance, math.sqrt(target))))
            width = distance[after] - distance[after - 1]
            share = (math.sqrt(target) - distance[after - 1]) / width if width > 0 else 1.0
            places.append(after - 1 + min(1.0, share))
        result = {}
        for name, values in self.scores.items():
            before = [min(int(place), values.shape[1] - 2) for place in places]
            shares = [place - i for place, i in zip(places, before, strict=True)]
            rows = enumerate(zip(before, shares, strict=True))
            result[name] = np.stack([(1 - w) * values[s, i] + w * values[s, i + 1] for s, (i, w) in rows])
        return result


class Bootstrap:
    """Weights of `DRAWS` resamples of S seeds and P prompts, the same for all that is compared."""

    def __init__(self, seeds: int, prompts: int):
        rng = np.random.default_rng(0)
        self.of_seeds, self.of_prompts = (
            rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n for n in (seeds, prompts)
        )

    def __call__(self, values: np.ndarray) -> Interval:
        """Of `(S, P)`; prompts without a score in some run are left out."""
        kept = ~np.isnan(values).any(axis=0)
        values, of_prompts = values[:, kept], self.of_prompts[:, kept]
        if not kept.any():
            return Interval(math.nan, math.nan, math.nan)
        drawn = of_prompts.sum(axis=1) > 0
        means = ((self.of_seeds @ values) * of_prompts).sum(axis=1)[drawn] / of_prompts.sum(axis=1)[drawn]
        mean, spread = float(values.mean()), float(means.std())
        error, freedom = standard_error(values)
        if not (spread > 0 and error > 0):
            return Interval(mean, mean, mean)
        wider = error * stats.t.ppf(0.975, freedom) / (spread * stats.norm.ppf(0.975))
        low, high = mean + wider * (np.percentile(means, [2.5, 97.5]) - mean)
        return Interval(mean, float(low), float(high))


def standard_error(values: np.ndarray) -> tuple[float, float]:
    """
    Of the mean of `(S, P)`, for other seeds and other prompts, with its degrees of freedom (Satterthwaite).

    The mean squares of a two-way layout have the expectations E + P V_seed, E + S V_prompt and E, with E the variance
    of what is left, so that (MS_seed + MS_prompt - MS_rest) / (S P) is the variance of the mean. With one seed, or one
    prompt, only the others count.
    """
    s, p = values.shape
    of_seeds, of_prompts = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    squares, freedoms = [], []
    for part, times, n in ((of_seeds, p, s), (of_prompts, s, p)):
        squares.append(times * np.square(part - values.mean()).sum() / max(1, n - 1))
        freedoms.append(max(1, n - 1))
    rest = np.square(values - of_seeds - of_prompts + values.mean()).sum() / max(1, (s - 1) * (p - 1))
    total = max(sum(squares) - rest, rest)
    if total == 0:
        return 0.0, 1.0
    parts = [*zip(squares, freedoms, strict=True), (rest, max(1, (s - 1) * (p - 1)))]
    freedom = total**2 / sum(square**2 / number for square, number in parts)
    return math.sqrt(total / (s * p)), max(1.0, freedom)


def write_report(root: Path, arms: list[dict[str, Any]], seeds: list[int], command: str) -> str:
    """
    Write `comparison.md`, `.json`, `.png` and `samples.png` into `root`.

    Args:
        root (`Path`): with the results of the base and of every arm and seed.
        arms (`list[dict]`): name and label of each; the first is what the others are compared with.
        seeds (`list[int]`): of each arm.
        command (`str`): that makes this comparison.

    Returns the text of `comparison.md`. Raises `ValueError` if arms of one seed did not start from the same rollout.
    """
    base = _read(root / BASE)
    runs, same_start = {}, []
    for arm in arms:
        results = [_read(root / arm["name"] / f"seed-{seed}") for seed in seeds]
        same_start.append([result["first_rollout"] for result in results])
        runs[arm["name"]] = _runs(root / arm["name"], arm["label"], base, results, seeds)
    for seed, firsts in zip(seeds, zip(*same_start, strict=True), strict=True):
        if len(set(firsts)) > 1:
            raise ValueError(
                f"The arms of seed {seed} began with different rollouts, so they cannot be compared. Were they run on "
                f"different devices or numbers of threads? Remove the folders seed-{seed} in {root} and start again."
            )
    report = Report(runs, base, len(seeds))
    (root / "comparison.json").write_text(json.dumps(report.numbers(command), indent=2) + "\n", encoding="utf-8")
    text = report.text(command)
    (root / "comparison.md").write_text(text + "\n", encoding="utf-8")
    report.draw(root / "comparison.png")
    _sheet(root, arms, seeds[0], base["shown_prompts"]).save(root / "samples.png")
    return text


def _read(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    weights = result["reward_weights"]
    for evaluation in result["evaluations"].values():
        scores = evaluation["scores"]
        weighted = np.stack([w * np.array(scores[name], dtype=float) for name, w in weights.items() if w])
        # As in training: a missing score is left out, unless there is no other.
        total = np.where(np.isnan(weighted).all(axis=0), math.nan, np.nansum(weighted, axis=0))
        evaluation["scores"] = {TRAINED: total, **{name: np.array(v, dtype=float) for name, v in scores.items()}}
    return result


def _runs(folder: Path, label: str, base: dict[str, Any], results: list[dict[str, Any]], seeds: list[int]) -> Runs:
    steps = sorted(int(step) for step in results[0]["evaluations"])
    start = base["evaluations"]["0"]["scores"]
    scores = {
        name: np.stack([[start[name], *(r["evaluations"][str(t)]["scores"][name] for t in steps)] for r in results])
        for name in start
    }
    kl = np.array([[0.0, *(r["evaluations"][str(t)]["kl"] for t in steps)] for r in results])
    rewards: dict[int, list[float]] = {}
    for seed in seeds:
        for step, logged in read_metrics(folder / f"seed-{seed}" / METRICS_FILE).items():
            if "reward" in logged:
                rewards.setdefault(step, []).append(logged["reward"])
    return Runs(label, [0, *steps], scores, kl, np.array([r["seconds"] for r in results]), rewards)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class Report:
    """Of the arms `runs`, by name; the first is what the others are compared with."""

    def __init__(self, runs: dict[str, Runs], base: dict[str, Any], seeds: int):
        self.runs, self.base, self.seeds = runs, base, seeds
        start = base["evaluations"]["0"]["scores"]
        weights: dict[str, float] = {name: w for name, w in base["reward_weights"].items() if w}
        # What has another name already: a reward that is all that is trained on, and those that the verifier is.
        hidden: set[str] = set(weights) if list(weights.values()) == [1.0] else set()
        known: dict[str, str] = {}
        if SCORES[0] in start:
            known = {"shapes_verifier": "graded", "shapes_verifier_strict": "strict"}
        hidden |= known.keys()
        self.parts = {known.get(name, name) for name in weights}  # of the trained reward
        self.measures: list[str] = [name for name in start if name not in hidden]
        self.trained_as = " + ".join(name if w == 1 else f"{w:g} × {name}" for name, w in weights.items())
        self.bootstrap = Bootstrap(seeds, len(start[TRAINED]))
        self.target = float(min(run.kl.max(axis=1).min() for run in runs.values()))
        self.final = {name: run.final for name, run in runs.items()}
        self.matched = {name: run.at_kl(self.target) for name, run in runs.items()}

    def pairs(self) -> list[tuple[str, str]]:
        """Each arm less the first one, and each with γ less the linear one, so that std and γ are told apart."""
        names = list(self.runs)
        pairs = [(name, names[0]) for name in names[1:]]
        if "linear" in names[1:]:
            pairs += [(name, "linear") for name in names if name.startswith("slas-")]
        return pairs

    def estimates(self, scores: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Interval]]:
        return {arm: {m: self.bootstrap(values[m]) for m in self.measures} for arm, values in scores.items()}

    def differences(self, scores: dict[str, dict[str, np.ndarray]]) -> dict[str, dict[str, Interval]]:
        label = {name: run.label for name, run in self.runs.items()}
        return {
            f"{label[a]} − {label[b]}": {m: self.bootstrap(scores[a][m] - scores[b][m]) for m in self.measures}
            for a, b in self.pairs()
        }

    def changes(self) -> dict[str, dict[str, Interval]]:
        start = self.base["evaluations"]["0"]["scores"]
        return {
            arm: {m: self.bootstrap(values[m] - start[m]) for m in self.measures} for arm, values in self.final.items()
        }

    def hacked(self, arm: str) -> tuple[list[str], list[str]]:
        """What is trained on and rose, and what fell, both surely; none where there are not both."""
        changes = self.changes()[arm]
        rose = [m for m in self.measures if m in (TRAINED, *self.parts) and changes[m].low > 0]
        fell = [m for m in self.measures if changes[m].high < 0]
        return (rose, fell) if rose and fell else ([], [])

    def _warning(self, arm: str) -> str | None:
        rose, fell = self.hacked(arm)
        if not fell:
            return None
        what = "reward hacking" if TRAINED in rose else "a part of the reward was hacked, at the expense of the whole"
        return f"* {self.runs[arm].label}: {', '.join(rose)} rose while {', '.join(fell)} fell: {what}."

    def kl_of(self, arm: str) -> Interval:
        final = self.runs[arm].kl[:, -1]
        return Bootstrap(self.seeds, 1)(final[:, None])

    def numbers(self, command: str) -> dict[str, Any]:
        def plain(table: dict[str, dict[str, Interval]]) -> dict[str, Any]:
            return {row: {m: [i.mean, i.low, i.high] for m, i in cells.items()} for row, cells in table.items()}

        numbers = {
            "command": command,
            "seeds": self.seeds,
            "prompts": self.base["prompts"],
            "matched_kl": self.target,
            "final": plain(self.estimates(self.final)),
            "final_differences": plain(self.differences(self.final)),
            "change_from_base": plain(self.changes()),
            "at_matched_kl": plain(self.estimates(self.matched)),
            "at_matched_kl_differences": plain(self.differences(self.matched)),
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
        return _without_nan(numbers)

    def text(self, command: str) -> str:
        start = {m: self.bootstrap(np.tile(self.base["evaluations"]["0"]["scores"][m], (self.seeds, 1)))
                 for m in self.measures}  # fmt: skip
        first = next(iter(self.runs.values()))
        over = "seeds and prompts" if self.seeds > 1 else "prompts alone, since there is one seed"
        parts = [
            "# Comparison of advantages",
            f"`{command}`",
            f"Trained on {self.trained_as}. {self.seeds} seed{'s' * (self.seeds > 1)}, {len(self.base['prompts'])} "
            f"held-out prompts with {self.base['eval_images_per_prompt']} images each, drawn by the pipeline's own "
            "sampler with the same noise for all. The arms of a seed began with the same rollout, to the last bit. "
            f"Brackets are 95% intervals of a bootstrap over {over}, widened to Student's t. KL is to the base, in "
            "nats per latent element, mean over the trained steps.",
            f"## At equal learning rate: after update {first.steps[-1]}",
            self._table(self.estimates(self.final), start, kl=True),
            "### Paired differences",
            self._table(self.differences(self.final)),
            f"## At matched KL: where each run is {self.target:.2g} away from the base",
            self._table(self.estimates(self.matched), start),
            "### Paired differences",
            self._table(self.differences(self.matched)),
            "## Change from the base after the last update",
            self._table(self.changes()),
            *(warning for warning in map(self._warning, self.runs) if warning is not None),
            "## Cost",
            *(
                f"* {run.label}: {run.seconds.mean():.0f} s of training for each seed "
                f"[{run.seconds.min():.0f}, {run.seconds.max():.0f}]"
                for run in self.runs.values()
            ),
        ]
        return "\n\n".join(parts).replace("\n\n* ", "\n* ")

    def _table(
        self, rows: dict[str, dict[str, Interval]], base: dict[str, Interval] | None = None, kl: bool = False
    ) -> str:
        sign = "" if base is not None else "+"
        header = ["", *(["KL"] if kl else []), *self.measures]
        table = [header]
        if base is not None:
            table.append(["base", *(["0"] if kl else []), *(base[m].written() for m in self.measures)])
        for name, cells in rows.items():
            distance = []
            if kl:
                interval = self.kl_of(name)
                distance = [f"{interval.mean:.4f} [{interval.low:.4f}, {interval.high:.4f}]"]
            label = self.runs[name].label if name in self.runs else name
            table.append([label, *distance, *(cells[m].written(sign) for m in self.measures)])
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in table]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join(lines)

    def draw(self, path: Path) -> None:
        """Curves of the arms over updates, and below against KL, with the bands of the bootstrap."""
        shown = self.measures[:5]
        figure = Figure(figsize=(3.2 * (len(shown) + 1), 6.4), dpi=120, layout="constrained")
        axes = figure.subplots(2, len(shown) + 1)
        for color, run in enumerate(self.runs.values()):
            style = {"color": f"C{color}", "label": run.label}
            for column, measure in enumerate(shown):
                values = run.scores[measure]
                bands = [self.bootstrap(values[:, t]) for t in range(values.shape[1])]
                mean, low, high = np.array([(band.mean, band.low, band.high) for band in bands]).T
                axes[0, column].plot(run.steps, mean, **style)
                axes[0, column].fill_between(run.steps, low, high, color=f"C{color}", alpha=0.12, lw=0)
                axes[1, column].plot(run.kl.mean(0), mean, marker=".", **style)
            spread = [Bootstrap(self.seeds, 1)(run.kl[:, [t]]) for t in range(len(run.steps))]
            axes[0, -1].plot(run.steps, run.kl.mean(0), **style)
            axes[0, -1].fill_between(
                run.steps, [s.low for s in spread], [s.high for s in spread], color=f"C{color}", alpha=0.12, lw=0
            )
            updates = sorted(run.rewards)
            axes[1, -1].plot(updates, [np.mean(run.rewards[u]) for u in updates], **style)
        for column, measure in enumerate(shown):
            kind = "held out"
            if measure in self.parts:
                kind = "part of it" if len(self.parts) > 1 else "the same"
            if measure == TRAINED:
                kind = self.trained_as.replace(" + ", "\n+ ")
            axes[0, column].set_title(f"{measure}\n({kind})", fontsize=10)
            axes[0, column].set(xlabel="updates", ylabel="held-out prompts" if column == 0 else "")
            axes[1, column].set(xlabel="KL to the base (nats per element)")
            # Distances grow with the root of the KL, and arms may differ by orders of magnitude.
            axes[1, column].set_xscale("function", functions=(np.sqrt, np.square))
            axes[1, column].xaxis.set_major_locator(MaxNLocator(4))
            axes[1, column].set_xlim(left=0)
            axes[1, column].axvline(self.target, color="grey", lw=0.8, ls=":")
        axes[0, -1].set_title("KL to the base", fontsize=10)
        axes[0, -1].set(xlabel="updates")
        axes[1, -1].set_title("trained reward of the rollouts", fontsize=10)
        axes[1, -1].set(xlabel="updates")
        axes[0, -1].legend(frameon=False, fontsize=8)
        for each in axes.flat:
            each.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)


def _sheet(root: Path, arms: list[dict[str, Any]], seed: int, prompts: list[str]) -> Image.Image:
    """A row of pictures of the base and of each arm: a column has one prompt, and one noise."""
    folders = [(BASE, root / BASE), *((arm["label"], root / arm["name"] / f"seed-{seed}") for arm in arms)]
    count = min(SHEET_COLUMNS, len(prompts))
    images, captions = [], []
    for label, folder in folders:
        for place in (i * len(prompts) // count for i in range(count)):
            with Image.open(folder / SAMPLES / f"{place}.png") as image:
                images.append(image.convert("RGB"))
            captions.append(f"{label}: {prompts[place]}")
    return sample_grid(images, captions, columns=count)
