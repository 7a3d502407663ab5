"""
Flow-matching models as stochastic policies (paper, Eq. 3 and 4).

With velocity v, noise level σ from 1 to 0 and dt = σ' - σ < 0, one step is

    μ  = x·(1 + s²·dt/(2σ)) + v·dt·(1 + s²·(1-σ)/(2σ))
    x' = μ + s·√(-dt)·ε

The noise schedule s(σ) is Flow-GRPO's a·√(σ/(1-σ)) (https://huggingface.co/papers/2505.05470) or DanceGRPO's constant
η (https://huggingface.co/papers/2505.07818). Coefficients-preserving sampling (https://huggingface.co/papers/2509.05952)
replaces the step altogether, so that the sample keeps the noise level σ' that the model expects, s' of it fresh:

    x0 = x - σv,  x1 = x + (1-σ)v,  s' = σ'·sin(aπ/2)
    x' = (1-σ')·x0 + √(σ'²-s'²)·x1 + s'·ε
"""

import math
from typing import Literal

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,  # noqa: F401  DiffusionPipeline.from_pretrained looks for it here, to know what it loads
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from .gaussian_step import StochasticScheduler


NOISE_SCHEDULES = ("flow_grpo", "dance_grpo", "cps")


class FlowSDEScheduler(StochasticScheduler, FlowMatchEulerDiscreteScheduler):
    """
    [`~diffusers.FlowMatchEulerDiscreteScheduler`] with Gaussian steps. At `noise_level=0` it is the stock scheduler.

    Args:
        noise_schedule (`str`, *optional*, defaults to `"flow_grpo"`):
            `"flow_grpo"`, `"dance_grpo"` or `"cps"`.
        noise_level (`float`, *optional*, defaults to `0.7`):
            a of Flow-GRPO and of CPS, η of DanceGRPO (which uses 0.3).

    The other arguments are those of the stock scheduler.
    """

    sigmas: torch.Tensor
    init_noise_sigma = 1.0  # the stock scheduler has none, but the solvers do that it may stand in for

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        noise_schedule: str = "flow_grpo",
        noise_level: float = 0.7,
    ):
        if noise_schedule not in NOISE_SCHEDULES:
            raise ValueError(f"noise_schedule must be one of {NOISE_SCHEDULES}, but it is {noise_schedule!r}.")
        if noise_level < 0 or (noise_schedule == "cps" and noise_level > 1):
            raise ValueError(f"noise_level must be at least 0 (and at most 1 with 'cps'), but it is {noise_level}.")
        if invert_sigmas:
            raise ValueError("invert_sigmas=True runs from data to noise; its steps are not supported as a policy.")
        if stochastic_sampling:
            raise ValueError("stochastic_sampling=True ignores noise_level; noise_schedule='cps' at 1 is the same.")
        FlowMatchEulerDiscreteScheduler.__init__(
            self,
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,  # type: ignore[arg-type]
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )

    def transition(
        self, model_output: torch.Tensor, sample: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, v = sample.float(), model_output.float()
        sigma, sigma_next = self.sigmas[index].to(x.device), self.sigmas[index + 1].to(x.device)
        dt = sigma_next - sigma
        level = self.config["noise_level"]
        if not self.is_stochastic(index) or level == 0:
            return x + dt * v, torch.zeros_like(sigma)
        if self.config["noise_schedule"] == "cps":
            std = sigma_next * math.sin(level * math.pi / 2)  # s'
            x0, x1 = x - sigma * v, x + (1 - sigma) * v
            return (1 - sigma_next) * x0 + (sigma_next.square() - std.square()).clamp(min=0).sqrt() * x1, std
        s = self._noise_scale(sigma)
        mean = x * (1 + s**2 * dt / (2 * sigma)) + v * dt * (1 + s**2 * (1 - sigma) / (2 * sigma))
        return mean, s * (-dt).sqrt()

    def _noise_scale(self, sigma: torch.Tensor) -> torch.Tensor:
        """s(σ). Flow-GRPO's is infinite at σ = 1; there, and next to it, the denominator takes the second σ."""
        if self.config["noise_schedule"] == "dance_grpo":
            return torch.full_like(sigma, self.config["noise_level"])
        # A shift leaves the first σ within rounding of 1, on either side; other schedules begin a little below.
        bounded = torch.where(sigma >= 1 - 1e-3, sigma.minimum(self.sigmas[1].to(sigma.device)), sigma)
        return self.config["noise_level"] * (sigma.clamp(max=1) / (1 - bounded)).sqrt()

    def step(
        self,
        model_output: torch.FloatTensor,
        timestep: float | torch.FloatTensor,
        sample: torch.FloatTensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple:
        """One stochastic step; the signature is the stock scheduler's, because pipelines inspect it."""
        if per_token_timesteps is not None:
            raise ValueError("per_token_timesteps gives every token its own noise level; such a step has no policy.")
        if self.step_index is None:
            self._init_step_index(timestep)
        index: int = self.step_index  # type: ignore[assignment]
        prev_sample = self._next_sample(model_output, sample, index, generator)
        self._step_index = index + 1
        if not return_dict:
            return (prev_sample,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample)  # type: ignore[arg-type]
