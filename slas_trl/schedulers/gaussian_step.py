"""Shared by the stochastic schedulers: one Gaussian step, its log-probability, and who decides the next sample."""

import math
from typing import Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor


class StepController(Protocol):
    """Takes over `step`: a recorder while sampling, a replayer while training."""

    def step(
        self, scheduler: "StochasticScheduler", model_output: torch.Tensor, sample: torch.Tensor, index: int
    ) -> torch.Tensor:
        """Return x_{t-1}, given the pipeline's `model_output` for x_t = `sample` at step `index` of the schedule."""
        ...


class StochasticScheduler:
    """Mixin for a diffusers scheduler whose step is x_{t-1} ~ N(mean, std²)."""

    timesteps: torch.Tensor
    controller: StepController | None = None  # decides x_{t-1}; `None` draws it from the Gaussian
    # Indices of the stochastic steps, by default all; the others are the stock scheduler's deterministic ones, std 0.
    window: range | None = None
    noisy_final_step: bool = True  # whether the last step, whose noise stays on the image, may be stochastic

    def transition(
        self, model_output: torch.Tensor, sample: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The Gaussian of one step: mean `(B, ...)` and std `()`, both float32, in latent units.

        Args:
            model_output (`torch.Tensor`): the pipeline's prediction after guidance, `(B, ...)`, any dtype.
            sample (`torch.Tensor`): x_t, `(B, ...)`.
            index (`int`): position in `timesteps`, from 0 at the noise.
        """
        raise TypeError(f"{type(self).__name__} does not define transition().")

    @staticmethod
    def log_prob(mean: torch.Tensor, std: torch.Tensor, prev_sample: torch.Tensor) -> torch.Tensor:
        """
        log N(prev_sample; mean, std²), averaged over the non-batch elements, as every public trainer of diffusion
        models does; so ratios and clip ranges do not grow with the resolution. `(B,)`, float32.

        Args:
            mean (`torch.Tensor`): `(B, ...)`.
            std (`torch.Tensor`): broadcastable to `mean`; a step with std 0 has no density and gives NaN.
            prev_sample (`torch.Tensor`): x_{t-1}, `(B, ...)`.
        """
        std = std.float()
        z = (prev_sample.float() - mean.float()) / std
        log_density = -0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)
        return torch.where(std > 0, log_density, torch.nan).flatten(1).mean(1)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """The model's input is the sample itself."""
        return sample

    def is_stochastic(self, index: int) -> bool:
        """Whether noise is added at this step."""
        may_be = self.noisy_final_step or index < len(self.timesteps) - 1
        return may_be and (self.window is None or index in self.window)

    def _next_sample(
        self, model_output: torch.Tensor, sample: torch.Tensor, index: int, generator: torch.Generator | None
    ) -> torch.Tensor:
        if self.controller is not None:
            return self.controller.step(self, model_output, sample, index)
        mean, std = self.transition(model_output, sample, index)
        noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return (mean + std * noise).to(sample.dtype)
