"""Records of one pipeline call: what has to be known to execute it again, step by step."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree


class ReplayError(ValueError):
    """The pipeline, called again with the same arguments, did not do the same."""


@dataclass
class Step:
    """One recorded denoising step."""

    index: int  # position in the scheduler's timesteps
    sample: torch.Tensor  # x_t, (B, ...) in the pipeline's latent dtype
    prev_sample: torch.Tensor  # x_{t-1}, of the same shape and dtype
    std: float  # of the noise that was added; 0 for a deterministic step
    outputs: list[Any]  # what the denoiser returned, in call order (two calls with some kinds of guidance)


@dataclass
class FrozenOutput:
    """The result of a frozen component while sampling, so that it need not run during a replay."""

    name: str  # "encode_prompt", "vae.encode", "text_encoder.forward", ...
    result: Any
    random_states: list[torch.Tensor]  # uint8: the sources of random numbers, as the component left them


@dataclass
class StepOutput:
    """The step policy at the present weights. All but `std` carry the graph when gradients are enabled."""

    model_output: torch.Tensor  # (B, ...) the pipeline's prediction after guidance
    mean: torch.Tensor  # (B, ...) float32
    std: torch.Tensor  # () float32
    log_prob: torch.Tensor  # (B,) float32, of the recorded x_{t-1}


@dataclass
class Rollout:
    """A batch of B trajectories of T steps, sampled by one pipeline call."""

    images: Any  # the first field of the pipeline's output: B `PIL.Image.Image` unless `output_type` says otherwise
    log_probs: torch.Tensor  # (B, T) float32, mean over non-batch elements; NaN at deterministic steps
    trainable_steps: tuple[int, ...]  # positions in `steps` that have a density
    steps: list[Step]
    call: dict[str, Any]  # arguments of the pipeline's `__call__`, as they were given
    random_states: list[torch.Tensor]  # uint8: the call's generators, then torch's global ones, before the call
    window: range | None = None  # schedule indices of the stochastic steps; `None` for all
    memo: list[FrozenOutput] = field(default_factory=list)  # in call order
    problems: list[str | None] = field(default_factory=list)  # for each image why it cannot be scored, or `None`

    def __len__(self) -> int:
        return self.log_probs.shape[0]

    def state(self) -> dict[str, Any]:
        """
        All that needs the weights that sampled, as tensors and plain values for `torch.save`.
        [`PipelineReplayer.restore`] computes the rest; images are left out.
        """
        steps = []
        for step in self.steps:
            leaves, structure = pytree.tree_flatten(step.outputs)
            tensors = {name: value for name, value in vars(step).items() if name != "outputs"}
            steps.append({**tensors, "leaves": leaves, "structure": pytree.treespec_dumps(structure)})
        return {
            "log_probs": self.log_probs,
            "trainable_steps": self.trainable_steps,
            "steps": steps,
            "window": None if self.window is None else (self.window.start, self.window.stop, self.window.step),
            "random_states": self.random_states,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], call: dict[str, Any]) -> "Rollout":
        """The rollout with an empty memo; see [`PipelineReplayer.restore`]."""
        steps = []
        for step in state["steps"]:
            outputs = pytree.tree_unflatten(step["leaves"], pytree.treespec_loads(step["structure"]))
            steps.append(Step(step["index"], step["sample"], step["prev_sample"], step["std"], outputs))
        return cls(
            images=None,
            log_probs=state["log_probs"],
            trainable_steps=tuple(state["trainable_steps"]),
            steps=steps,
            call=call,
            random_states=state["random_states"],
            window=None if state["window"] is None else range(*state["window"]),
        )
