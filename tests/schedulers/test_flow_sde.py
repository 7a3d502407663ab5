import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from slas_trl.schedulers import FlowSDEScheduler
from tests.tiny_pipelines import PIPELINES


SCHEDULES = {"flow_grpo": 0.7, "dance_grpo": 0.3, "cps": 0.5}


def scheduler_with(noise_schedule: str, noise_level: float | None = None, sigmas=(1.0, 0.75, 0.5, 0.25)):
    level = SCHEDULES[noise_schedule] if noise_level is None else noise_level
    scheduler = FlowSDEScheduler(noise_schedule=noise_schedule, noise_level=level)
    scheduler.set_timesteps(sigmas=list(sigmas))
    return scheduler


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    return torch.tanh(2 * x) - sigma


@pytest.mark.parametrize(
    ("noise_schedule", "index", "mean", "std"),
    [
        # At σ = 1 the denominator takes the second σ: s = 0.7·√(1/0.25) = 1.4.
        ("flow_grpo", 0, 1 - 1.96 * 0.25 / 2 - 0.5, 1.4 * 0.5),
        ("flow_grpo", 2, (1 - 0.49 * 0.25) - 0.5 * (1 + 0.49 * 0.5), 0.35),
        ("flow_grpo", 3, 0.295833, 0.202073),  # s² = 0.49/3
        ("dance_grpo", 0, 1 - 0.09 * 0.25 / 2 - 0.5, 0.15),
        ("dance_grpo", 2, 0.9775 - 0.5225, 0.15),
        ("dance_grpo", 3, 0.955 - 0.5675, 0.15),
        # sin(π/4) = √½ of the next noise level is fresh; x0 = -1, 0, 0.5 and x1 = 1, 2, 2.5
        ("cps", 0, -0.25 + 0.75 * math.sqrt(0.5), 0.75 * math.sqrt(0.5)),
        ("cps", 2, 2 * 0.25 * math.sqrt(0.5), 0.25 * math.sqrt(0.5)),
        ("cps", 3, 0.5, 0.0),  # the final step is the predicted image
    ],
)
def test_one_step_by_hand(noise_schedule, index, mean, std):
    scheduler = scheduler_with(noise_schedule)  # σ = 1, 0.75, 0.5, 0.25, 0
    x, v = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 2.0)
    got_mean, got_std = scheduler.transition(v, x, index)
    assert got_mean.item() == pytest.approx(mean, abs=1e-6)
    assert got_std.item() == pytest.approx(std, abs=1e-6)


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
def test_samples_have_the_mean_and_the_std_of_the_transition(noise_schedule):
    scheduler = scheduler_with(noise_schedule)
    x, v = torch.full((1, 1, 300, 300), 0.8), torch.full((1, 1, 300, 300), -0.4)
    mean, std = scheduler.transition(v, x, 1)
    generator = torch.Generator().manual_seed(0)
    samples = scheduler.step(v, scheduler.timesteps[1], x, generator=generator).prev_sample
    assert samples.mean().item() == pytest.approx(mean.mean().item(), abs=4 * std.item() / 300)
    assert samples.std().item() == pytest.approx(std.item(), rel=0.01)


def test_cps_keeps_the_noise_level_that_the_model_expects():
    """With x = (1-σ)·x0 + σ·x1 and the true velocity x1 - x0, the next sample is again of that form."""
    scheduler = scheduler_with("cps", 0.8)
    x0, x1 = torch.full((1, 1, 400, 400), 3.0), randn(1, 1, 400, 400)
    x = (1 - 0.75) * x0 + 0.75 * x1
    generator = torch.Generator().manual_seed(1)
    following = scheduler.step(x1 - x0, scheduler.timesteps[1], x, generator=generator).prev_sample
    noise = following - (1 - 0.5) * x0
    assert noise.mean().item() == pytest.approx(0, abs=0.005)
    assert noise.std().item() == pytest.approx(0.5, rel=0.01)
    mixed = torch.corrcoef(torch.stack([noise.flatten(), x1.flatten()]))[0, 1]
    assert mixed.item() == pytest.approx(math.cos(0.8 * math.pi / 2), abs=0.01)  # the rest of it is fresh


