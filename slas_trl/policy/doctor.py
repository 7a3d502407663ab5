"""Checks before training: can this pipeline be a policy, and is its ratio exactly 1 before the first update?"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import CacheMixin, DiffusionPipeline
from torch import nn


if TYPE_CHECKING:
    from .replayer import PipelineReplayer
    from .rollout import Rollout


DENOISERS = ("transformer", "transformer_2", "unet")
CACHE_HOOKS = ("cache", "fbc", "broadcast")  # words in the names of diffusers' hooks that reuse earlier outputs


def denoisers_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The pipeline's denoisers by component name."""
    return {name: module for name, module in pipe.components.items() if name in DENOISERS and module is not None}


def find_dropout(module: nn.Module) -> list[str]:
    """Names of the submodules that would drop something in train mode."""
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0
    ]


def _is_cached(module: nn.Module) -> bool:
    """Whether a diffusers cache (first block, pyramid attention broadcast, TaylorSeer, ...) hooks into the module."""
    if isinstance(module, CacheMixin) and module.is_cache_enabled:
        return True
    registries = [m.__dict__["_diffusers_hook"] for m in module.modules() if "_diffusers_hook" in m.__dict__]
    return any(word in hook for registry in registries for hook in registry.hooks for word in CACHE_HOOKS)


def load_pipeline(name_or_path: str, init_kwargs: dict[str, Any]) -> DiffusionPipeline:
    """
    `DiffusionPipeline.from_pretrained`, which of a folder without a denoiser says only that some file is not there.
    Its dtype may be given by name.

    Raises:
        `ValueError`: when the folder holds no pipeline, or one without a denoiser, or there is no such dtype.
    """
    for key in ("dtype", "torch_dtype"):
        if isinstance(name := init_kwargs.get(key), str):
            init_kwargs = {**init_kwargs, key: _dtype_of(name)}
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{name_or_path!r} holds no diffusers pipeline: there is no model_index.json in it.")
        if not any((folder / name / "config.json").is_file() for name in DENOISERS):
            raise ValueError(
                f"{name_or_path!r} has no denoiser: expected a folder named one of {DENOISERS} in it, with a "
                "config.json."
            )
    return DiffusionPipeline.from_pretrained(name_or_path, **init_kwargs)


def _dtype_of(name: str) -> torch.dtype:
    dtype = vars(torch).get(name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"There is no dtype {name!r}; expected one of torch's, such as 'bfloat16'.")
    return dtype


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """
    Raises:
        `TypeError`: when `pipe` is no diffusers pipeline.
        `ValueError`: when it cannot be recorded and replayed; the message says why and what to do.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(
            f"Expected a diffusers pipeline, but got a {type(pipe).__name__}. Load one with "
            "`DiffusionPipeline.from_pretrained(...)`."
        )
    name = type(pipe).__name__
    denoisers = denoisers_of(pipe)
    if "Combined" in name:
        raise ValueError(f"{name} runs several pipelines in one; pass the one that denoises, not the wrapper.")
    if not denoisers:
        raise ValueError(
            f"{name} has no denoiser: expected a component named one of {DENOISERS}, but its components are "
            f"{sorted(pipe.components)}."
        )
    if pipe.components.get("scheduler") is None:
        raise ValueError(f"{name} has no scheduler, so there are no steps to train.")
    if pipe.scheduler.order != 1:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} takes {pipe.scheduler.order} model calls per step (order "
            f"{pipe.scheduler.order}); expected one. Load the pipeline with a first-order scheduler."
        )
    for component, module in denoisers.items():
        if _is_cached(module):
            raise ValueError(
                f"A cache is enabled on {component}: it answers with outputs of earlier steps, so a step cannot be "
                f"evaluated on its own. Call `pipe.{component}.disable_cache()` first."
            )
        dropped = find_dropout(module)
        if dropped:
            raise ValueError(
                f"{component} has dropout in {len(dropped)} place(s), the first {dropped[0]!r}; then the ratio is not "
                "1 before an update. Set dropout (lora_dropout too) to 0."
            )


@dataclass(frozen=True)
class RatioReport:
    """
    |ratio - 1| before any update, for each trained step of a rollout.

    Attributes:
        deviations (`dict[int, float]`): largest |ratio - 1| over the batch, by step.
    """

    deviations: dict[int, float]

    @property
    def worst(self) -> tuple[int, float]:
        """The step with the largest deviation, and that deviation; NaN counts as the largest."""
        return max(self.deviations.items(), key=lambda item: float("inf") if item[1] != item[1] else item[1])


def measure_ratio(
    replayer: "PipelineReplayer", rollout: "Rollout", steps: tuple[int, ...] | None = None
) -> RatioReport:
    """
    Replay the given steps (by default all trainable ones) and compare with the recorded log-probabilities.

    Gradients stay as the caller has them, since kernels may differ with and without them.
    """
    deviations = {}
    for step in steps if steps is not None else rollout.trainable_steps:
        log_prob = replayer.replay(rollout, step).log_prob.detach()
        deviations[step] = (torch.exp(log_prob - rollout.log_probs[:, step]) - 1).abs().max().item()
    return RatioReport(deviations)
