"""A trainer of any family of the zoo."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig

from slas_trl.trainer import SLASConfig, SLASTrainer
from tests.policy.zoo.checks import attention_weights
from tests.policy.zoo.family import Family

from .tiny_trainers import PROMPTS, redness


def adapter_for(denoiser: torch.nn.Module) -> LoraConfig | None:
    """LoRA on the attention layers; none where diffusers has no adapters for the denoiser."""
    if not isinstance(denoiser, PeftAdapterMixin):
        return None
    names = [name.removesuffix(".weight") for name in attention_weights(denoiser)]
    linear = [name for name in names if isinstance(denoiser.get_submodule(name), torch.nn.Linear)]
    return LoraConfig(r=2, lora_alpha=4, target_modules=linear)


def zoo_trainer(
    family: Family, output_dir: Path, reward: Any = redness, train_dataset: Dataset = PROMPTS, **settings: Any
) -> SLASTrainer:
    """One update on two groups of two images, in chunks of two; `settings` are the configuration's, or `pipe`."""
    pipe = settings.pop("pipe", None) or family.build()
    call = dict(family.call)
    own = {key: call.pop(key) for key in ("height", "width", "guidance_scale") if key in call}
    denoiser = pipe.components["unet" if "unet" in pipe.components else "transformer"]
    adapter = settings.pop("peft_config") if "peft_config" in settings else adapter_for(denoiser)
    config = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "steps_per_generation": 2,
        "num_inference_steps": 3,
        "pipeline_kwargs": call,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "log_completions": False,  # drawing takes a second
        "disable_tqdm": True,
        "use_cpu": True,
        **own,
        **settings,
    }
    return SLASTrainer(pipe, reward, SLASConfig(**config), train_dataset=train_dataset, peft_config=adapter)
