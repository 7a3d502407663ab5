"""Checks before training: can this pipeline be a policy, and is its ratio exactly 1 before the first update?"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import CacheMixin, DiffusionPipeline, ModelMixin, PipelineQuantizationConfig
from torch import nn
from torch.utils import _pytree as pytree


if TYPE_CHECKING:
    from .replayer import PipelineReplayer
    from .rollout import Rollout


DENOISERS = ("transformer", "transformer_2", "unet")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
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
    `DiffusionPipeline.from_pretrained`, which knows the classes of diffusers alone, and of what a folder lacks says
    only that some file is not there; and takes `dtype` (or `torch_dtype`), for one component or all, as a
    `torch.dtype` alone; here "bfloat16" is one; and `quantization_config` may be the arguments of a
    `PipelineQuantizationConfig`.

    Raises:
        `ValueError`: when there is no such pipeline, or one without a denoiser, and for arguments that do not fit.
    """
    folder, kind = Path(name_or_path), DiffusionPipeline
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{name_or_path!r} holds no diffusers pipeline: there is no model_index.json in it.")
    try:
        if folder.is_dir():
            kind = _class_of(json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
            if not any((folder / name / "config.json").is_file() for name in DENOISERS):
                raise ValueError(f"there is no denoiser: no folder in it is one of {DENOISERS}, with a config.json")
        named = {key: _dtype(value) for key, value in init_kwargs.items() if key in ("dtype", "torch_dtype")}
        if isinstance(quantization := init_kwargs.get("quantization_config"), dict):
            named["quantization_config"] = PipelineQuantizationConfig(**quantization)
        return kind.from_pretrained(name_or_path, **{**init_kwargs, **named})
    except Exception as error:  # of files, the Hub, devices or what is in a folder: too many kinds to name
        why = f"{type(error).__name__}: {str(error).rstrip('.')}"
        options = f" with {', '.join(init_kwargs)}" if init_kwargs else ""  # not their values: a token
        raise ValueError(f"{name_or_path!r} cannot be loaded as a pipeline{options}: {why}.") from error


def _class_of(name: str) -> type[DiffusionPipeline]:
    """Where diffusers has no pipeline of that name, the one that has been defined elsewhere, as `ShapesPipeline`."""
    kinds = [DiffusionPipeline]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind for kind in kinds if kind.__name__ == name and name not in dir(diffusers)), DiffusionPipeline)


def _dtype(value: Any) -> Any:
    if isinstance(value, dict):
        return {component: _dtype(name) for component, name in value.items()}
    if not isinstance(value, str):
        return value
    if value not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, but it is {value!r}.")
    return DTYPES[value]


