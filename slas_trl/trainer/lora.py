"""The trained weights on disk: LoRA adapters that plain diffusers loads, or whole denoisers."""

import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import CONFIG_NAME
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..quick_start import adapter_file
from .collectives import copy_full_tensor, full_state, full_tensor


ADAPTER_NAME = "slas"  # not peft's "default", by which name a user's own may have been added
REFERENCE_NAME = "kl_reference"  # peft goes by parts of names: neither may hold the other


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
    if config.bias != "none" or config.modules_to_save:
        raise ValueError(
            f"peft_config has bias={config.bias!r} and modules_to_save={config.modules_to_save!r}, which diffusers' "
            "files of adapters cannot hold; leave both out."
        )
    if not takes_adapter(denoiser):
        raise ValueError(f"A {type(denoiser).__name__} takes no adapter; leave peft_config out to train all of it.")
    if not config.target_modules and not config.target_parameters:
        config.target_modules = ["to_q", "to_k", "to_v", "to_out.0"]  # peft has defaults for language models alone
    _refuse_fused(denoiser)
    active = {
        layer: [] if layer.disable_adapters else list(layer.active_adapters) for layer in _adapter_layers(denoiser)
    }
    denoiser.requires_grad_(False)
    denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)
    for layer in _adapter_layers(denoiser):
        layer._active_adapter = [*active.get(layer, []), ADAPTER_NAME]
        layer._disable_adapters = False
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def continue_adapter(pipe: DiffusionPipeline, names: list[str]) -> str:
    """
    Let the one active adapter of each of the denoisers `names` be the one that is trained: under our name, with its
    own configuration, its weights in float32. Adapters that are there beside it, inactive, stay so.

    Returns:
        `str`: a hash of its weights.

    Raises:
        `ValueError`: when there is not one active LoRA adapter in each, what is saved would not be all of it, or one
            is fused into the denoiser.
    """
    if elsewhere := [name for name in pipe.components if name not in names and _active(pipe.components[name])]:
        raise ValueError(
            f"The adapter also changes {' and '.join(elsewhere)}, which is not trained: what is saved would lack that "
            "part. Pass a peft_config, to train another adapter on top of it; or merge it with `pipe.fuse_lora()` and "
            "`pipe.unload_lora_weights()`, and save the pipeline."
        )
    chosen = {name: _the_active(pipe.components[name], name) for name in names}
    digest = hashlib.sha256()
    for name, adapter in chosen.items():
        denoiser = pipe.components[name]
        config, state = denoiser.peft_config[adapter], _state(denoiser, adapter)
        for key in sorted(state):
            digest.update(key.encode() + state[key].cpu().numpy().tobytes())
        for layer in _adapter_layers(denoiser):
            layer._active_adapter = []  # or peft chooses another in place of the one that goes
        for stale in {adapter, REFERENCE_NAME} & denoiser.peft_config.keys():
            denoiser.delete_adapters(stale)
        denoiser.requires_grad_(False)
        _put(denoiser, ADAPTER_NAME, config, state)
    return digest.hexdigest()


def keep_reference(denoiser: Any) -> None:
    """
    Add a frozen copy of the adapter that is trained, as it is now. It has no effect but where
    [`~PipelineReplayer.reference`] is told its name.
    """
    active = {layer: list(layer.active_adapters) for layer in _adapter_layers(denoiser)}
    trained = {parameter for parameter in denoiser.parameters() if parameter.requires_grad}
    _put(denoiser, REFERENCE_NAME, denoiser.peft_config[ADAPTER_NAME], _state(denoiser, ADAPTER_NAME))
    for layer, names in active.items():
        layer._active_adapter = names
    for parameter in denoiser.parameters():
        parameter.requires_grad_(parameter in trained)


def _state(denoiser: Any, adapter: str) -> dict[str, torch.Tensor]:
    """A copy of the adapter's weights, in float32."""
    weights = get_peft_model_state_dict(denoiser, adapter_name=adapter)
    return {key: value.detach().to(torch.float32, copy=True) for key, value in weights.items()}


@torch.no_grad()
def _put(denoiser: Any, name: str, config: LoraConfig, state: dict[str, torch.Tensor]) -> None:
    """Add an adapter as diffusers does when it reads what [`save_weights`] wrote, and let it alone be active."""
    # Other initial values, which are overwritten, might come with changes of the base model (PiSSA).
    changed = {"init_lora_weights": True, "inference_mode": False, "lora_dropout": 0.0}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        denoiser.load_lora_adapter(
            dict(state), prefix=None, adapter_name=name, metadata={**config.to_dict(), **changed}
        )
    denoiser.set_adapter(name)
    for key, parameter in denoiser.named_parameters():
        if f".{name}." in f"{key}.":
            parameter.data = parameter.data.float()  # they came in the dtype of the model
    for key, target in get_peft_model_state_dict(denoiser, adapter_name=name).items():
        target.copy_(state[key])


