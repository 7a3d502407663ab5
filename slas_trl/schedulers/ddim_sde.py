"""
Diffusion models with ε-, v- or x0-prediction as stochastic policies: DDIM with η, Eq. 12 and 16 of
https://huggingface.co/papers/2010.02502.

With ᾱ the product of the schedule's alphas at t and ᾱ' at the next step,

    std = η·√((1-ᾱ')/(1-ᾱ))·√(1-ᾱ/ᾱ')
    μ   = √ᾱ'·x̂0 + √(1-ᾱ'-std²)·ε̂
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    SchedulerMixin,  # noqa: F401  DiffusionPipeline.from_pretrained looks for it here, to know what it loads
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

from .gaussian_step import StochasticScheduler


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


class DDIMSDEScheduler(StochasticScheduler, DDIMScheduler):
    """
    [`~diffusers.DDIMScheduler`] with Gaussian steps. At `eta=0` it is the stock scheduler.

    Args:
        eta (`float`, *optional*, defaults to `1.0`):
            Share of the posterior's noise: 0 is deterministic, 1 is DDPM. It replaces the `eta` of `step`, which
            pipelines pass as 0.

    The other arguments are those of the stock scheduler. The last step has std 0 with `set_alpha_to_one=True`, and is
    then not trainable.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading",
        rescale_betas_zero_snr: bool = False,
        eta: float = 1.0,
    ):
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be between 0 (deterministic) and 1 (DDPM), but it is {eta}.")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, but it is {prediction_type!r}.")
        DDIMScheduler.__init__(
            self,
            num_train_timesteps=num_train_timesteps,
            beta_start=beta_start,
            beta_end=beta_end,
            beta_schedule=beta_schedule,
            trained_betas=trained_betas,  # type: ignore[arg-type]
            clip_sample=clip_sample,
            set_alpha_to_one=set_alpha_to_one,
            steps_offset=steps_offset,
            prediction_type=prediction_type,
            thresholding=thresholding,
            dynamic_thresholding_ratio=dynamic_thresholding_ratio,
            clip_sample_range=clip_sample_range,
            sample_max_value=sample_max_value,
            timestep_spacing=timestep_spacing,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
        )

    def transition(
        self, model_output: torch.Tensor, sample: torch.Tensor, index: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.num_inference_steps is None:
            raise ValueError("The scheduler has no timesteps yet; call set_timesteps(num_inference_steps) first.")
        x, output = sample.float(), model_output.float()
        t = int(self.timesteps[index])
        previous = t - self.config["num_train_timesteps"] // self.num_inference_steps
        alpha = self.alphas_cumprod[t].to(x.device)
        alpha_next = (self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod).to(x.device)

        if self.config["prediction_type"] == "epsilon":
            x0, eps = (x - (1 - alpha).sqrt() * output) / alpha.sqrt(), output
        elif self.config["prediction_type"] == "sample":
            x0, eps = output, (x - alpha.sqrt() * output) / (1 - alpha).sqrt()
        else:
            x0 = alpha.sqrt() * x - (1 - alpha).sqrt() * output
            eps = alpha.sqrt() * output + (1 - alpha).sqrt() * x
        if self.config["thresholding"]:
            x0 = self._threshold_sample(x0)
        elif self.config["clip_sample"]:
            x0 = x0.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])

        share = torch.zeros_like(alpha)  # of the variance 1-ᾱ' that is fresh noise; exactly η² at ᾱ = 0
        if self.is_stochastic(index):
            share = self.config["eta"] ** 2 * ((1 - alpha / alpha_next) / (1 - alpha)).clamp(min=0, max=1)
        std = ((1 - alpha_next) * share).sqrt()
        return alpha_next.sqrt() * x0 + ((1 - alpha_next) * (1 - share)).sqrt() * eps, std

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int,
        sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple:
        """One stochastic step; the signature is the stock scheduler's, because pipelines inspect it."""
        if use_clipped_model_output or variance_noise is not None:
            raise ValueError("use_clipped_model_output and variance_noise change the step's Gaussian; leave them out.")
        if eta not in (0, self.config["eta"]):
            raise ValueError(f"eta is the scheduler's ({self.config['eta']}), but step got {eta}; leave it out.")
        at = (self.timesteps.to("cpu") == int(timestep)).nonzero()
        if len(at) != 1:
            raise ValueError(f"Timestep {int(timestep)} is {len(at)} times in the schedule; expected exactly once.")
        prev_sample = self._next_sample(model_output, sample, int(at[0]), generator)
        return DDIMSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
