"""Which stochastic scheduler stands in for a pipeline's own."""

import inspect

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from .ddim_sde import PREDICTION_TYPES, DDIMSDEScheduler
from .flow_sde import FlowSDEScheduler


def stochastic_scheduler(
    pipe: DiffusionPipeline, *, noise_schedule: str = "flow_grpo", noise_level: float | None = None, eta: float = 1.0
) -> FlowSDEScheduler | DDIMSDEScheduler:
    """
    Convert `pipe.scheduler` by its configuration: flow matching becomes [`FlowSDEScheduler`], ε-, v- and x0-prediction
    becomes [`DDIMSDEScheduler`]. Another solver and its choice of timesteps give way to those of the stock
    `FlowMatchEulerDiscreteScheduler` or `DDIMScheduler`; the noise schedule that the model was trained with remains.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): the pipeline; it is not changed.
        noise_schedule (`str`, *optional*, defaults to `"flow_grpo"`): for flow matching.
        noise_level (`float`, *optional*): for flow matching; by default 0.3 for "dance_grpo", else 0.7.
        eta (`float`, *optional*, defaults to `1.0`): for DDIM.

    Raises:
        `ValueError`: when the scheduler has neither a flow nor a beta schedule, or samples a consistency model.
    """
    scheduler = pipe.scheduler  # type: ignore[attr-defined]
    config = dict(scheduler.config)
    is_flow_euler = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    if is_flow_euler or config.get("use_flow_sigmas"):
        config.setdefault("shift", config.get("flow_shift", 1.0))
        level = noise_level if noise_level is not None else 0.3 if noise_schedule == "dance_grpo" else 0.7
        converted = FlowSDEScheduler(
            **_known(config, FlowMatchEulerDiscreteScheduler), noise_schedule=noise_schedule, noise_level=level
        )
        if is_flow_euler:
            converted.set_shift(scheduler.shift)  # the configuration does not know of an earlier set_shift
        return converted
    is_distilled = "original_inference_steps" in config  # LCM, TCD: their models are no noise predictors for DDIM
    if "beta_schedule" in config and config.get("prediction_type", "epsilon") in PREDICTION_TYPES and not is_distilled:
        # Schedulers without this switch do not clip, whereas DDIM clips by default.
        config.setdefault("clip_sample", False)
        converted = DDIMSDEScheduler(**_known(config, DDIMScheduler), eta=eta)
        if not torch.allclose(converted.alphas_cumprod, scheduler.alphas_cumprod.float(), atol=1e-5):
            # Shifted in ways that DDIM has no argument for (CogView 3+).
            products = torch.cat([torch.ones(1, dtype=torch.float64), scheduler.alphas_cumprod.double()])
            config["trained_betas"] = (1 - products[1:] / products[:-1]).tolist()
            converted = DDIMSDEScheduler(**_known(config, DDIMScheduler), eta=eta)
        # Some pipelines ask for this entry of DDPM's configuration; a variance that is predicted too is not used.
        converted.register_to_config(variance_type="fixed_small")
        return converted
    raise ValueError(
        f"{type(scheduler).__name__} has neither flow matching nor betas with epsilon, v or sample prediction. "
        "Load the pipeline with such a one, or pass `scheduler=FlowSDEScheduler(...)` or `DDIMSDEScheduler(...)`."
    )


def _known(config: dict, scheduler: type) -> dict:
    """The entries that the scheduler's class has arguments for."""
    parameters = inspect.signature(scheduler.__init__).parameters
    return {key: value for key, value in config.items() if key in parameters}