def _the_active(denoiser: Any, name: str) -> str:
    """The one active adapter of the denoiser `name`, if it can be trained."""
    another = "pass a peft_config, to train another adapter on top of it"
    if not carries_adapter(denoiser):
        call = f"pipe.load_lora_weights(..., weight_name=..., load_into_{name}=True)"
        raise ValueError(
            f"One denoiser carries an adapter to go on from, and {name} none. Load one for it too, as by `{call}`; or "
            f"{another}."
        )
    _refuse_fused(denoiser)
    active = sorted(_active(denoiser))
    if len(active) != 1:
        has = f"several active adapters, {active}" if active else f"no active one of {list(denoiser.peft_config)}"
        raise ValueError(
            f"To go on from an adapter, it has to be the one that is active, but {name} has {has}. Choose with "
            f'`pipe.set_adapters("{next(iter(denoiser.peft_config))}")` or `pipe.enable_lora()`; or {another}.'
        )
    [adapter] = active
    config = denoiser.peft_config[adapter]
    if not isinstance(config, LoraConfig) or config.bias != "none" or config.modules_to_save:
        raise ValueError(
            f"The adapter {adapter!r} of {name}, by its {type(config).__name__}, has more or other weights than LoRA "
            f"matrices, which alone are trained. To keep it, {another}."
        )
    for layer in _adapter_layers(denoiser):
        if isinstance(layer, LoraLayer) and adapter in layer.scaling:
            root = math.sqrt if config.use_rslora else float
            weight = layer.scaling[adapter] * root(layer.r[adapter]) / layer.lora_alpha[adapter]
            if not math.isclose(weight, 1, rel_tol=1e-6):
                raise ValueError(
                    f"The adapter {adapter!r} of {name} has the weight {weight:g}, with which it would not be loaded "
                    f'again. Call `pipe.set_adapters("{adapter}")` for a weight of 1; or, to keep it, {another}.'
                )
    return adapter


def _active(module: Any) -> set[str]:
    """Names of the adapters that have an effect."""
    layers = _adapter_layers(module) if isinstance(module, torch.nn.Module) else []
    return {
        name
        for layer in layers
        if not layer.disable_adapters
        for name in layer.active_adapters
        if name in layer._get_available_adapters()
    }


def _refuse_fused(denoiser: Any) -> None:
    if any(layer.merged for layer in _adapter_layers(denoiser)):
        raise ValueError(
            "An adapter is fused into the denoiser, whose layers would pass over another one. Call "
            "`pipe.unload_lora_weights()` after `pipe.fuse_lora()`."
        )


def _adapter_layers(denoiser: Any) -> list[BaseTunerLayer]:
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def adapters_beside(denoiser: torch.nn.Module) -> list[str]:
    """Names of the adapters that are active beside the one that is trained."""
    active = [
        name for layer in _adapter_layers(denoiser) if not layer.disable_adapters for name in layer.active_adapters
    ]
    return [name for name in dict.fromkeys(active) if name != ADAPTER_NAME]


def base_dtype(module: torch.nn.Module) -> torch.dtype | None:
    """
    The type that a module computes in: that of its first floating-point weights which are not trained, if there are
    any, for adapters are in float32, and quantized weights integers.
    """
    parameters = sorted(module.parameters(), key=lambda parameter: parameter.requires_grad)
    return next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), None)


@contextmanager
def as_loaded(denoisers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """
    The trained adapters in the precision that they have where diffusers has loaded them, which is that of the layers
    they change. A sharded one stays as it is.
    """
    kept: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
    layers: list[Any] = [layer for denoiser in denoisers for layer in _adapter_layers(denoiser)]
    for layer in layers:
        base = layer.get_base_layer()
        # A quantized layer's weights are integers; it names the type that it computes with.
        dtype = getattr(base, "compute_dtype", None) or getattr(getattr(base, "weight", None), "dtype", None)
        if dtype not in (torch.bfloat16, torch.float16):
            continue
        for module in layer.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.requires_grad and not isinstance(weight, DTensor):
                    kept.append((module, name, weight))
                    # Not its `data`: autograd's hooks would be lost with the change of type.
                    module.register_parameter(name, torch.nn.Parameter(weight.detach().to(dtype)))
    try:
        yield
    finally:
        for module, name, weight in kept:
            module.register_parameter(name, weight)


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
        config = {**denoiser.peft_config[ADAPTER_NAME].to_dict(), "base_model_name_or_path": None}
        # What peft keeps as a set comes in another order in every process.
        metadata = {key: sorted(value) if _is_names(value) else value for key, value in config.items()}
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
        _settle(Path(folder) / file)


def _is_names(value: Any) -> bool:
    return isinstance(value, list | set) and all(isinstance(item, str) for item in value)


def _settle(path: Path) -> None:
    """Sort the metadata, which come in any order: the same adapter is the same file, and no new commit on the Hub."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_bytes(data[:8] + text.ljust(start - 8) + data[start:])


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
