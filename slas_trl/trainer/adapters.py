"""LoRA adapters in a denoiser: a new one, one that training goes on with, and a frozen copy for the KL."""

import hashlib
import math
import warnings
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, PeftConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict


# The trained adapter is not called "default", as a user's own may be. peft matches adapters by substring: neither name
# may contain the other.
ADAPTER_NAME, REFERENCE_NAME = "slas", "kl_reference"
SET_ONE = 'call `pipe.set_adapters("name")` for one'
ANOTHER = "pass a peft_config, to train another adapter on top of it"


def carries_adapter(denoiser: object) -> bool:
    """Whether one has been added or loaded."""
    return isinstance(denoiser, PeftAdapterMixin) and bool(denoiser._hf_peft_config_loaded)


def add_adapter(denoiser: Any, config: PeftConfig) -> None:
    """
    Add a LoRA adapter to a frozen denoiser, its weights in float32. Active adapters stay active, and frozen. Raises
    `ValueError` or `TypeError` when `config` is not plain LoRA without dropout, or the denoiser takes none.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"peft_config must be a peft.LoraConfig, but it is a {type(config).__name__}.")
    if config.lora_dropout:
        raise ValueError(f"lora_dropout ({config.lora_dropout}) would make the ratio random; set it to 0.")
    if not _is_plain(config):
        raise ValueError("peft_config has bias or modules_to_save, which diffusers' files of adapters cannot hold.")
    if not isinstance(cast(object, denoiser), PeftAdapterMixin):
        raise ValueError(f"A {type(denoiser).__name__} takes no adapter; leave peft_config out to train all of it.")
    if not config.target_modules and not config.target_parameters:
        config.target_modules = ["to_q", "to_k", "to_v", "to_out.0"]  # peft has defaults for language models alone
    _refuse_fused(denoiser)
    active = {layer: [] if layer.disable_adapters else list(layer.active_adapters) for layer in _layers(denoiser)}
    denoiser.requires_grad_(False)
    denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)
    for layer in _layers(denoiser):
        layer._active_adapter = [*active.get(layer, []), ADAPTER_NAME]
        layer._disable_adapters = False
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def continue_adapter(pipe: DiffusionPipeline, names: list[str]) -> str:
    """
    Train the one active adapter of each of the denoisers `names`: under our name, with its own configuration, its
    weights in float32. Inactive adapters beside it stay as they are. Returns a hash of its weights. Raises
    `ValueError` when there is not one active LoRA adapter in each denoiser, or what is saved would not be all of it.
    """
    if elsewhere := [name for name in pipe.components if name not in names and _active(pipe.components[name])]:
        raise ValueError(f"The adapter also changes {elsewhere[0]}, which would not be saved; {ANOTHER}.")
    chosen = [(pipe.components[name], _the_active(pipe.components[name], name)) for name in names]
    digest = hashlib.sha256()
    for denoiser, adapter in chosen:
        config, state = denoiser.peft_config[adapter], _state(denoiser, adapter)
        for key in sorted(state):
            digest.update(key.encode() + state[key].cpu().numpy().tobytes())
        for layer in _layers(denoiser):
            layer._active_adapter = []  # or peft activates another one when this one is deleted
        for stale in {adapter, REFERENCE_NAME} & denoiser.peft_config.keys():
            denoiser.delete_adapters(stale)
        denoiser.requires_grad_(False)
        _put(denoiser, ADAPTER_NAME, config, state)
    return digest.hexdigest()


def keep_reference(denoiser: Any) -> None:
    """Add a frozen, inactive copy of the trained adapter as it is now, for [`~PipelineReplayer.reference`]."""
    active = {layer: list(layer.active_adapters) for layer in _layers(denoiser)}
    trained = {parameter for parameter in denoiser.parameters() if parameter.requires_grad}
    _put(denoiser, REFERENCE_NAME, denoiser.peft_config[ADAPTER_NAME], _state(denoiser, ADAPTER_NAME))
    for layer, names in active.items():
        layer._active_adapter = names
    for parameter in denoiser.parameters():
        parameter.requires_grad_(parameter in trained)


def adapters_beside(denoiser: torch.nn.Module) -> list[str]:
    """Names of the adapters that are active beside the trained one."""
    active = [name for layer in _layers(denoiser) if not layer.disable_adapters for name in layer.active_adapters]
    return [name for name in dict.fromkeys(active) if name != ADAPTER_NAME]


def _state(denoiser: Any, adapter: str) -> dict[str, torch.Tensor]:
    """A copy of the adapter's weights, in float32."""
    weights = get_peft_model_state_dict(denoiser, adapter_name=adapter)
    return {key: value.detach().to(torch.float32, copy=True) for key, value in weights.items()}


@torch.no_grad()
def _put(denoiser: Any, name: str, config: LoraConfig, state: dict[str, torch.Tensor]) -> None:
    """Add an adapter as diffusers does when it reads a file of one, and make it the only active one."""
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
    if not carries_adapter(denoiser):
        raise ValueError(f"{name} carries no adapter, as another denoiser does. Load one for it too; or {ANOTHER}.")
    _refuse_fused(denoiser)
    active = sorted(_active(denoiser))
    if len(active) != 1:
        raise ValueError(f"{name} has {active} of {[*denoiser.peft_config]} active: {SET_ONE}, or {ANOTHER}.")
    [adapter] = active
    config = denoiser.peft_config[adapter]
    if not isinstance(config, LoraConfig) or not _is_plain(config):
        raise ValueError(f"The adapter {adapter!r} of {name} has more or other weights than LoRA matrices; {ANOTHER}.")
    root = math.sqrt if config.use_rslora else float
    scaled = [layer for layer in _layers(denoiser) if isinstance(layer, LoraLayer) and adapter in layer.scaling]
    weights = [layer.scaling[adapter] * root(layer.r[adapter]) / layer.lora_alpha[adapter] for layer in scaled]
    if odd := [weight for weight in weights if not math.isclose(weight, 1, rel_tol=1e-6)]:
        raise ValueError(f"The adapter {adapter!r} of {name} has weight {odd[0]:g}: {SET_ONE}; or {ANOTHER}.")
    return adapter


def _is_plain(config: LoraConfig) -> bool:
    """Whether its weights are LoRA matrices alone."""
    return config.bias == "none" and not config.modules_to_save


def _active(module: Any) -> set[str]:
    """Names of the adapters that have an effect."""
    layers = _layers(module) if isinstance(module, torch.nn.Module) else []
    effective = [{*x.active_adapters} & {*x._get_available_adapters()} for x in layers if not x.disable_adapters]
    return set().union(*effective)


def _refuse_fused(denoiser: Any) -> None:
    if any(layer.merged for layer in _layers(denoiser)):
        raise ValueError("An adapter is fused into the denoiser; call `pipe.unload_lora_weights()` after fusing it.")


def _layers(denoiser: Any) -> list[Any]:
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
