"""What is asked of every family, for the tests and for the table in the documentation."""

import torch
from diffusers import DiffusionPipeline
from torch import nn

from slas_trl.policy import PipelineReplayer, Rollout
from slas_trl.policy.checks import denoisers_of

from .family import Family


PROMPTS = ["a red circle", "two dogs in the snow"]


def sampled(family: Family, **changes) -> tuple[PipelineReplayer, Rollout]:
    """A pipeline with its denoisers trained, and a rollout of two images, of two prompts where a call takes two."""
    pipe = family.build()
    for denoiser in denoisers_of(pipe).values():
        denoiser.requires_grad_(True)
    replayer = PipelineReplayer(pipe)
    return replayer, replayer.sample(**family.arguments(list(PROMPTS), **changes))


@torch.no_grad()
def largest_error(replayer: PipelineReplayer, rollout: Rollout) -> float:
    """The largest |Δ log p| of any trainable step and image; NaN counts as infinite."""
    errors = torch.stack(
        [replayer.replay(rollout, step).log_prob - rollout.log_probs[:, step] for step in rollout.trainable_steps]
    )
    return errors.abs().nan_to_num(torch.inf).max().item()


def free_frozen_components(replayer: PipelineReplayer) -> list[str]:
    """Move all but the denoisers to where there is no data; returns their names."""
    freed = {
        name: module
        for name, module in replayer.pipe.components.items()
        if isinstance(module, nn.Module) and name not in replayer.models
    }
    for module in freed.values():
        module.to("meta")
    return sorted(freed)


def attention_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices of the attention layers, by name."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.ndim == 2 and ("attn" in name or "attention" in name)
    }


def identities(pipe: DiffusionPipeline) -> tuple:
    """What must be the same objects after a call as before."""
    components = {
        name: {key: id(value) for key, value in component.__dict__.items() if not key.startswith("_")}
        for name, component in pipe.components.items()
        if isinstance(component, nn.Module)
    }
    processors = [
        id(layer.processor)
        for component in pipe.components.values()
        if isinstance(component, nn.Module)
        for layer in component.modules()
        if "processor" in layer.__dict__
    ]
    return type(pipe), {key: id(value) for key, value in pipe.__dict__.items()}, components, processors
