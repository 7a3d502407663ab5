"""The facts of a run, gathered from the trainer's parts. A card for the Hub says no path of this machine."""

import math
import os
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers.loaders.lora_base import LoraBaseMixin

from .. import run_files
from ..advantages import AdvantageOptions
from ..publishing import facts
from ..publishing.facts import Evaluation, Metric, Place, RewardOnCard, RunFacts
from ..reports.calibration import read_rewards, read_rollouts, reward_curves
from ..rewards.base import unwrapped
from ..schedulers import FlowSDEScheduler
from ..shapes.pipeline import weights_folder
from ..statistics import Estimate
from . import adapters, trained_model
from .pipeline_inputs import is_picture_column
from .prompts import SUFFIXES
from .slas_config import SLASConfig


if TYPE_CHECKING:
    from .slas_trainer import SLASTrainer

# Settings that decide the result; of the noise, those of the kind that the pipeline's scheduler takes.
SETTINGS = (
    *(field.name for field in fields(AdvantageOptions)),
    *("gamma_schedule", "num_generations", "generation_batch_size", "num_iterations", "epsilon", "epsilon_high"),
    *("beta", "num_inference_steps", "guidance_scale", "timestep_fraction", "sde_window_size"),
    *("learning_rate", "optim", "seed"),
)


def gather_facts(trainer: "SLASTrainer") -> RunFacts:
    """The facts of the run that are known by now."""
    args, pipe, trained, data = trainer.args, trainer.pipe, trainer.trained, trainer.train_dataset
    publisher, folder, denoiser = trainer.publisher, args.run_dir, trained.denoisers[trained.names[0]]
    scorer = trainer.eval_scorer
    prompt = publisher.samples[0].prompt if publisher.samples else data["prompt"][0]
    panel = args.log_completions and not publisher.is_training and (folder / run_files.CALIBRATION).is_file()
    dtype = str(trained_model.base_dtype(denoiser) or torch.float32).removeprefix("torch.")
    call = facts.plain(trainer.inputs.arguments) | _texts(trainer, prompt)
    hub = Place(trainer.hub_model_id, args.hub_revision, on_hub=True) if trainer.hub_model_id else None
    dataset, on_hub = _dataset(publisher.dataset_name)
    return RunFacts(
        name=publisher.model_name or publisher.repo_id.split("/")[-1],
        base=facts.base_of(pipe, dtype, cast(dict, args.model_init_kwargs or {}), Path(weights_folder("pipeline"))),
        adapter=trained.has_adapter,
        denoisers={name: trained_model.plain_class(trained.denoisers[name]).__name__ for name in trained.names},
        loads_lora=isinstance(pipe, LoraBaseMixin),
        picture_arguments=[c for c in trainer.inputs.columns(data) if is_picture_column(data, c)],
        output=facts.output_of(pipe),
        call={name: value for name, value in call.items() if name != "output_type"},
        prompt=prompt,
        rewards=[
            # A user's own reward may be any function.
            RewardOnCard(name, trainer.weight_of[name], getattr(own, "blind_to", None), getattr(own, "measures", None))
            for name, own in zip(scorer.names, map(unwrapped, scorer.functions), strict=True)
        ],
        settings=_settings(trainer),
        step=publisher.step,
        max_steps=max(trainer.state.max_steps, publisher.step) if publisher.is_training else publisher.step,
        dataset=dataset,
        dataset_on_hub=on_hub,
        train_prompts=len(data),
        started_from=publisher.started_from or ("unknown" if trained.continued is not None else None),
        other_adapters=adapters.adapters_beside(denoiser),
        evaluation=publisher.evaluation or _evaluation(trainer),
        samples=publisher.samples,
        sheet=publisher.sheet,
        curves=publisher.curves,
        calibration=run_files.CALIBRATION if panel else None,
        reading=_reading(folder) if panel else None,
        ema_decay=args.ema_decay if args.use_ema else None,
        versions=facts.versions(),
        tags=[*publisher.tags, *(["hf_jobs"] if "JOB_ID" in os.environ else [])],
        place=hub or Place(facts.local_name(folder)),
    )


