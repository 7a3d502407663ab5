"""Trainers of tiny pipelines, and what the tests of this folder ask of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL.Image import Image

from slas_trl.policy import Rollout
from slas_trl.trainer import SLASConfig, SLASTrainer
from tests.tiny_pipelines import PIPELINES


PROMPTS = Dataset.from_dict({"prompt": ["a cat", "two dogs", "a red car", "blue sky", "snow", "a tall tree"]})
HELD_OUT = Dataset.from_dict({"prompt": ["a dog", "rain", "two cats"], "number": [1, 2, 3]})
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
DENOISERS = {"sd": "unet", "sd3": "transformer", "flux": "transformer"}
SAVED = {"save_strategy": "steps", "save_steps": 1}  # after every update
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1, **SAVED}


def redness(prompts: list[str], images: list[Image], **columns: Any) -> list[float]:
    """The mean of the red channel, in [0, 1]."""
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in images]


def blueness(prompts: list[str], images: list[Image], **columns: Any) -> list[float]:
    """The mean of the blue channel, in [0, 1]."""
    return [float(np.asarray(image)[..., 2].mean()) / 255 for image in images]


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


def resumed(output_dir: Path, checkpoint: Path | str | bool, *args: Any, **kwargs: Any) -> SLASTrainer:
    """A tiny trainer that has gone on from a checkpoint."""
    trainer = tiny_trainer(output_dir, *args, **kwargs)
    trainer.train(resume_from_checkpoint=checkpoint if isinstance(checkpoint, bool) else str(checkpoint))
    return trainer


def trained_weights(trainer: SLASTrainer) -> dict[str, torch.Tensor]:
    """Copies of the parameters that training changes, by name."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Whether they are equal to the last bit."""
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def close(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor], **tolerance: float) -> None:
    """Assert that they are equal but for rounding."""
    assert weights.keys() == others.keys()
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], **tolerance, msg=name)


def publish(pipe: DiffusionPipeline, names: list[str], folder: Path, seed: int = 5, **changes: Any) -> Path:
    """Add a random adapter to the denoisers `names`, and save it as an earlier run would have."""
    torch.manual_seed(seed)
    for name in names:
        denoiser, config = pipe.components[name], lora(init_lora_weights=False, **changes)
        denoiser.add_adapter(config)
        if not hasattr(pipe, "save_lora_weights"):  # it knows nothing of adapters
            denoiser.save_lora_adapter(folder)
            continue
        layers = {"lora_layers": get_peft_model_state_dict(denoiser), "lora_adapter_metadata": config.to_dict()}
        pipe.save_lora_weights(
            folder,
            weight_name=None if name == names[0] else f"pytorch_lora_weights_{name}.safetensors",
            **{f"{names[0]}_{key}": value for key, value in layers.items()},
        )
    return folder


def picture(pipe: DiffusionPipeline, family: str) -> torch.Tensor:
    """What a plain call of the pipeline draws."""
    generator = torch.Generator().manual_seed(3)
    return pipe("a cat", num_inference_steps=3, generator=generator, output_type="pt", **PIPELINES[family][1])[0]


def call_of(family: str, count: int) -> dict[str, Any]:
    """Arguments of a call for so many pictures of one prompt, each with noise of its own."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return {"prompt": ["a cat"] * count, "num_inference_steps": 4, "generator": generators, **PIPELINES[family][1]}


def logged(output_dir: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` that have `key`; by default those of updates."""
    lines = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def column(output_dir: Path, key: str) -> list[float]:
    """One figure of every update that has it."""
    return [line[key] for line in logged(output_dir) if key in line]


def told(caplog, part: str) -> list[str]:
    """What was logged with these words."""
    return [text for text in (record.getMessage() for record in caplog.records) if part in text]


def untimed(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of updates without what differs from run to run."""
    times = ("step_time", "images_per_second")
    return [{k: v for k, v in line.items() if k not in times and k[-5:] != "/time"} for line in logged(output_dir)]


def alike(one: SLASTrainer, other: SLASTrainer) -> bool:
    """Whether two runs ended with the same weights to the last bit, and logged the same."""
    logs = untimed(one.args.run_dir)
    return same(trained_weights(one), trained_weights(other)) and logs == untimed(other.args.run_dir)
