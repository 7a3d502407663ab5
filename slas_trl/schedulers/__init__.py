"""Stochastic diffusers schedulers: each step of the sampler is a Gaussian with a known mean and standard deviation."""

from .conversion import stochastic_scheduler
from .ddim_sde import DDIMSDEScheduler
from .flow_sde import FlowSDEScheduler
from .gaussian_step import StepController, StochasticScheduler


__all__ = ["DDIMSDEScheduler", "FlowSDEScheduler", "StepController", "StochasticScheduler", "stochastic_scheduler"]
