"""What the model card says of a run, gathered from the trainer's parts. No path of this machine is in it."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import __version__, hub
from ..advantages import AdvantageOptions
from ..calibration import CALIBRATION_FILE, read_rewards, read_rollouts, reward_curves
from ..run_facts import Base, Evaluation, Metric, Scheduler
from ..schedulers import FlowSDEScheduler
from ..shapes.pipeline import weights_folder  # with it, `load_pipeline` knows the class
from . import lora
from .callbacks import METRICS_FILE
from .calls import PipelineCalls, is_picture_column
from .prompts import SUFFIXES
from .slas_config import SLASConfig


# Settings that decide the result.
SETTINGS = (
    *(field.name for field in fields(AdvantageOptions)),
    "gamma_schedule",
    "num_generations",
    "generation_batch_size",
    "num_iterations",
    "epsilon",
    "epsilon_high",
    "beta",
    "num_inference_steps",
    "guidance_scale",
    "timestep_fraction",
    "sde_window_size",
    "learning_rate",
    "optim",
    "seed",
)
PACKAGES = ("torch", "diffusers", "transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub")
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # folder of a repository in the Hub's cache


def base_of(pipe: DiffusionPipeline, denoiser: torch.nn.Module, init_kwargs: Mapping[str, Any]) -> Base:
    """Where the pipeline came from: its name on the Hub, or that of its folder."""
    # Those that choose what is loaded; not where from, nor with which token.
    chosen = {k: v for k, v in init_kwargs.items() if v is None or k in ("variant", "revision")}
    dtype = str(lora.base_dtype(denoiser) or torch.float32).removeprefix("torch.")
    base = Base(type(pipe).__name__, init_kwargs=chosen, dtype=dtype)
    origin = pipe.name_or_path
    if origin is None:
        return base
    path = Path(origin)
    if path.exists():
        cached = [match for part in path.parts if (match := CACHED.fullmatch(part))]
        base.embedded = path == Path(weights_folder("pipeline"))
        if base.embedded:
            base.license = "apache-2.0"
        elif cached:
            base.hub_id = "/".join(cached[-1].groups())
        else:
            base.name = path.resolve().name
            base.folder = folder if (folder := hub.local_name(path)) != "." else None
    elif is_hub_id(origin):
        base.hub_id = origin
    return base


def scheduler_of(pipe: DiffusionPipeline, init_kwargs: Mapping[str, Any]) -> Scheduler | None:
    """
    The pipeline's scheduler, where it is another one than that of the model it was loaded from, with `init_kwargs`;
    `None` where it is not, or nobody can tell. Without a network: what was loaded is on the disk.
    """
    own: Any = pipe.components.get("scheduler")
    place = {"local_files_only": True} | {k: v for k, v in init_kwargs.items() if k in ("cache_dir", "revision")}
    try:
        index: Any = DiffusionPipeline.load_config(pipe.name_or_path, **place)
        name, kind = index["scheduler"][1], cast(Any, type(own))
        if getattr(diffusers, kind.__name__, None) is not kind:
            return Scheduler(kind.__name__) if kind.__name__ != name else None
        original = getattr(diffusers, name)
        loaded = original.load_config(pipe.name_or_path, subfolder="scheduler", **place)
        given = kind.from_config(original.from_config(loaded).config)
    except Exception:  # of whatever somebody has saved: no name, no such class, no file
        return None
    values, expected = plain(own.config), plain(given.config)
    changes = {name: v for name, v in values.items() if not name.startswith("_") and v != expected.get(name)}
    return Scheduler(kind.__name__, changes) if changes or kind is not original else None


def is_hub_id(name: str) -> bool:
    """Whether this can be the name of a repository: `"user/name"`, or `"name"`."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def settings_of(args: SLASConfig, scheduler: object) -> dict[str, Any]:
    """Name and value of the settings that decide the result."""
    # The one kind of noise that the pipeline's scheduler takes.
    noise = ("noise_schedule", "noise_level") if isinstance(scheduler, FlowSDEScheduler) else ("eta",)
    bounds = ("gamma_max",) if args.gamma_schedule in ("trust_region", "kl", "ess") else ()
    values = {name: getattr(args, name) for name in (*SETTINGS, *bounds, *noise)}
    return {
        name: value.value if isinstance(value, Enum) else value for name, value in values.items() if value is not None
    }


def plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call that can be written down: texts, numbers, and lists of them."""
    simple = (str, int, float, bool, type(None))
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    return {
        name: value
        for name, value in found.items()
        if name != "output_type"
        and all(isinstance(v, simple) for v in (value if isinstance(value, list) else [value]))
    }


def texts_of(calls: PipelineCalls, dataset: Dataset, prompt: str) -> dict[str, str]:
    """The other texts, such as "negative_prompt", that reach the pipeline with this prompt."""
    names = [column for column in calls.columns(dataset) if not is_picture_column(dataset, column)]
    if not names or prompt not in (prompts := list(dataset["prompt"])):
        return {}
    row = dataset[prompts.index(prompt)]
    return {name: row[name] for name in names if isinstance(row[name], str)}


def output_of(pipe: DiffusionPipeline) -> str:
    """The field of the pipeline's output that has the pictures: "images", "frames" or "image"."""
    for base in type(pipe).__mro__:
        for name, kind in vars(sys.modules[base.__module__]).items():
            if name.endswith("PipelineOutput") and is_dataclass(kind):
                return fields(kind)[0].name
    return "images"


def dataset_of(name: str | None) -> tuple[str | None, bool]:
    """A data set's name without its folder, and whether it is one on the Hub."""
    if name is None or name == "shapes":
        return name, False
    path = Path(name)
    on_hub = not path.exists() and path.suffix.lower() not in SUFFIXES and is_hub_id(name)
    return (name, True) if on_hub else (path.name, False)


def evaluation_of(
    history: Sequence[Mapping[str, Any]], names: Sequence[str], images: int, step: int | None = None
) -> Evaluation | None:
    """
    From the Trainer's history of logs: the evaluation after the update `step`, by default the last one, beside the one
    before training if there was one. `None` without any.

    Args:
        history (`Sequence[Mapping[str, Any]]`): of the `TrainerState`.
        names (`Sequence[str]`): of the rewards.
        images (`int`): of each prompt.
        step (`int`, *optional*): of the weights; without an evaluation then, the last one before it is taken.
    """
    logs = [log for log in history if any(re.fullmatch(r"eval_(.+_)?reward", key) for key in log)]
    logs = [log for log in logs if step is None or log["step"] <= step]
    if not logs:
        return None
    first = {k: v for log in logs if log["step"] == 0 for k, v in log.items()}
    last = {k: v for log in logs if log["step"] == logs[-1]["step"] for k, v in log.items()}
    metrics = []
    for key, value in last.items():
        match = re.fullmatch(r"eval_(?:(.+)_)?rewards/([^/]+)/mean", key)
        if match is None or match[2] not in names:
            continue
        half = last.get(f"{key.removesuffix('mean')}half_width")
        count = last.get(f"eval_{match[1]}_samples" if match[1] else "eval_samples")
        metrics.append(
            Metric(
                name=match[2] if match[1] is None else f"{match[2]} ({match[1]})",
                value=value,
                low=None if half is None else value - half,
                high=None if half is None else value + half,
                prompts=None if count is None else count // images,
                before=first.get(key),
            )
        )
    if not metrics:
        return None
    columns = ["reward", *(["before"] if first else []), f"after {last['step']} updates"]
    rows = []
    for metric in metrics:
        before = [] if not first else ["" if metric.before is None else f"{metric.before:.4f}"]
        width = "" if metric.high is None else f" ± {metric.high - metric.value:.4f}"
        rows.append([metric.name, *before, f"{metric.value:.4f}{width}"])
    counts = " and ".join(dict.fromkeys(str(metric.prompts) for metric in metrics))
    how = (
        f"Mean rewards on {counts} evaluation prompts, {images} picture{'s' * (images > 1)} each, drawn by the "
        "pipeline's own sampler; ± is the half width of a 95% interval, from the differences between prompts."
    )
    return Evaluation(how, columns, rows, metrics, "evaluation")


def reading_of(run_dir: Path) -> str | None:
    """What the calibration panel says of the rewards, if the run has one."""
    if not (run_dir / CALIBRATION_FILE).is_file():
        return None
    from ..reporting import read_metrics  # matplotlib, not before it is needed

    try:
        logged = read_metrics(run_dir / METRICS_FILE) if (run_dir / METRICS_FILE).is_file() else {}
        return read_rewards(*reward_curves(read_rollouts(run_dir / CALIBRATION_FILE), logged)).text
    except ValueError:  # no rollout yet
        return None


def versions() -> dict[str, str]:
    """Of the packages that the result depends on."""
    return {"slas-trl": __version__} | {name: version(name) for name in PACKAGES}
