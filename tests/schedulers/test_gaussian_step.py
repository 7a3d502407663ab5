"""What the two stochastic schedulers have in common: a Gaussian step in the stock scheduler's place."""

import inspect
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal

from slas_trl.schedulers import DDIMSDEScheduler, FlowSDEScheduler
from tests.tiny_pipelines import sd3_pipeline, sd_pipeline


STOCK: dict[type, type] = {FlowSDEScheduler: FlowMatchEulerDiscreteScheduler, DDIMSDEScheduler: DDIMScheduler}
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "flow_grpo": (FlowSDEScheduler, {"noise_schedule": "flow_grpo", "noise_level": 0.7}),
    "dance_grpo": (FlowSDEScheduler, {"noise_schedule": "dance_grpo", "noise_level": 0.3}),
    "cps": (FlowSDEScheduler, {"noise_schedule": "cps", "noise_level": 0.5}),
    "ddim": (DDIMSDEScheduler, {"eta": 0.6, "clip_sample": False}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
classes = pytest.mark.parametrize("ours", STOCK)


def ready(kind: str, steps: int = 4) -> Any:
    cls, config = KINDS[kind]
    scheduler = cls(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@kinds
def test_log_prob_is_the_mean_over_elements_of_the_normal_density(kind):
    scheduler = ready(kind)
    mean, std = scheduler.transition(randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1), 1)
    prev_sample = mean + std * randn(3, 4, 8, 8, seed=2)
    log_prob = scheduler.log_prob(mean, std, prev_sample)
    assert log_prob.shape == (3,) and log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, Normal(mean, std).log_prob(prev_sample).mean(dim=(1, 2, 3)))


@kinds
def test_mean_and_std_are_float32_and_the_sample_keeps_its_dtype(kind):
    scheduler = ready(kind)
    output, x = randn(2, 4, 8, 8).bfloat16(), randn(2, 4, 8, 8, seed=1).bfloat16()
    mean, std = scheduler.transition(output, x, 1)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, scheduler.transition(output.float(), x.float(), 1)[0], rtol=0, atol=0)
    assert scheduler.step(output, scheduler.timesteps[1], x).prev_sample.dtype == torch.bfloat16


@kinds
def test_outside_the_window_the_step_is_the_stock_scheduler_s(kind):
    scheduler, (cls, config) = ready(kind), KINDS[kind]
    stock = STOCK[cls].from_config(cls(**config).config)  # type: ignore[attr-defined]
    stock.set_timesteps(4)
    scheduler.window = range(1, 3)
    output, x = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    stds = [scheduler.transition(output, x, index)[1].item() for index in range(4)]
    assert [std > 0 for std in stds] == [False, True, True, False]
    t = scheduler.timesteps[0]
    torch.testing.assert_close(scheduler.step(output, t, x).prev_sample, stock.step(output, t, x).prev_sample)
    scheduler.window, scheduler.noisy_final_step = None, False
    assert scheduler.transition(output, x, 2)[1] > 0 and scheduler.transition(output, x, 3)[1] == 0


@classes
@pytest.mark.parametrize("method", ["step", "set_timesteps"])
def test_signatures_are_the_stock_scheduler_s(ours, method):
    """Pipelines inspect them, and refuse custom sigmas or pass fewer arguments if they differ."""
    signatures = [inspect.signature(getattr(cls, method)).parameters.values() for cls in (ours, STOCK[ours])]
    own, stock = ([(p.name, p.kind, p.default) for p in parameters] for parameters in signatures)
    assert own == stock


@pytest.mark.parametrize("kind", ["dance_grpo", "ddim"])
def test_a_pipeline_is_saved_and_loaded_with_it(tmp_path, kind):
    cls, config = KINDS[kind]
    pipe: Any = sd_pipeline() if kind == "ddim" else sd3_pipeline()
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **config)  # type: ignore[attr-defined]
    pipe.save_pretrained(tmp_path)
    given = {} if kind == "ddim" else {"text_encoder_3": None, "tokenizer_3": None}
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path, **given)
    assert isinstance(loaded.scheduler, cls)
    assert {name: loaded.scheduler.config[name] for name in config} == config
