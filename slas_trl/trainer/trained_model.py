"""The denoisers that are trained: their weights on disk, their moving average, and the reference policy."""

import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, convert_to_fp32, set_seed
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.training_utils import EMAModel
from diffusers.utils import CONFIG_NAME
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from ..policy.checks import denoisers_of
from ..run_files import adapter_file
from .adapters import ADAPTER_NAME, REFERENCE_NAME, add_adapter, carries_adapter, continue_adapter, keep_reference
from .distributed import copy_full_tensor, full_tensor, reshard
from .slas_config import SLASConfig


HALF_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


class JoinedDenoisers(nn.Module):
    """Several denoisers as the one model that the Trainer knows; the first argument of a call names one of them."""

    def __init__(self, denoisers: Mapping[str, nn.Module]):
        super().__init__()
        for name, denoiser in denoisers.items():
            self.add_module(name, denoiser)

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(name)(*args, **kwargs)


class TrainedModel:
    """
    The denoisers of a pipeline, of which an adapter or all weights are trained. All other weights are frozen.

    `peft_config` is a new adapter; without it, the adapter that the pipeline carries is trained on, or else all
    weights. Raises `ValueError` or `TypeError` when this pipeline cannot be trained so.
    """

    def __init__(self, pipe: DiffusionPipeline, args: SLASConfig, peft_config: PeftConfig | None = None):
        self.pipe, self.args = cast(Any, pipe), args  # every pipeline has a __call__ of its own
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False)
                component.eval()
        denoisers = self.denoisers = denoisers_of(pipe)
        self.names = list(denoisers)  # such as ["transformer", "transformer_2"]
        set_seed(args.seed)  # before the adapter's random weights
        self.has_adapter = peft_config is not None or any(map(carries_adapter, denoisers.values()))
        # A hash of the adapter that training goes on with.
        self.continued = None if peft_config or not self.has_adapter else continue_adapter(pipe, self.names)
        self._keeps_reference = self.continued is not None and bool(args.beta) and args.kl_reference == "initial"
        self._frozen_copies: dict[str, nn.Module] | None = None
        self._frozen_place: torch.device | str = "cpu"
        for denoiser in denoisers.values():
            self._prepare(denoiser, copy.deepcopy(peft_config))
        self.module = next(iter(denoisers.values())) if len(denoisers) == 1 else JoinedDenoisers(denoisers)
        self.average = MovingAverage(self.module, args.ema_decay) if args.use_ema else None

    def _prepare(self, denoiser: Any, peft_config: PeftConfig | None) -> None:
        if peft_config is not None:
            add_adapter(denoiser, peft_config)
        elif not self.has_adapter:
            denoiser.requires_grad_(True)
            if narrow := {p.dtype for p in denoiser.parameters()} & {*HALF_PRECISION.values()}:
                what = f"All weights would be trained in {narrow.pop()}, which rounds most updates away"
                raise ValueError(f"{what}. Load them in float32 and set bf16=True, or train an adapter (peft_config).")
        elif self._keeps_reference:
            keep_reference(denoiser)
        if self.args.activation_checkpointing:
            denoiser.enable_gradient_checkpointing()  # diffusers' name; the Trainer knows only transformers'

    def to(self, accelerator: Accelerator, is_sharded: bool) -> None:
        """Move the pipeline to the accelerator's device, and make what depends on how the model is prepared there."""
        self.pipe.to(accelerator.device)
        self._frozen_place = accelerator.device
        self.pipe.set_progress_bar_config(disable=True)
        if self.args.beta and not self.has_adapter:
            self._frozen_copies = {n: copy.deepcopy(d).requires_grad_(False) for n, d in self.denoisers.items()}
            for frozen in self._frozen_copies.values():
                _autocast_forward(accelerator, frozen)
        if is_sharded and accelerator.mixed_precision != "no":
            _autocast_sharded(accelerator, self.module)

    # The parts of the policy

    @property
    def adapter_config(self) -> LoraConfig | None:
        """The configuration of the trained adapter, which is the same in all denoisers."""
        return cast(Any, self.denoisers[self.names[0]]).peft_config[ADAPTER_NAME] if self.has_adapter else None

    @property
    def reference(self) -> dict[str, Any]:
        """Arguments of [`~PipelineReplayer.reference`] for the policy that the KL is measured to."""
        instead = REFERENCE_NAME if self._keeps_reference else None
        return {"models": self._frozen_copies, "adapter": ADAPTER_NAME, "instead": instead}

    def forward_functions(self, wrapped: Any) -> dict[str, Callable[..., Any]]:
        """
        To call for each denoiser, given `module` or its FSDP or compiled form. The DDP form is replaced by the plain
        model: DDP allows for one call with each backward pass, but guidance may take two.
        """
        model = wrapped.module if isinstance(wrapped, DistributedDataParallel) else wrapped
        return {self.names[0]: model} if len(self.names) == 1 else {name: partial(model, name) for name in self.names}

    def place_frozen(self, device: torch.device | str) -> torch.device | str:
        """With `offload_frozen_components`, move text encoders, VAE and the like there. Returns where they were."""
        before, self._frozen_place = self._frozen_place, device
        if self.args.offload_frozen_components:
            for name, component in self.pipe.components.items():
                if isinstance(component, nn.Module) and name not in self.names:
                    component.to(device)
            clear_device_cache()
        return before

    @contextmanager
    def as_published(self) -> Iterator[None]:
        """
        Within, the pipeline is what a reader of the saved weights loads: in eval mode, its weights averaged, and
        without the mixed precision of training, unless components differ in dtype or weights are sharded.
        """
        modes = {denoiser: denoiser.training for denoiser in self.denoisers.values()}
        dtypes = {base_dtype(part) for part in self.pipe.components.values() if isinstance(part, nn.Module)} - {None}
        narrowed = [x for x in modes if "_original_forward" in vars(x) and not isinstance(x, FSDPModule)]
        autocast = {denoiser: denoiser.forward for denoiser in narrowed if len(dtypes) == 1}
        for denoiser in modes:
            denoiser.eval()
        for denoiser in autocast:
            denoiser.forward = cast(Any, denoiser._original_forward)
        try:
            with self.averaged(), _rounded(self.denoisers.values()):
                yield
        finally:
            for denoiser, forward in autocast.items():
                denoiser.forward = forward
            for denoiser, mode in modes.items():
                denoiser.train(mode)

    def averaged(self) -> AbstractContextManager[None]:
        """Within, the weights are their moving average, if there is one."""
        return nullcontext() if self.average is None else self.average.applied()

    # On disk

    def save(self, folder: Path, writes: bool = True) -> None:
        """
        Write the trained (averaged) weights into `folder`: the file of [`~run_files.adapter_file`] for each denoiser,
        the first of which `pipe.load_lora_weights(folder)` reads; or the folder of each denoiser, which the class's
        `from_pretrained` reads. Collective: every rank must call this; the one that `writes` writes.
        """
        with self.averaged():
            for name in self.names:
                if self.has_adapter:
                    self._save_adapter(name, folder, writes)
                else:
                    _save_denoiser(self.denoisers[name], folder / name, writes)

    def _save_adapter(self, name: str, folder: Path, writes: bool) -> None:
        denoiser = cast(Any, self.denoisers[name])
        state = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)
        state = {key: full_tensor(value.detach()).cpu().contiguous() for key, value in state.items()}
        if not writes:
            return
        # Without lora_alpha among the metadata, a reader takes alpha = r. Published files name no path, and what
        # peft keeps as a set comes in another order in every process.
        config = {**denoiser.peft_config[ADAPTER_NAME].to_dict(), "base_model_name_or_path": None}
        metadata = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        file = adapter_file(name, self.names)
        if isinstance(self.pipe, LoraBaseMixin):
            # A pipeline's method knows one denoiser; the second is written, and read, as if it were the first.
            layers = {f"{self.names[0]}_lora_layers": state, f"{self.names[0]}_lora_adapter_metadata": metadata}
            cast(Any, self.pipe).save_lora_weights(folder, weight_name=file, **layers)
        else:
            no_function = cast(Any, None)
            LoraBaseMixin.write_lora_layers(state, str(folder), True, file, no_function, True, metadata)

    def load(self, folder: Path) -> None:
        """Read what [`save`] wrote, in place. Raises `ValueError` when it is of another adapter or model."""
        for name, denoiser in self.denoisers.items():
            if self.has_adapter:
                targets = get_peft_model_state_dict(cast(Any, denoiser), adapter_name=ADAPTER_NAME)
                saved = load_file(folder / adapter_file(name, self.names))
                saved = {key.removeprefix(f"{self.names[0]}."): value for key, value in saved.items()}
            else:
                targets = denoiser.state_dict()
                saved = plain_class(denoiser).from_pretrained(folder / name).state_dict()
            shapes, found = ({key: value.shape for key, value in state.items()} for state in (targets, saved))
            if differing := [key for key in {**shapes, **found} if shapes.get(key) != found.get(key)]:
                what = f"The weights of {name} in {str(folder)!r} are of another model or peft_config"
                raise ValueError(f"{what}: {differing[:3]} differ. Use those they were trained with.")
            for key, target in targets.items():
                copy_full_tensor(target, saved[key])