def pipeline_problems(pipe: DiffusionPipeline) -> Iterator[str]:
    """
    All that keeps `pipe` from being recorded and replayed: why, and what to do.

    Raises:
        `TypeError`: when `pipe` is no diffusers pipeline.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(
            f"Expected a diffusers pipeline, but got a {type(pipe).__name__}. Load one with "
            "`DiffusionPipeline.from_pretrained(...)`."
        )
    name = type(pipe).__name__
    denoisers = denoisers_of(pipe)
    if "Combined" in name:
        yield f"{name} runs several pipelines in one; pass the one that denoises, not the wrapper."
    if "SAG" in name or "AttendAndExcite" in name:
        yield f"{name} reads the denoiser's attention maps, which a replay has not; take another kind of guidance."
    if not denoisers:
        yield (
            f"{name} has no denoiser: expected a component named one of {DENOISERS}, but its components are "
            f"{sorted(pipe.components)}."
        )
    scheduler: Any = pipe.components.get("scheduler")
    if scheduler is None:
        yield f"{name} has no scheduler, so there are no steps to train."
    elif scheduler.order != 1:
        yield (
            f"{type(scheduler).__name__} takes {scheduler.order} model calls per step (order {scheduler.order}); "
            "expected one. Load the pipeline with a first-order scheduler."
        )
    for component, module in denoisers.items():
        if not isinstance(module, ModelMixin):
            yield (
                f"{component} is a {type(module).__name__}, no model of diffusers: put the one within in its place "
                "(a PeftModel's by `.merge_and_unload()`, or `.unload()` without what its adapter has learned), and "
                "leave the rest to the trainer: peft_config, torch_compile, `accelerate launch`."
            )
        if _is_cached(module):
            yield (
                f"A cache is enabled on {component}: it answers with outputs of earlier steps, so a step cannot be "
                f"evaluated on its own. Call `pipe.{component}.disable_cache()` first."
            )
        dropped = find_dropout(module)
        if dropped:
            yield (
                f"{component} has dropout in {len(dropped)} place(s), the first {dropped[0]!r}; then the ratio is not "
                "1 before an update. Set dropout (lora_dropout too) to 0."
            )


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """
    Raises:
        `TypeError`: when `pipe` is no diffusers pipeline.
        `ValueError`: with the first of its [`pipeline_problems`].
    """
    for problem in pipeline_problems(pipe):
        raise ValueError(problem)


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

    def problem(self, epsilon: float) -> str | None:
        """What is wrong, if the ratio is off by more than a tenth of the clip range `epsilon`, or than 1e-5."""
        step, deviation = self.worst
        if deviation <= min(1e-5, epsilon / 10):
            return None
        return (
            f"Before any update the ratio of step {step} should be 1, but it is off by {deviation:.3g} (clip range "
            f"{epsilon:g}). Likely causes: dropout or another random layer in the denoiser, a kernel whose result "
            "varies between calls, or activation_checkpointing where the denoiser computes something else with it."
        )


def measure_ratio(
    replayer: "PipelineReplayer", rollout: "Rollout", steps: tuple[int, ...] | None = None
) -> RatioReport:
    """
    Replay the given steps (by default all trainable ones) and compare with the recorded log-probabilities.

    Gradients stay as the caller has them, since kernels may differ with and without them. Samples whose recorded
    log-probability is NaN are left out, unless all are.
    """
    deviations = {}
    for step in steps if steps is not None else rollout.trainable_steps:
        recorded = rollout.log_probs[:, step]
        deviation = (torch.exp(replayer.replay(rollout, step).log_prob.detach() - recorded) - 1).abs()
        finite = deviation[recorded.isfinite()]
        deviations[step] = (finite if len(finite) else deviation).max().item()
    return RatioReport(deviations)


def samples_per_call(rollout: "Rollout") -> list[tuple[int, ...]]:
    """For each step, how many samples the denoiser got in each of its calls: twice the images under guidance."""
    return [tuple(_batch_of(output) for output in step.outputs) for step in rollout.steps]


def _batch_of(output: Any) -> int:
    if isinstance(output, dict):  # diffusers' outputs are
        output = next(iter(output.values()))
    elif isinstance(output, tuple):
        output = output[0]
    return len(output)  # a tensor, or a list with a tensor for each sample


def rollout_bytes(rollout: "Rollout") -> int:
    """What a rollout keeps for its replays: latents, the denoiser's outputs, and the memo."""
    kept = [(step.sample, step.prev_sample, step.outputs) for step in rollout.steps]
    return sum(_storages(pytree.tree_leaves([kept, [answer.result for answer in rollout.memo]])).values())


@contextmanager
def counting_activations(*known: Any) -> Iterator[dict[int, int]]:
    """
    Bytes that autograd keeps for a backward pass, by storage, without those in `known`: modules, and pytrees of
    tensors. With gradient checkpointing these are the inputs of its blocks.
    """
    modules = [module for module in known if isinstance(module, nn.Module)]
    weights = [[*module.parameters(), *module.buffers()] for module in modules]
    others = _storages(pytree.tree_leaves([known, weights]))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.update({at: size for at, size in _storages([tensor]).items() if at not in others})
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _storages(leaves: list[Any]) -> dict[int, int]:
    """Size in bytes of each storage under the tensors among `leaves`, by its address."""
    storages = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
