"""What `slas-trl train` measures before and after training, and what it writes about the run at its end."""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from PIL import Image

from slas_trl.evaluation.shapes import OVERALL, Estimate, ShapesReport, compare, evaluate_shapes, paired_difference
from slas_trl.images import still
from slas_trl.reporting import compare_scores, score_rows, score_table
from slas_trl.run_facts import Evaluation, Metric, spread
from slas_trl.trainer import SLASTrainer


PICTURES_ON_SHEET = 12
DEFAULT_PROMPTS = 16


@dataclass(frozen=True)
class Measurement:
    """The pipeline at one time: pictures to look at, and scores."""

    sheet: list[Image.Image]
    shapes: ShapesReport | None  # of the embedded pipeline
    rewards: dict[str, list[float]]  # of any other: by reward, the mean of each prompt


class RunReport:
    """
    Before and after of one run. Every process has to call every method, for a sharded model needs all of them to
    sample; only the main one writes.

    Args:
        trainer ([`SLASTrainer`]): Before training.
        base_model (`str` or `None`): Folder or Hub id of the pipeline; `None` is the embedded one.
        prompts (`int` or `None`): How many to use; `None` is all held-out ones of the embedded pipeline, else 16.
        images_per_prompt (`int`): Pictures of each of them.
    """

    def __init__(self, trainer: SLASTrainer, base_model: str | None, prompts: int | None, images_per_prompt: int):
        self.trainer, self.base_model, self.images_per_prompt = trainer, base_model, images_per_prompt
        if base_model is None:
            from slas_trl.shapes import shapes_prompts

            self.data, self.origin = shapes_prompts("test"), "held-out"
        elif isinstance(trainer.eval_dataset, Dataset):
            self.data, self.origin = trainer.eval_dataset, "evaluation"
        else:
            self.data, self.origin = trainer.train_dataset, "training"
        if base_model is not None and prompts is None:
            prompts = DEFAULT_PROMPTS
        self.rows = spread(len(self.data), len(self.data) if prompts is None else prompts)
        trainer.draws_gallery = False
        self.prompts: list[str] = [self.data[i]["prompt"] for i in self.rows]
        self.sheet_rows = [self.rows[i] for i in spread(len(self.rows), PICTURES_ON_SHEET)]

    @torch.no_grad()
    def measure(self) -> Measurement:
        """Draw and judge, with the pipeline's own sampler and the same seeds every time."""
        trainer = self.trainer
        sheet = [still(made) for made in self._draw(self.sheet_rows)]
        if self.base_model is not None:
            return Measurement(sheet, None, self._rewards())
        with trainer.as_published():
            shapes = evaluate_shapes(
                trainer.pipe,
                self.prompts,
                images_per_prompt=self.images_per_prompt,
                batch_size=trainer.args.per_device_train_batch_size,
                **trainer.calls.arguments,
            )
        return Measurement(sheet, shapes, {})

    def write(self, before: Measurement, after: Measurement) -> str:
        """Write all of the report into the run's folder, the card aside, and return its table."""
        trainer, shapes = self.trainer, self.base_model is None
        if before.shapes is not None and after.shapes is not None:
            table, rows = compare(before.shapes, after.shapes), _shapes_rows(before.shapes, after.shapes)
            scores: dict[str, Any] = {"before": before.shapes.to_dict(), "after": after.shapes.to_dict()}
            judged = "The verifier's graded score, and in brackets its strict one,"
            in_card = (
                "Mean share of a prompt's demands that a picture meets (all or nothing: of pictures that meet all),"
            )
            names = {"shapes_verifier": "graded", "shapes_verifier_strict": "strict"}
            was, now = (report.estimates[OVERALL] for report in (before.shapes, after.shapes))
            metrics = [_metric(name, now[score], was[score]) for name, score in names.items()]
        else:
            comparison = compare_scores(before.rewards, after.rewards)
            table, rows = score_table(comparison), score_rows(comparison)
            scores = {
                name: {when: estimate.to_dict() for when, estimate in estimates.items()}
                for name, estimates in comparison.items()
            }
            judged = in_card = "Mean rewards"
            metrics = [_metric(name, each["after"], each["before"]) for name, each in comparison.items()]
        how = (
            f"on {len(self.prompts)} {self.origin} prompt{'s' * (len(self.prompts) != 1)}{' of shapes' * shapes}, "
            f"{self.images_per_prompt} picture{'s' * (self.images_per_prompt != 1)} each, drawn by the pipeline's own "
            "sampler with the same seeds before and after; ± is the half width of a 95% interval."
        )
        trainer.evaluation = Evaluation(f"{in_card} {how}", rows[0], rows[1:], metrics, self.origin)
        trainer.show(self.data, self.sheet_rows, after.sheet, before.sheet)
        if trainer.is_world_process_zero():
            path = trainer.args.run_dir / "evaluation.json"
            path.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        return f"{judged} {how}\n\n{table}"

    def _draw(self, rows: list[int]) -> list[Image.Image]:
        """One picture for each row; the seed is its place in the list."""
        generators = [torch.Generator().manual_seed(i) for i in range(len(rows))]
        return self.trainer.draw(self.data, rows, generators, self.trainer.args.per_device_train_batch_size)

    def _rewards(self) -> dict[str, list[float]]:
        rows = [row for row in self.rows for _ in range(self.images_per_prompt)]
        read = self.trainer.calls.rows(self.data, rows)
        columns = {name: [row[name] for row in read] for name in self.data.column_names if name != "prompt"}
        scorer = self.trainer.eval_scorer
        scores = scorer.score(
            [row["prompt"] for row in read], self._draw(rows), columns
        )  # (prompts * images, rewards)
        per_prompt = scores.view(len(self.prompts), self.images_per_prompt, -1).nanmean(dim=1)
        return {name: column.tolist() for name, column in zip(scorer.names, per_prompt.T, strict=True)}


def _shapes_rows(before: ShapesReport, after: ShapesReport) -> list[list[str]]:
    """For the card: the graded score of each category, and of all the strict one, too."""
    change = paired_difference(before, after).estimates
    rows = [["category", "before", "after", "change"]]
    for category, score in [*((category, "graded") for category in change), (OVERALL, "strict")]:
        cells = [(before.estimates, ""), (after.estimates, ""), (change, "+")]
        name = f"{category}, all or nothing" if score == "strict" else category
        rows.append([name, *(_written(estimates[category][score], sign) for estimates, sign in cells)])
    return rows


def _written(estimate: Estimate, sign: str) -> str:
    width = "" if math.isnan(estimate.half_width) else f" ± {estimate.half_width:.3f}"
    return f"{estimate.mean:{sign}.3f}{width}"


def _metric(name: str, after: Estimate, before: Estimate) -> Metric:
    known = not math.isnan(after.half_width)
    low, high = (after.low, after.high) if known else (None, None)
    return Metric(name, after.mean, low, high, after.prompts, before.mean)
