"""What `slas-trl train` measures before and after training, and what it writes about the run at its end."""

import json
from typing import Any

import torch
from datasets import Dataset

from ..evaluation.shapes import OVERALL, ShapesReport, compare, evaluate_shapes, paired_difference
from ..publishing.facts import Evaluation, Metric
from ..run_files import EVALUATION, write_text
from ..shapes import shapes_prompts
from ..statistics import Estimate, compare_scores, evenly_spaced, score_rows, text_table
from ..trainer import SLASTrainer
from ..trainer.publisher import PICTURES


DEFAULT_PROMPTS = 16
ALL_OR_NOTHING = f"{OVERALL}, all or nothing"

# Of the embedded pipeline, or by reward, the mean of each prompt.
Measurement = ShapesReport | dict[str, list[float]]


class RunReport:
    """
    Before and after of one run, on so many `prompts`; by default all held-out ones of the embedded pipeline (whose
    `base_model` is `None`), else 16. Collective: every rank must call every method; the main one writes.
    """

    def __init__(self, trainer: SLASTrainer, base_model: str | None, prompts: int | None, images_per_prompt: int):
        self.trainer, self.is_shapes, self.images_per_prompt = trainer, base_model is None, images_per_prompt
        if self.is_shapes:
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
        trainer, size, images = self.trainer, self.trainer.args.per_device_train_batch_size, self.images_per_prompt
        if self.is_shapes:
            prompts = [self.data[i]["prompt"] for i in self.rows]
            with trainer.trained.as_published():
                return evaluate_shapes(trainer.pipe, prompts, images, batch_size=size, **trainer.inputs.arguments)
        rows = [row for row in self.rows for _ in range(images)]
        scores = trainer.evaluator.score(self.data, rows, range(len(rows)), size)
        per_prompt = scores.rewards.view(len(self.rows), images, -1).nanmean(dim=1)  # (P, rewards)
        return {name: column.tolist() for name, column in zip(trainer.eval_scorer.names, per_prompt.T, strict=True)}

    def write(self, before: Measurement, after: Measurement) -> str:
        """Write all of the report into the run's folder, the card aside, and return its table."""
        if isinstance(before, ShapesReport) and isinstance(after, ShapesReport):
            comparison = _compare_shapes(before, after)
            table, rows = compare(before, after), score_rows(comparison, "category", ".3f")
            scores: dict[str, Any] = {"before": before.to_dict(), "after": after.to_dict()}
            judged = "The verifier's graded score, and in brackets its strict one,"
            in_card = "Mean share of a prompt's demands that a picture meets (all or nothing: that meet all),"
            named = {"shapes_verifier": OVERALL, "shapes_verifier_strict": ALL_OR_NOTHING}
        else:
            comparison = compare_scores(before, after)  # type: ignore[arg-type]
            rows = score_rows(comparison)
            table, named = text_table(rows), {name: name for name in comparison}
            scores = {name: {when: e.to_dict() for when, e in each.items()} for name, each in comparison.items()}
            judged = in_card = "Mean rewards"
        ends = {name: (comparison[row]["before"].mean, comparison[row]["after"]) for name, row in named.items()}
        metrics = [Metric(name, now.mean, now.half_width, now.prompts, was) for name, (was, now) in ends.items()]
        prompts, images, trainer = len(self.rows), self.images_per_prompt, self.trainer
        drawn = f"{self.origin} prompt{'s' * (prompts != 1)}{' of shapes' * self.is_shapes}, {images} picture"
        how = (
            f"on {prompts} {drawn}{'s' * (images != 1)} each, drawn by the pipeline's own sampler with the same seeds "
            "before and after; ± is the half width of a 95% interval."
        )
        trainer.publisher.evaluation = Evaluation(f"{in_card} {how}", rows, metrics, self.origin)
        trainer.publisher.show()
        if trainer.is_world_process_zero():
            write_text(trainer.args.run_dir / EVALUATION, json.dumps(scores, indent=2) + "\n")
        return f"{judged} {how}\n\n{table}"


def _compare_shapes(before: ShapesReport, after: ShapesReport) -> dict[str, dict[str, Estimate]]:
    """The graded score of each category, and of all the strict one, too."""
    reports = {"before": before, "after": after, "change": paired_difference(before, after)}
    rows = {name: (name, "graded") for name in reports["change"].estimates} | {ALL_OR_NOTHING: (OVERALL, "strict")}
    return {
        name: {when: report.estimates[category][score] for when, report in reports.items()}
        for name, (category, score) in rows.items()
    }
