"""Trainers of tiny pipelines, and what the tests of this folder ask of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL.Image import Image

from slas_trl.policy import Rollout
from slas_trl.trainer import SLASConfig, SLASTrainer
from tests.tiny_pipelines import PIPELINES


PROMPTS = Dataset.from_dict({"prompt": ["a cat", "two dogs", "a red car", "blue sky", "snow", "a tall tree"]})
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def redness(prompts: list[str], images: list[Image], **columns: Any) -> list[float]:
    """The mean of the red channel, in [0, 1]."""
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def lora(**changes: Any) -> LoraConfig:
    """An adapter whose lora_alpha is not its rank."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **changes})


def tiny_config(output_dir: Path, family: str = "sd3", **changes: Any) -> SLASConfig:
    """
    Two groups of four images in two chunks, three trained steps, one update per rollout: six micro-steps, two updates.
    """
    call = dict(PIPELINES[family][1])
    sizes = {name: call.pop(name) for name in ("height", "width")}
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "steps_per_generation": 2,
        "num_inference_steps": 4,
        "guidance_scale": call.pop("guidance_scale"),
        **sizes,
        "pipeline_kwargs": call,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "log_completions": False,  # drawing takes a second
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return SLASConfig(**{**settings, **changes})


def tiny_trainer(
    output_dir: Path,
    family: str = "sd3",
    reward_funcs: Any = redness,
    *,
    cls: type[SLASTrainer] = SLASTrainer,
    full: bool = False,
    **changes: Any,
) -> SLASTrainer:
    """A trainer of a fresh pipeline; `changes` are the trainer's arguments, or else the configuration's."""
    names = ("train_dataset", "eval_dataset", "eval_reward_funcs", "callbacks", "optimizers")
    arguments = {"train_dataset": PROMPTS} | {name: changes.pop(name) for name in names if name in changes}
    adapter = changes.pop("peft_config", None if full else lora())
    return cls(
        changes.pop("model", None) or PIPELINES[family][0](),
        reward_funcs,
        tiny_config(output_dir, family, **changes),
        peft_config=adapter,
        **arguments,
    )


class Watched(SLASTrainer):
    """Keeps what passes through it: rollouts as they are sampled, their pictures, and the trained micro-steps."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.rollouts: list[Rollout] = []  # one for each chunk
        self.pictures: list[list[Image]] = []
        self.micro_steps: list[dict[str, Any]] = []  # rollout, advantages, step
        sample = self.replayer.sample

        def watched(**call: Any) -> Rollout:
            self.rollouts.append(sample(**call))
            self.pictures.append(self.rollouts[-1].images)
            return self.rollouts[-1]

        self.replayer.sample = watched

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.micro_steps.append(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


def trained(output_dir: Path, *args: Any, **kwargs: Any) -> SLASTrainer:
    """A tiny trainer that has been trained."""
    trainer = tiny_trainer(output_dir, *args, **kwargs)
    trainer.train()
    return trainer


def trained_weights(trainer: SLASTrainer) -> dict[str, torch.Tensor]:
    """Copies of the parameters that training changes, by name."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Whether they are equal to the last bit."""
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def logged(output_dir: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that have `key`; by default those of updates."""
    lines = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    """A line of a log without what differs from run to run."""
    times = ("step_time", "images_per_second")
    return {key: value for key, value in line.items() if key not in times and not key.endswith("/time")}
