"""Records of one pipeline call: what has to be known to execute it again, step by step."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree


class ReplayError(ValueError):
    """The pipeline, called again with the same arguments, did not do the same."""


@dataclass
class Step:
    """One denoising step: x_t is `sample`, x_{t-1} `prev_sample`, both `(B, ...)` in the pipeline's latent dtype."""

    index: int  # position in the scheduler's timesteps
    sample: torch.Tensor
    prev_sample: torch.Tensor
    std: float  # 0 for a deterministic step
    outputs: list[Any]  # what the denoiser returned, in call order (two calls with some kinds of guidance)


@dataclass
class Answer:
    """What a frozen component returned, and how it left the sources of random numbers."""

    name: str
    result: Any
    random_states: list[torch.Tensor]


@dataclass
class StepOutput:
    """The step policy at the present weights. All but `std` carry the graph when gradients are enabled."""

    model_output: torch.Tensor  # (B, ...) the pipeline's prediction after guidance
    mean: torch.Tensor  # (B, ...) float32
    std: torch.Tensor  # () float32
    log_prob: torch.Tensor  # (B,) float32, of the recorded x_{t-1}


@dataclass
class Rollout:
    """
    A batch of trajectories, sampled by one pipeline call.

    Attributes:
        images: the first field of the pipeline's output: B `PIL.Image.Image` unless `output_type` says otherwise.
        problems (`list[str | None]`): for each of them why it cannot be judged, if it cannot.
        log_probs (`torch.Tensor`): `(B, T)`, float32, mean over non-batch elements; NaN at deterministic steps.
        trainable_steps (`tuple[int, ...]`): positions in `steps` that have a density.
        steps (`list[Step]`): the T recorded steps.
        memo (`list[Answer]`): what frozen components returned, in call order.
        random_states (`list[torch.Tensor]`): of the call's generators and of torch's global ones, as sampling began.
    """

    images: Any
    log_probs: torch.Tensor
    trainable_steps: tuple[int, ...]
    steps: list[Step]
    call: dict[str, Any]
    random_states: list[torch.Tensor]
    window: range | None = None
    memo: list[Answer] = field(default_factory=list)
    problems: list[str | None] = field(default_factory=list)

    def __len__(self) -> int:
        return self.log_probs.shape[0]

    def state(self) -> dict[str, Any]:
        """
        What cannot be computed again without the weights that sampled, as tensors and plain values, for `torch.save`;
        [`PipelineReplayer.restore`] does the rest. Images are left out.
        """
        steps = []
        for step in self.steps:
            leaves, structure = pytree.tree_flatten(step.outputs)
            steps.append(
                {
                    "index": step.index,
                    "sample": step.sample,
                    "prev_sample": step.prev_sample,
                    "std": step.std,
                    "leaves": leaves,
                    "structure": pytree.treespec_dumps(structure),
                }
            )
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
        steps = [
            Step(
                step["index"],
                step["sample"],
                step["prev_sample"],
                step["std"],
                pytree.tree_unflatten(step["leaves"], pytree.treespec_loads(step["structure"])),
            )
            for step in state["steps"]
        ]
        return cls(
            images=None,
            log_probs=state["log_probs"],
            trainable_steps=tuple(state["trainable_steps"]),
            steps=steps,
            call=call,
            random_states=state["random_states"],
            window=None if state["window"] is None else range(*state["window"]),
        )