@dataclass(eq=False)
class MovingAverage(TrainerCallback):
    """An exponential moving average of the trained weights, and its files. It begins when training does."""

    module: nn.Module  # what is trained of it is averaged
    decay: float  # share of the old average that an update keeps
    model: EMAModel | None = None

    AVERAGE_FILE, WEIGHTS_FILE = "ema.pt", "weights_before_averaging.pt"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Not cached: FSDP replaces the parameter objects."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def on_train_begin(self, args, state, control, **kwargs):
        if self.model is None:  # not resumed
            self.restart()

    def on_step_end(self, args, state, control, **kwargs):
        cast(EMAModel, self.model).step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the average is in place of the weights, once there is one."""
        if self.model is None:
            yield
            return
        reshard(self.module)
        self.model.store(self.parameters)
        self.model.copy_to(self.parameters)
        try:
            yield
        finally:
            reshard(self.module)
            self.model.restore(self.parameters)

    def restart(self) -> EMAModel:
        """Start the average from the weights as they are."""
        # By default diffusers' first update forgets these weights.
        self.model = EMAModel(self.parameters, decay=self.decay, min_decay=self.decay, update_after_step=-1)
        return self.model

    def save(self, folder: Path, writes: bool) -> None:
        """Collective: every rank must call this, since weights may be sharded; the one that `writes` writes."""
        model = cast(EMAModel, self.model)  # a checkpoint is written in training
        average = [full_tensor(p).cpu() for p in model.shadow_params]
        weights = [full_tensor(p.detach()).cpu() for p in self.parameters]
        if writes:
            torch.save({**model.state_dict(), "shadow_params": average}, folder / self.AVERAGE_FILE)
            torch.save(weights, folder / self.WEIGHTS_FILE)

    def load(self, folder: Path) -> None:
        """Read the average, and the weights before averaging. The decay stays that of this run."""
        model = self.restart()
        saved = torch.load(folder / self.AVERAGE_FILE, map_location="cpu", weights_only=True)
        average, shadows = saved.pop("shadow_params"), model.shadow_params
        model.load_state_dict({**saved, "decay": self.decay, "min_decay": self.decay, "shadow_params": shadows})
        weights = torch.load(folder / self.WEIGHTS_FILE, map_location="cpu", weights_only=True)
        for targets, sources in ((model.shadow_params, average), (self.parameters, weights)):
            for target, source in zip(targets, sources, strict=True):
                copy_full_tensor(target, source)


def base_dtype(module: nn.Module) -> torch.dtype | None:
    """That of its first floating-point weights, frozen ones first: adapters are float32, quantized ones integers."""
    parameters = sorted(module.parameters(), key=lambda parameter: parameter.requires_grad)
    return next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), None)


def plain_class(denoiser: Any) -> Any:
    """Its class without what FSDP adds."""
    return next(c for c in type(denoiser).__mro__ if not issubclass(c, FSDPModule))


@contextmanager
def _rounded(denoisers: Any) -> Iterator[None]:
    """Within, trained adapters have the precision that diffusers loads them in: that of the layers they change."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    layers: list[Any] = [x for denoiser in denoisers for x in denoiser.modules() if isinstance(x, BaseTunerLayer)]
    for layer in layers:
        base = layer.get_base_layer()
        # A quantized layer's weights are integers; it names the type that it computes with.
        dtype = getattr(base, "compute_dtype", None) or getattr(getattr(base, "weight", None), "dtype", None)
        if dtype not in HALF_PRECISION.values():
            continue
        for module in layer.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.requires_grad and not isinstance(weight, DTensor):
                    kept.append((module, name, weight))
                    # Not its `data`: autograd's hooks would be lost with the change of type.
                    module.register_parameter(name, nn.Parameter(weight.detach().to(dtype)))
    try:
        yield
    finally:
        for module, name, weight in kept:
            module.register_parameter(name, weight)