def _texts(trainer: "SLASTrainer", prompt: str) -> dict[str, str]:
    """The other texts, such as "negative_prompt", that reach the pipeline with this prompt."""
    data, prompts = trainer.train_dataset, list(trainer.train_dataset["prompt"])
    row = data[prompts.index(prompt)] if prompt in prompts else {}
    names = [name for name in trainer.inputs.columns(data) if not is_picture_column(data, name)]
    return {name: row[name] for name in names if isinstance(row.get(name), str)}


def _dataset(name: str | None) -> tuple[str | None, bool]:
    """A data set's name without its folder, and whether it is one on the Hub."""
    if name is None or name == "shapes":
        return name, False
    path = Path(name)
    on_hub = not path.exists() and path.suffix.lower() not in SUFFIXES and facts.is_hub_id(name)
    return (name, True) if on_hub else (path.name, False)


def _settings(trainer: "SLASTrainer") -> list[list[Any]]:
    """Name, value and meaning of those that decide the result."""
    args, trained = trainer.args, trainer.trained
    is_flow = isinstance(trainer.replayer.scheduler, FlowSDEScheduler)
    names = [*SETTINGS, *(["noise_schedule", "noise_level"] if is_flow else ["eta"])]
    names += ["gamma_max"] if args.gamma_schedule in ("trust_region", "kl", "ess") else []
    names += ["kl_reference"] if trained.continued is not None and args.beta else []
    values = {name: getattr(args, name) for name in names} | {"updates": trainer.publisher.step}
    if config := trained.adapter_config:
        values |= {"lora_r": config.r, "lora_alpha": config.lora_alpha, "use_rslora": config.use_rslora or None}
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    help_of = {field.name: field.metadata.get("help", "").rstrip(".") for field in fields(SLASConfig)}
    return [[name, value, help_of.get(name, "")] for name, value in values.items() if value is not None]


def _evaluation(trainer: "SLASTrainer") -> Evaluation | None:
    """The Trainer's evaluation of these weights, or the last one before, beside the one before training."""
    data, by_step = trainer.eval_dataset, {}
    prefixes = {f" ({name})": f"eval_{name}_" for name in data} if isinstance(data, dict) else {"": "eval_"}
    for log in trainer.state.log_history:
        if log["step"] <= trainer.publisher.step and any(f"{prefix}reward" in log for prefix in prefixes.values()):
            by_step.setdefault(int(log["step"]), {}).update(log)
    if not by_step:
        return None
    copies = trainer.args.num_generations_eval or trainer.args.num_generations
    first, last = by_step.get(0, {}), by_step[max(by_step)]
    metrics, rows = [], [["reward", *(["before"] if first else []), f"after {max(by_step)} updates"]]
    for where, prefix in prefixes.items():
        for name in trainer.eval_scorer.names if f"{prefix}reward" in last else []:
            key, prompts = f"{prefix}rewards/{name}", int(last[f"{prefix}samples"]) // copies
            value, half, before = last[f"{key}/mean"], last.get(f"{key}/half_width"), first.get(f"{key}/mean")
            metrics.append(Metric(name + where, value, half, prompts, before))
            was = [] if not first else ["" if before is None else f"{before:.4f}"]
            estimate = Estimate(value, math.nan, math.nan if half is None else half, prompts)
            rows.append([name + where, *was, f"{estimate:.4f}"])
    counts = " and ".join(dict.fromkeys(str(metric.prompts) for metric in metrics))
    what = f"Mean rewards on {counts} evaluation prompts, {copies} picture{'s' * (copies > 1)} each, drawn by the"
    how = "pipeline's own sampler; ± is the half width of a 95% interval, from the differences between prompts."
    return Evaluation(f"{what} {how}", rows, metrics) if metrics else None


def _reading(folder: Path) -> str | None:
    """The calibration panel's sentence on the rewards."""
    try:
        logged = run_files.read_steps(folder / run_files.METRICS)
        return read_rewards(*reward_curves(read_rollouts(folder / run_files.ROLLOUTS), logged)).text
    except (OSError, ValueError):  # no rollout yet
        return None
