"""What `slas-trl train` measures before and after training, and what it writes about the run at its end."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers.loaders.lora_base import LoraBaseMixin
from PIL import Image

from slas_trl.evaluation.shapes import ShapesReport, compare, evaluate_shapes
from slas_trl.reporting import compare_scores, plot_training, sample_grid, score_table, write_model_card
from slas_trl.schedulers import FlowSDEScheduler
from slas_trl.trainer import SLASTrainer
from slas_trl.trainer.callbacks import METRICS_FILE
from slas_trl.trainer.calls import is_picture_column
from slas_trl.trainer.lora import ADAPTER_NAME, adapter_file, plain_class


PICTURES_ON_SHEET = 12
DEFAULT_PROMPTS = 16
# Settings that decide the result, for the model card.
SETTINGS = (
    "scale_rewards",
    "gamma",
    "gamma_schedule",
    "shape_order",
    "batch_std_of",
    "shaping_baseline",
    "advantage_clip",
    "multi_objective_aggregation",
    "num_generations",
    "generation_batch_size",
    "num_iterations",
    "epsilon",
    "beta",
    "num_inference_steps",
    "guidance_scale",
    "timestep_fraction",
    "learning_rate",
    "seed",
)


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
        # Spread over the data: it may be sorted, by category for one.
        count = len(self.data) if prompts is None else min(prompts, len(self.data))
        self.rows = [i * len(self.data) // count for i in range(count)]
        self.prompts: list[str] = [self.data[i]["prompt"] for i in self.rows]
        shown = min(count, PICTURES_ON_SHEET)
        self.sheet_rows = [self.rows[i * count // shown] for i in range(shown)]
        self.sheet_prompts = [self.data[row]["prompt"] for row in self.sheet_rows]

    @torch.no_grad()
    def measure(self) -> Measurement:
        """Draw and judge, with the pipeline's own sampler and the same seeds every time."""
        trainer = self.trainer
        sheet = self._draw(self.sheet_rows)
        if self.base_model is not None:
            return Measurement(sheet, None, self._rewards())
        with trainer._averaged_weights():
            shapes = evaluate_shapes(
                trainer.pipe,
                self.prompts,
                images_per_prompt=self.images_per_prompt,
                batch_size=trainer.args.per_device_train_batch_size,
                **trainer.calls.arguments,
            )
        return Measurement(sheet, shapes, {})

    def write(self, before: Measurement, after: Measurement) -> str:
        """Write all of the report into the run's folder, and return its table."""
        args = self.trainer.args
        run_dir = Path(args.output_dir or ".")
        if before.shapes is not None and after.shapes is not None:
            table = compare(before.shapes, after.shapes)
            scores: dict[str, Any] = {"before": before.shapes.to_dict(), "after": after.shapes.to_dict()}
            judged = "The verifier's graded score, and in brackets its strict one,"
        else:
            comparison = compare_scores(before.rewards, after.rewards)
            table = score_table(comparison)
            scores = {
                name: {when: estimate.to_dict() for when, estimate in estimates.items()}
                for name, estimates in comparison.items()
            }
            judged = "Mean rewards"
        how = (
            f"{judged} on {len(self.prompts)} {self.origin} prompts, {self.images_per_prompt} pictures each, drawn by "
            "the pipeline's own sampler with the same seeds before and after; ± is the half width of a 95% interval."
        )
        if self.trainer.is_world_process_zero():
            (run_dir / "samples").mkdir(parents=True, exist_ok=True)
            for name, measurement in (("before", before), ("after", after)):
                sample_grid(measurement.sheet, self.sheet_prompts).save(run_dir / "samples" / f"{name}.png")
            plot_training(run_dir / METRICS_FILE, run_dir / "training.png")
            (run_dir / "evaluation.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
            self._write_card(run_dir, f"{how}\n\n{table}")
        return f"{how}\n\n{table}"

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

    def _write_card(self, run_dir: Path, evaluation: str) -> None:
        trainer = self.trainer
        args = trainer.args
        settings = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
        # The one kind of noise that the pipeline's scheduler takes.
        kinds = (
            ("noise_schedule", "noise_level") if isinstance(trainer.replayer.scheduler, FlowSDEScheduler) else ("eta",)
        )
        settings |= {name: getattr(args, name) for name in kinds if getattr(args, name) is not None}
        if trainer.has_adapter:
            lora = trainer.pipe.components[trainer.denoiser_names[0]].peft_config[ADAPTER_NAME]
            settings |= {"lora_r": lora.r, "lora_alpha": lora.lora_alpha}
        is_folder = self.base_model is not None and Path(self.base_model).exists()
        write_model_card(
            run_dir,
            base_model="the text-to-image pipeline embedded in `slas-trl`"
            if self.base_model is None
            else f"`{self.base_model}`",
            base_model_id=None if is_folder else self.base_model,
            load_code=self._load_code(run_dir),
            rewards=trainer.weight_of,
            settings={**settings, "updates": trainer.state.global_step},
            evaluation=evaluation,
            adapter=trainer.has_adapter,
        )

    def _load_code(self, run_dir: Path) -> str:
        """Python that loads the result with plain diffusers, and makes a picture."""
        trainer, pipe, names = self.trainer, self.trainer.pipe, self.trainer.denoiser_names
        pictures = [c for c in trainer.calls.columns(self.data) if is_picture_column(self.data, c)]
        classes = {name: plain_class(pipe.components[name]).__name__ for name in names}
        imports = [] if self.base_model is None else ["DiffusionPipeline"]
        imports += [] if trainer.has_adapter else sorted(set(classes.values()))
        lines = [f"from diffusers import {', '.join(imports)}"] if imports else []
        lines += ["from diffusers.utils import load_image"] if pictures else []
        if self.base_model is None:
            lines += ["from slas_trl.shapes import load_shapes_pipeline", "", "pipe = load_shapes_pipeline()"]
        else:
            lines += ["", f"pipe = DiffusionPipeline.from_pretrained({json.dumps(self.base_model)})"]
        for name in names:
            folder, weight_name = json.dumps(str(run_dir)), json.dumps(adapter_file(name, names))
            if not trainer.has_adapter:
                place = f"{json.dumps(str(run_dir))}, subfolder={json.dumps(name)}"
                lines += [f"pipe.{name} = {classes[name]}.from_pretrained({place})"]
            elif not isinstance(pipe, LoraBaseMixin):
                lines += [f"pipe.{name}.load_lora_adapter({folder}, prefix=None, weight_name={weight_name})"]
            elif name == names[0]:
                lines += [f"pipe.load_lora_weights({folder})"]
            else:
                given = f"weight_name={weight_name}, load_into_{name}=True"
                lines += [f"pipe.load_lora_weights({folder}, {given})"]
        given = "".join(f', {name}=load_image("{name}.png")' for name in pictures)
        return "\n".join([*lines, f"image = pipe(prompt={json.dumps(self.prompts[0])}{given}).images[0]"])
