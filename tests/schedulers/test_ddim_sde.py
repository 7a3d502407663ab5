import pytest
import torch
from diffusers import DDIMScheduler

from slas_trl.schedulers import DDIMSDEScheduler
from tests.tiny_pipelines import sd_pipeline


SD_1_4 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
CONFIGS = {
    "epsilon": SD_1_4,
    "v_prediction": {**SD_1_4, "prediction_type": "v_prediction"},
    "sample": {**SD_1_4, "prediction_type": "sample"},
    "clipped": {"clip_sample": True, "clip_sample_range": 0.7},
    "thresholded": {"clip_sample": False, "thresholding": True, "sample_max_value": 1.5},
    "linspace": {"clip_sample": False, "timestep_spacing": "linspace"},
}


ZERO_SNR = {
    **CONFIGS["v_prediction"],
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 0,
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(config: dict, steps: int = 10, eta: float = 1.0) -> tuple[DDIMSDEScheduler, DDIMScheduler]:
    """Ours and the stock scheduler, ready to step."""
    stock = DDIMScheduler(**config)
    ours = DDIMSDEScheduler.from_config(stock.config, eta=eta)
    stock.set_timesteps(steps)
    ours.set_timesteps(steps)
    return ours, stock


def prediction(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(2 * x) + t / 1000


@pytest.mark.parametrize("config", [*CONFIGS.values(), ZERO_SNR], ids=[*CONFIGS, "zero-snr"])
def test_without_noise_a_trajectory_is_that_of_the_stock_scheduler(config):
    ours, stock = pair(config, eta=0.0)
    x = y = randn(2, 4, 8, 8)
    for t in stock.timesteps:
        x = stock.step(prediction(x, t), t, x).prev_sample
        y = ours.step(prediction(y, t), t, y).prev_sample
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_mean_and_std_are_those_of_the_stock_scheduler(config, eta):
    ours, stock = pair(config, eta=eta)
    x = randn(2, 4, 8, 8)
    for index, t in enumerate(stock.timesteps):
        output, noise = prediction(x, t), randn(2, 4, 8, 8, seed=index)
        mean, std = ours.transition(output, x, index)
        silent = stock.step(output, t, x, eta=eta, variance_noise=torch.zeros_like(x)).prev_sample
        noisy = stock.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(mean, silent, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mean + std * noise, noisy, rtol=1e-6, atol=1e-6)
        x = noisy.clamp(-3, 3)


def test_one_step_by_hand():
    """ᾱ = 0.5, ᾱ' = 0.8, so std² = 0.2/0.5·(1 - 0.5/0.8) = 0.15."""
    scheduler = DDIMSDEScheduler(
        num_train_timesteps=2, trained_betas=[0.2, 1 - 0.5 / 0.8], clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(2)
    x, eps = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 0.5)
    mean, std = scheduler.transition(eps, x, 0)
    assert std.item() == pytest.approx(0.15**0.5, abs=1e-6)
    x0 = (1 - 0.5**0.5 * 0.5) / 0.5**0.5
    assert mean.item() == pytest.approx(0.8**0.5 * x0 + (0.2 - 0.15) ** 0.5 * 0.5, abs=1e-6)


def test_from_pure_noise_the_first_step_draws_from_the_forward_process():
    """At ᾱ = 0 the variance is all of 1 - ᾱ'; the stock scheduler, after rounding, takes the root of less than 0."""
    ours, _ = pair(ZERO_SNR)
    x, v = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    mean, std = ours.transition(v, x, 0)
    alpha_next = ours.alphas_cumprod[int(ours.timesteps[1])]
    torch.testing.assert_close(mean, alpha_next.sqrt() * -v)  # x0 = -v
    torch.testing.assert_close(std, (1 - alpha_next).sqrt())


def test_standalone_in_a_pipeline_it_is_the_stock_scheduler_with_eta_1():
    pipe = sd_pipeline()
    call = {"prompt": "a dog", "num_inference_steps": 5, "height": 16, "width": 16, "output_type": "latent"}
    expected = pipe(**call, eta=1.0, generator=torch.Generator().manual_seed(0)).images
    pipe.scheduler = DDIMSDEScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(
        pipe(**call, generator=torch.Generator().manual_seed(0)).images, expected, rtol=1e-4, atol=1e-4
    )


def test_values_without_a_policy_are_refused():
    with pytest.raises(ValueError, match=r"eta must be between 0 .* but it is 1\.5"):
        DDIMSDEScheduler(eta=1.5)
    with pytest.raises(ValueError, match="prediction_type must be one of .* but it is 'flow_prediction'"):
        DDIMSDEScheduler(prediction_type="flow_prediction")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="set_timesteps"):
        DDIMSDEScheduler().transition(randn(1, 4, 8, 8), randn(1, 4, 8, 8), 0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("variance_noise", torch.ones(1, 4, 8, 8)), ("use_clipped_model_output", True), ("eta", 0.5), ("timestep", 5)],
)
def test_steps_without_a_policy_are_refused(option, value):
    scheduler, _ = pair(SD_1_4)
    x = randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match=f"(?i){option}"):
        scheduler.step(**{"model_output": x, "timestep": scheduler.timesteps[0], "sample": x, option: value})
