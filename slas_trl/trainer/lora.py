"""The trained weights on disk: a LoRA adapter that plain diffusers loads, or the whole denoiser."""

from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig, PeftConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file


ADAPTER_NAME = "default"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"


def takes_adapter(denoiser: object) -> bool:
    """Whether diffusers has adapters for this denoiser."""
    return isinstance(denoiser, PeftAdapterMixin)


def carries_adapter(denoiser: object) -> bool:
    """Whether one has been added or loaded."""
    return isinstance(denoiser, PeftAdapterMixin) and bool(denoiser._hf_peft_config_loaded)


def add_adapter(denoiser: Any, config: PeftConfig) -> None:
    """
    Add a LoRA adapter to a frozen denoiser, its weights in float32.

    Raises:
        `ValueError`: when `config` has dropout, or diffusers has no adapters for this denoiser.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"peft_config must be a peft.LoraConfig, but it is a {type(config).__name__}.")
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout is {config.lora_dropout}, with which the ratio is not 1 before an update; set it to 0."
        )
    if not takes_adapter(denoiser):
        raise ValueError(f"A {type(denoiser).__name__} takes no adapter; leave peft_config out to train all of it.")
    denoiser.requires_grad_(False)
    denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_weights(pipe: DiffusionPipeline, name: str, folder: str | Path, adapter: bool) -> None:
    """
    Write the trained weights of component `name` into `folder`: `pytorch_lora_weights.safetensors`, which
    `pipe.load_lora_weights(folder)` reads, or the folder `name`, which the component's `from_pretrained` reads.
    """
    denoiser = pipe.components[name]
    if not adapter:
        denoiser.save_pretrained(Path(folder) / name)
        return
    state_dict = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)
    state_dict = {key: value.detach().to("cpu").contiguous() for key, value in state_dict.items()}
    if isinstance(pipe, LoraBaseMixin):
        # The metadata hold lora_alpha, without which a reader takes alpha = r.
        cast(Any, pipe).save_lora_weights(
            folder, **{f"{name}_lora_layers": state_dict}, **_collate_lora_metadata({name: denoiser})
        )
    else:
        denoiser.save_lora_adapter(folder, adapter_name=ADAPTER_NAME)


def load_weights(pipe: DiffusionPipeline, name: str, folder: str | Path, adapter: bool) -> None:
    """Read what [`save_weights`] wrote into the denoiser in place, the adapter's parameters included."""
    denoiser = pipe.components[name]
    if not adapter:
        saved = type(denoiser).from_pretrained(Path(folder) / name)
        denoiser.load_state_dict(saved.state_dict())
        return
    state_dict = load_file(Path(folder) / ADAPTER_FILE)
    state_dict = {key.removeprefix(f"{name}."): value for key, value in state_dict.items()}
    result = set_peft_model_state_dict(
        denoiser, convert_unet_state_dict_to_peft(state_dict), adapter_name=ADAPTER_NAME
    )
    missing = [key for key in (result.missing_keys if result else []) if "lora" in key]
    if result is None or result.unexpected_keys or missing:
        raise ValueError(
            f"The adapter in {str(folder)!r} does not fit this model: unexpected "
            f"{(result.unexpected_keys if result else [])[:3]}, missing {missing[:3]}. Use the peft_config it was "
            "trained with."
        )