@pytest.mark.parametrize("noise_schedule", ["flow_grpo", "dance_grpo"])
def test_noise_does_not_change_the_distribution_of_the_images(noise_schedule):
    """Data N(0, 0.5²) have a velocity in closed form; the SDE has to end at their std, as the ODE does."""
    scheduler = FlowSDEScheduler(noise_schedule=noise_schedule, noise_level=0.7)
    scheduler.set_timesteps(400)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40_000, generator=generator)
    for t in scheduler.timesteps:
        sigma = t / 1000
        variance = (1 - sigma) ** 2 * 0.25 + sigma**2
        v = (sigma - (1 - sigma) * 0.25) / variance * x  # E[x1 - x0 | x]
        x = scheduler.step(v, t, x, generator=generator, return_dict=False)[0]
    assert x.std().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("noise_schedule", SCHEDULES)
@pytest.mark.parametrize(
    "config", [{"shift": 3.0}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}], ids=str
)
def test_without_noise_a_trajectory_is_that_of_the_stock_scheduler(noise_schedule, config):
    stock = FlowMatchEulerDiscreteScheduler(**config)
    ours = FlowSDEScheduler.from_config(stock.config, noise_schedule=noise_schedule, noise_level=0.0)
    x = y = randn(2, 4, 8, 8)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(8, mu=0.8 if scheduler.config.use_dynamic_shifting else None)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=0, atol=0)
    for t in stock.timesteps:
        x = stock.step(velocity(x, t / 1000), t, x).prev_sample
        y = ours.step(velocity(y, t / 1000), t, y).prev_sample
        assert torch.equal(x, y)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_standalone_in_a_pipeline(family):
    build, call = PIPELINES[family]
    pipe = build()

    def images(noise_level: float | None, seed: int = 0):
        torch.manual_seed(seed)  # the steps' noise
        if noise_level is not None:
            pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, noise_level=noise_level)
        generator = torch.Generator().manual_seed(5)
        return pipe("a dog", num_inference_steps=4, generator=generator, output_type="latent", **call).images

    stock = images(None)
    assert torch.equal(images(0.0), stock)
    noisy = images(0.7)
    assert noisy.isfinite().all() and not torch.allclose(noisy, stock)
    assert torch.equal(images(0.7), noisy) and not torch.equal(images(0.7, seed=1), noisy)


@pytest.mark.parametrize(
    "arguments",
    [
        {"noise_schedule": "ddpo"},
        {"noise_level": -0.1},
        {"noise_level": 1.5, "noise_schedule": "cps"},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
        {"per_token_timesteps": torch.ones(1, 4)},  # of a step
    ],
)
def test_arguments_without_a_policy_are_refused(arguments):
    with pytest.raises(ValueError, match=min(arguments)):
        if "per_token_timesteps" in arguments:
            scheduler_with("flow_grpo").step(randn(1, 4, 4), 1000.0, randn(1, 4, 4), **arguments)
        FlowSDEScheduler(**arguments)


@pytest.mark.parametrize(
    ("shift", "sigmas"), [*((shift, None) for shift in (0.54, 1.0, 1.18, 1.57, 2.33, 6.5)), (1.0, [0.9999, 0.9, 0.5])]
)
def test_a_first_sigma_of_one_or_a_little_below(shift, sigmas):
    scheduler = FlowSDEScheduler(shift=shift)
    scheduler.set_timesteps(None if sigmas else 10, sigmas=sigmas)
    mean, std = scheduler.transition(torch.ones(1, 4), torch.zeros(1, 4), 0)
    first, second = (float(sigma) for sigma in scheduler.sigmas[:2])
    # The denominator takes the second one, as the first may be within rounding of one.
    s = 0.7 * (first / (1 - second)) ** 0.5
    assert float(std) == pytest.approx(s * (first - second) ** 0.5, rel=1e-4) and mean.isfinite().all()
    _, std = scheduler.transition(torch.ones(1, 4), torch.zeros(1, 4), 1)
    following = float(scheduler.sigmas[2])
    assert float(std) == pytest.approx(0.7 * (second / (1 - second) * (second - following)) ** 0.5, rel=1e-4)
