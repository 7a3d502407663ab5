"""Mixed precision where accelerate has another, or none: sharded denoisers, and the frozen copies for the KL."""

import functools
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, convert_to_fp32
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast_forward(accelerator: Accelerator, module: nn.Module) -> None:
    """Let the module run under autocast and answer in float32, as a model does that accelerate has prepared."""
    if accelerator.mixed_precision == "no":
        return
    dtype, forward = DTYPES[accelerator.mixed_precision], module.forward

    @functools.wraps(forward)
    def autocast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(accelerator.device.type, dtype):
            return convert_to_fp32(forward(*args, **kwargs))

    module.forward = autocast


def autocast_sharded(accelerator: Accelerator, module: nn.Module) -> None:
    """
    The same under FSDP2, whose own way would cast all that comes in, timesteps and latents among it, and return what a
    VAE in float32 does not take. Weights are gathered in the narrow dtype, gradients summed in float32.
    """
    if accelerator.mixed_precision == "no":
        return
    plugin = cast(FullyShardedDataParallelPlugin, accelerator.state.fsdp_plugin)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[accelerator.mixed_precision], reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    autocast_forward(accelerator, module)
