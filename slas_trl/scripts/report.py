"""What `slas-trl train` measures before and after training, and what it writes about the run at its end."""

import json
import math
from typing import Any

import torch
from datasets import Dataset

from ..evaluation.shapes import OVERALL, ShapesReport, compare, evaluate_shapes, paired_difference
from ..publishing.facts import Evaluation, Metric
from ..reports.scores import compare_scores, score_rows
from ..run_files import EVALUATION
from ..statistics import evenly_spaced, text_table
from ..trainer import SLASTrainer
from ..trainer.publisher import PICTURES


DEFAULT_PROMPTS = 16

Measurement = (
    ShapesReport | dict[str, list[float]]
)  # of the embedded pipeline; else by reward, the mean of each prompt


class RunReport:
    """
    Before and after of one run. Collective: every rank must call every method; the main one writes.

    Args:
        trainer ([`SLASTrainer`]): before training.
        base_model (`str`, *optional*): folder or Hub id of the pipeline; `None` is the embedded one.
        prompts (`int`, *optional*): how many to use; by default all held-out ones of the embedded pipeline, else 16.
        images_per_prompt (`int`): pictures of each of them.
    """

    def __init__(self, trainer: SLASTrainer, base_model: str | None, prompts: int | None, images_per_prompt: int):
        self.trainer, self.is_shapes, self.images_per_prompt = trainer, base_model is None, images_per_prompt
        if self.is_shapes:
            from ..shapes import shapes_prompts

            self.data, self.origin = shapes_prompts("test"), "held-out"
        elif isinstance(trainer.eval_dataset, Dataset):
            self.data, self.origin = trainer.eval_dataset, "evaluation"
        else:
            self.data, self.origin = trainer.train_dataset, "training"
        wanted = prompts or (len(self.data) if self.is_shapes else DEFAULT_PROMPTS)
        self.rows = evenly_spaced(len(self.data), wanted)
        trainer.publisher.choose_prompts(self.data, [self.rows[i] for i in evenly_spaced(len(self.rows), PICTURES)])

    @torch.no_grad()
    def measure(self) -> Measurement:
        """Draw and judge, with the pipeline's own sampler and the same seeds every time."""
        trainer, size = self.trainer, self.trainer.args.per_device_train_batch_size
        if self.is_shapes:
            prompts, images = [self.data[i]["prompt"] for i in self.rows], self.images_per_prompt
            with trainer.trained.as_published():
                return evaluate_shapes(trainer.pipe, prompts, images, batch_size=size, **trainer.inputs.arguments)
        rows = [row for row in self.rows for _ in range(self.images_per_prompt)]
        scores = trainer.evaluator.score(
            self.data, rows, range(len(rows)), size
        ).rewards  # (prompts * images, rewards)
        per_prompt = scores.view(len(self.rows), self.images_per_prompt, -1).nanmean(dim=1)
        return {name: column.tolist() for name, column in zip(trainer.eval_scorer.names, per_prompt.T, strict=True)}

    def write(self, before: Measurement, after: Measurement) -> str:
        """Write all of the report into the run's folder, the card aside, and return its table."""
        if isinstance(before, ShapesReport) and isinstance(after, ShapesReport):
            table, rows = compare(before, after), _shapes_rows(before, after)
            scores: dict[str, Any] = {"before": before.to_dict(), "after": after.to_dict()}
            judged = "The verifier's graded score, and in brackets its strict one,"
            in_card = (
                "Mean share of a prompt's demands that a picture meets (all or nothing: of pictures that meet all),"
            )
            names = {"shapes_verifier": "graded", "shapes_verifier_strict": "strict"}
            was, now = before.estimates[OVERALL], after.estimates[OVERALL]
            metrics = [_metric(name, now[score], was[score]) for name, score in names.items()]
        else:
            comparison = compare_scores(before, after)  # type: ignore[arg-type]
            rows = score_rows(comparison)
            table = text_table(rows)
            scores = {name: {when: e.to_dict() for when, e in each.items()} for name, each in comparison.items()}
            judged = in_card = "Mean rewards"
            metrics = [_metric(name, each["after"], each["before"]) for name, each in comparison.items()]
        prompts, images = len(self.rows), self.images_per_prompt
        how = (
            f"on {prompts} {self.origin} prompt{'s' * (prompts != 1)}{' of shapes' * self.is_shapes}, {images} "
            f"picture{'s' * (images != 1)} each, drawn by the pipeline's own sampler with the same seeds before and "
            "after; ± is the half width of a 95% interval."
        )
        trainer = self.trainer
        trainer.publisher.evaluation = Evaluation(f"{in_card} {how}", rows, metrics, self.origin)
        trainer.publisher.show()
        if trainer.is_world_process_zero():
            text = json.dumps(scores, indent=2) + "\n"
            (trainer.args.run_dir / EVALUATION).write_text(text, encoding="utf-8")
        return f"{judged} {how}\n\n{table}"


def _shapes_rows(before: ShapesReport, after: ShapesReport) -> list[list[str]]:
    """For the card: the graded score of each category, and of all the strict one, too."""
    change = paired_difference(before, after).estimates
    rows = [["category", "before", "after", "change"]]
    for category, score in [*((category, "graded") for category in change), (OVERALL, "strict")]:
        estimates = [(before.estimates[category][score], ""), (after.estimates[category][score], "")]
        cells = [f"{e:{sign}.3f}" for e, sign in [*estimates, (change[category][score], "+")]]
        rows.append([f"{category}, all or nothing" if score == "strict" else category, *cells])
    return rows


def _metric(name: str, after: Any, before: Any) -> Metric:
    half_width = None if math.isnan(after.half_width) else after.half_width
    return Metric(name, after.mean, half_width, after.prompts, before.mean)
