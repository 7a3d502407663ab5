"""The trained weights on disk: LoRA adapters that plain diffusers loads, or whole denoisers."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import CONFIG_NAME
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .collectives import copy_full_tensor, full_state, full_tensor


ADAPTER_NAME = "slas"  # not peft's "default", by which name a user's own may have been added
ADAPTER_FILE = "pytorch_lora_weights.safetensors"


def takes_adapter(denoiser: object) -> bool:
    """Whether diffusers has adapters for this denoiser."""
    return isinstance(denoiser, PeftAdapterMixin)


def carries_adapter(denoiser: object) -> bool:
    """Whether one has been added or loaded."""
    return isinstance(denoiser, PeftAdapterMixin) and bool(denoiser._hf_peft_config_loaded)


def add_adapter(denoiser: Any, config: PeftConfig) -> None:
    """
    Add a LoRA adapter to a frozen denoiser, its weights in float32. Adapters that are active already stay so, frozen.

    Raises:
        `ValueError`: when `config` has dropout, diffusers has no adapters for this denoiser, or one is fused into it.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"peft_config must be a peft.LoraConfig, but it is a {type(config).__name__}.")
    if config.lora_dropout:
        raise ValueError(
            f"lora_dropout is {config.lora_dropout}, with which the ratio is not 1 before an update; set it to 0."
        )
    if not takes_adapter(denoiser):
        raise ValueError(f"A {type(denoiser).__name__} takes no adapter; leave peft_config out to train all of it.")
    active: dict[BaseTunerLayer, list[str]] = {}
    for layer in _adapter_layers(denoiser):
        if layer.merged:
            raise ValueError(
                "An adapter is fused into the denoiser, whose layers would pass over another one. Call "
                "`pipe.unload_lora_weights()` after `pipe.fuse_lora()`."
            )
        active[layer] = [] if layer.disable_adapters else list(layer.active_adapters)
    denoiser.requires_grad_(False)
    denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)
    for layer in _adapter_layers(denoiser):
        layer._active_adapter = [*active.get(layer, []), ADAPTER_NAME]
        layer._disable_adapters = False
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _adapter_layers(denoiser: Any) -> list[BaseTunerLayer]:
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def adapter_file(name: str, names: list[str]) -> str:
    """
    The file of denoiser `name`'s adapter. A second denoiser's lies beside the first's under a name that
    `pipe.load_lora_weights` does not take for it, as it would take one in a subfolder of a repository.
    """
    return ADAPTER_FILE if name == names[0] else ADAPTER_FILE.replace(".", f"_{name}.")


def save_weights(
    pipe: DiffusionPipeline, names: list[str], folder: str | Path, adapter: bool, writes: bool = True
) -> None:
    """
    Write the trained weights of the components `names` into `folder`: `pytorch_lora_weights.safetensors`, which
    `pipe.load_lora_weights(folder)` reads, or the folder `name`, which the component's `from_pretrained` reads. An
    adapter of a second denoiser is in the file of [`adapter_file`]. Of several processes all have to call it, since
    weights may be sharded, and the one that `writes` writes.
    """
    for name in names:
        denoiser = pipe.components[name]
        if not adapter:
            _save_denoiser(denoiser, Path(folder) / name, writes)
            continue
        state_dict = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)
        state_dict = {key: full_tensor(value.detach()).cpu().contiguous() for key, value in state_dict.items()}
        if not writes:
            continue
        # lora_alpha is among the metadata, without which a reader takes alpha = r. What is published names no path.
        metadata = {**denoiser.peft_config[ADAPTER_NAME].to_dict(), "base_model_name_or_path": None}
        file = adapter_file(name, names)
        if isinstance(pipe, LoraBaseMixin):
            # A pipeline's saving knows of one denoiser; the second is written, and read, as if it were that.
            layers = {f"{names[0]}_lora_layers": state_dict, f"{names[0]}_lora_adapter_metadata": metadata}
            cast(Any, pipe).save_lora_weights(folder, weight_name=file, **layers)
        else:
            LoraBaseMixin.write_lora_layers(
                state_dict,
                str(folder),
                is_main_process=True,
                weight_name=file,
                save_function=None,  # type: ignore[arg-type]
                safe_serialization=True,
                lora_adapter_metadata=metadata,
            )


def _save_denoiser(denoiser: Any, folder: Path, writes: bool) -> None:
    if any(isinstance(parameter, DTensor) for parameter in denoiser.parameters()):
        state = full_state(denoiser)
        # save_pretrained knows nothing of shards, and from_pretrained not the class that FSDP makes of the model's.
        with torch.device("meta"):
            denoiser = plain_class(denoiser).from_config(denoiser.config)
        denoiser.load_state_dict(state, assign=True)
    if writes:
        denoiser.save_pretrained(folder)
        # Where the model was loaded from: a folder of this machine, be it the Hub's cache.
        file = folder / CONFIG_NAME
        config = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def plain_class(denoiser: Any) -> Any:
    """Its class without what FSDP adds."""
    return next(c for c in type(denoiser).__mro__ if not issubclass(c, FSDPModule))


def load_weights(pipe: DiffusionPipeline, names: list[str], folder: str | Path, adapter: bool) -> None:
    """
    Read what [`save_weights`] wrote into the denoisers in place, be they sharded or not.

    Raises:
        `ValueError`: when the files are of another adapter or model.
    """
    for name in names:
        denoiser = pipe.components[name]
        if adapter:
            targets = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)
            saved = load_file(Path(folder) / adapter_file(name, names))
            saved = {key.removeprefix(f"{names[0]}."): value for key, value in saved.items()}
        else:
            targets = denoiser.state_dict()
            saved = plain_class(denoiser).from_pretrained(Path(folder) / name).state_dict()
        unexpected, missing = sorted(saved.keys() - targets.keys()), sorted(targets.keys() - saved.keys())
        other = [key for key in saved.keys() & targets.keys() if saved[key].shape != targets[key].shape]
        if unexpected or missing or other:
            raise ValueError(
                f"The weights of {name} in {str(folder)!r} do not fit this model: unexpected {unexpected[:3]}, "
                f"missing {missing[:3]}, of another shape {other[:3]}. Use the model and "
                "peft_config they were trained with."
            )
        for key, target in targets.items():
            copy_full_tensor(target, saved[key])
