"""Checks before training: can this pipeline be a policy, and is its ratio exactly 1 before the first update?"""

from dataclasses import dataclass
from typing import Any

from diffusers import CacheMixin, DiffusionPipeline, ModelMixin
from torch import nn


DENOISERS = ("transformer", "transformer_2", "unet")
CACHE_HOOKS = ("cache", "fbc", "broadcast")  # words in the names of diffusers' hooks that reuse earlier outputs


def denoisers_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The pipeline's denoisers by component name."""
    return {name: module for name, module in pipe.components.items() if name in DENOISERS and module is not None}


def find_dropout(module: nn.Module) -> list[str]:
    """Names of the submodules that would drop something in train mode."""
    children = module.named_modules()
    return [name for name, child in children if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0]


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """
    Raises:
        `TypeError`: when `pipe` is no diffusers pipeline.
        `ValueError`: when it cannot be recorded and replayed; the message says why, and what to do.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"Expected a diffusers pipeline, as from `from_pretrained`, got a {type(pipe).__name__}.")
    name, denoisers = type(pipe).__name__, denoisers_of(pipe)
    if "Combined" in name:
        raise ValueError(f"{name} runs several pipelines in one; pass the one that denoises, not the wrapper.")
    if "SAG" in name or "AttendAndExcite" in name:
        raise ValueError(f"{name} reads attention maps, which a replay does not have; use another kind of guidance.")
    if not denoisers:
        raise ValueError(f"{name} has no denoiser: expected one of {DENOISERS} in {sorted(pipe.components)}.")
    scheduler: Any = pipe.components.get("scheduler")
    if scheduler is None:
        raise ValueError(f"{name} has no scheduler, so there are no steps to train.")
    if scheduler.order != 1:
        raise ValueError(f"{type(scheduler).__name__} takes {scheduler.order} model calls per step; expected 1.")
    for component, module in denoisers.items():
        _check_denoiser(component, module)


def _check_denoiser(name: str, module: nn.Module) -> None:
    if not isinstance(module, ModelMixin):
        raise ValueError(
            f"{name} is a {type(module).__name__}: put the model within in its place (of a PeftModel by `.unload()`), "
            "and leave peft_config and torch_compile to the trainer."
        )
    if _is_cached(module):
        raise ValueError(f"A cache on {name} returns outputs of earlier steps; call `pipe.{name}.disable_cache()`.")
    if dropped := find_dropout(module):
        raise ValueError(f"{name} has dropout in {len(dropped)} places, as {dropped[0]}; set it or lora_dropout to 0.")


def _is_cached(module: nn.Module) -> bool:
    """Whether a diffusers cache (first block, pyramid attention broadcast, TaylorSeer, ...) hooks into the module."""
    if isinstance(module, CacheMixin) and module.is_cache_enabled:
        return True
    registries = [m.__dict__["_diffusers_hook"] for m in module.modules() if "_diffusers_hook" in m.__dict__]
    return any(word in hook for registry in registries for hook in registry.hooks for word in CACHE_HOOKS)


@dataclass(frozen=True)
class RatioReport:
    """|ratio - 1| before any update, for each trained step of a rollout."""

    deviations: dict[int, float]  # the largest over the batch, by step

    @property
    def worst(self) -> tuple[int, float]:
        """The step with the largest deviation, and that deviation; NaN counts as the largest."""
        return max(self.deviations.items(), key=lambda item: float("inf") if item[1] != item[1] else item[1])

    def problem(self, epsilon: float) -> str | None:
        """The problem, if the ratio is off by more than a tenth of the clip range `epsilon`, or than 1e-5."""
        step, deviation = self.worst
        if deviation <= min(1e-5, epsilon / 10):
            return None
        return (
            f"Before any update the ratio of step {step} should be 1, but it is off by {deviation:.3g} (clip range "
            f"{epsilon:g}). Likely causes: dropout or another random layer in the denoiser, a kernel whose result "
            "varies between calls, or activation_checkpointing where the denoiser computes something else with it."
        )