def _save_denoiser(denoiser: Any, folder: Path, writes: bool) -> None:
    if any(isinstance(parameter, DTensor) for parameter in denoiser.parameters()):
        state = {key: full_tensor(value).cpu() for key, value in denoiser.state_dict().items()}
        # save_pretrained does not know shards, and from_pretrained not the class that FSDP makes of the model's.
        with torch.device("meta"):
            denoiser = plain_class(denoiser).from_config(denoiser.config)
        denoiser.load_state_dict(state, assign=True)
    if writes:
        denoiser.save_pretrained(folder)
        # diffusers adds where the model was loaded from: a folder of this machine.
        file = folder / CONFIG_NAME
        config = {key: value for key, value in json.loads(file.read_text()).items() if key != "_name_or_path"}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _autocast_forward(accelerator: Accelerator, module: nn.Module) -> None:
    """Run the module under autocast and return float32, as a model does that accelerate has prepared."""
    if accelerator.mixed_precision == "no":
        return
    dtype, forward = HALF_PRECISION[accelerator.mixed_precision], module.forward

    @functools.wraps(forward)
    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(accelerator.device.type, dtype):
            return convert_to_fp32(forward(*args, **kwargs))

    module.forward = autocast


def _autocast_sharded(accelerator: Accelerator, module: nn.Module) -> None:
    """
    The same under FSDP2, whose own policy would cast all inputs, timesteps and latents among them, and return what a
    float32 VAE does not take. Weights are gathered in half precision, gradients summed in float32.
    """
    plugin = cast(FullyShardedDataParallelPlugin, accelerator.state.fsdp_plugin)
    narrow = HALF_PRECISION[accelerator.mixed_precision]
    plugin.mixed_precision_policy = MixedPrecisionPolicy(narrow, torch.float32, cast_forward_inputs=False)
    _autocast_forward(accelerator, module)
