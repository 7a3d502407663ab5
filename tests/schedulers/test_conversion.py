from typing import Any

import diffusers
import pytest
import torch

from slas_trl.policy import PipelineReplayer
from slas_trl.schedulers import DDIMSDEScheduler, FlowSDEScheduler, stochastic_scheduler
from tests.tiny_pipelines import flux_pipeline, sd3_pipeline, sd_pipeline


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def converted(scheduler, **options):
    pipe = sd_pipeline()
    pipe.scheduler = scheduler
    return stochastic_scheduler(pipe, **options)


def test_the_scheduler_that_stable_diffusion_comes_with():
    pndm = diffusers.PNDMScheduler(**BETAS, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)
    ddim = converted(pndm)
    assert type(ddim) is DDIMSDEScheduler and ddim.config.eta == 1.0
    assert ddim.config.clip_sample is False  # PNDM does not know of it, and DDIM would clip latents at 1
    assert ddim.config.set_alpha_to_one is False and ddim.config.steps_offset == 1
    torch.testing.assert_close(ddim.alphas_cumprod, pndm.alphas_cumprod, rtol=0, atol=0)
    ddim.set_timesteps(50)
    assert ddim.timesteps.tolist() == list(range(981, 0, -20))


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(
            **BETAS, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
        ),
        diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample_range=2.0),
        diffusers.DPMSolverMultistepScheduler(**BETAS, algorithm_type="dpmsolver++", use_karras_sigmas=True),
        diffusers.UniPCMultistepScheduler(**BETAS, prediction_type="v_prediction"),
        diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        diffusers.EulerAncestralDiscreteScheduler(**BETAS),
        diffusers.DDIMScheduler(trained_betas=[0.01] * 1000),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_with_betas_become_ddim_with_the_same_noise_levels_and_prediction(scheduler):
    ddim = converted(scheduler, eta=0.6)
    assert type(ddim) is DDIMSDEScheduler and ddim.config.eta == 0.6
    torch.testing.assert_close(ddim.alphas_cumprod, scheduler.alphas_cumprod.float(), rtol=0, atol=1e-6)
    for key in ("prediction_type", "timestep_spacing", "steps_offset", "clip_sample_range"):
        assert ddim.config[key] == scheduler.config.get(key, ddim.config[key])
    assert ddim.config.clip_sample == scheduler.config.get("clip_sample", False)


@pytest.mark.parametrize("rescale_betas_zero_snr", [False, True])
def test_a_shifted_signal_to_noise_ratio_is_kept(rescale_betas_zero_snr):
    """CogView 3+; DDIM has no argument for it, so its betas are spelled out."""
    stock = diffusers.CogVideoXDDIMScheduler(
        **BETAS,
        snr_shift_scale=4.0,
        rescale_betas_zero_snr=rescale_betas_zero_snr,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    ddim = converted(stock, eta=0.0)
    torch.testing.assert_close(ddim.alphas_cumprod.double(), stock.alphas_cumprod.double(), rtol=1e-4, atol=1e-6)
    x = y = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for scheduler in (stock, ddim):
        scheduler.set_timesteps(6)
    for t in stock.timesteps:
        x = stock.step(x.tanh(), t, x).prev_sample
        y = ddim.step(y.tanh(), t, y).prev_sample
    torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)


def test_flow_matching_keeps_every_field():
    scheduler = stochastic_scheduler(flux_pipeline())
    assert type(scheduler) is FlowSDEScheduler
    assert scheduler.config.use_dynamic_shifting is True and scheduler.config.shift == 3.0
    assert scheduler.config.noise_schedule == "flow_grpo" and scheduler.config.noise_level == 0.7


def test_the_noise_level_follows_the_noise_schedule_unless_given():
    pipe = sd3_pipeline()
    assert stochastic_scheduler(pipe, noise_schedule="dance_grpo").config.noise_level == 0.3
    assert stochastic_scheduler(pipe, noise_schedule="cps").config.noise_level == 0.7
    assert stochastic_scheduler(pipe, noise_schedule="dance_grpo", noise_level=0.0).config.noise_level == 0.0
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler  # the pipeline's own stays


SHIFTED_LATER = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
SHIFTED_LATER.set_shift(5.0)
SOLVER: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}


@pytest.mark.parametrize(
    "scheduler",
    [diffusers.UniPCMultistepScheduler(**SOLVER), diffusers.DPMSolverMultistepScheduler(**SOLVER), SHIFTED_LATER],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_flow_matching_keeps_its_shift(scheduler):
    flow, stock = converted(scheduler), diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    assert type(flow) is FlowSDEScheduler
    flow.set_timesteps(10)
    if scheduler is SHIFTED_LATER:
        stock = scheduler
    stock.set_timesteps(10)
    torch.testing.assert_close(flow.sigmas, stock.sigmas)


def test_pipelines_find_the_initial_noise_s_scale_where_their_solver_had_it():
    pipe = sd_pipeline()
    pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    call = {"prompt": ["a cat"], "num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    rollout = PipelineReplayer(pipe).sample(**call)  # multiplies by scheduler.init_noise_sigma
    assert rollout.trainable_steps == (0, 1)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EDMEulerScheduler(),
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.LCMScheduler(),
        diffusers.TCDScheduler(),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"),  # with betas, not with flow sigmas
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_without_a_stochastic_counterpart_are_refused(scheduler):
    with pytest.raises(ValueError, match=rf"{type(scheduler).__name__} .*FlowSDEScheduler"):
        converted(scheduler)


def test_pipelines_that_ask_for_the_kind_of_variance_get_an_answer():
    """DeepFloyd IF's, whose denoiser predicts one beside the noise, and which cut it off themselves."""
    pipe = sd_pipeline()
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config, variance_type="learned_range")
    assert stochastic_scheduler(pipe).config.variance_type == "fixed_small"
