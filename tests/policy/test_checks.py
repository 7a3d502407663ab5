"""Can a pipeline be a policy, and is its ratio 1?"""

import math
from inspect import signature

import diffusers
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from slas_trl.policy import PipelineReplayer, RatioReport, check_pipeline, find_dropout, measure_ratio
from tests.tiny_pipelines import PIPELINES, flux_pipeline, sd3_pipeline, sd_pipeline


TO_Q = LoraConfig(r=2, target_modules=["to_q"])
families = pytest.mark.parametrize("family", PIPELINES)


def sample(replayer: PipelineReplayer, family: str):
    _, call = PIPELINES[family]
    generator = torch.Generator().manual_seed(0)
    return replayer.sample(prompt=["a dog"] * 2, num_inference_steps=3, generator=generator, **call)


class StableDiffusionCombinedPipeline(diffusers.StableDiffusionPipeline):
    pass


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        (diffusers.StableDiffusionPipeline, {"unet": None}, "no denoiser.*'transformer'.*'unet'"),
        (diffusers.StableDiffusionPipeline, {"scheduler": None}, "no scheduler"),
        (
            diffusers.StableDiffusionPipeline,
            {"scheduler": diffusers.HeunDiscreteScheduler()},
            "HeunDiscreteScheduler takes 2",
        ),
        (StableDiffusionCombinedPipeline, {}, "not the wrapper"),
        (diffusers.StableDiffusionSAGPipeline, {}, "attention maps"),
        (diffusers.StableDiffusionAttendAndExcitePipeline, {}, "attention maps"),
    ],
)
def test_a_pipeline_that_cannot_be_a_policy(kind, changes, problem):
    parts = {name: part for name, part in sd_pipeline().components.items() if name in signature(kind).parameters}
    pipe = kind(**parts, requires_safety_checker=False)
    for name, part in changes.items():
        setattr(pipe, name, part)
    with pytest.raises(ValueError, match=problem):
        check_pipeline(pipe)


def test_dropout():
    pipe = sd3_pipeline()
    pipe.transformer.add_adapter(TO_Q)
    assert find_dropout(pipe.transformer) == []
    check_pipeline(pipe)
    pipe = sd3_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], lora_dropout=0.05))
    assert len(find_dropout(pipe.transformer)) == 2  # one for each block
    with pytest.raises(ValueError, match="transformer has dropout in 2 .*transformer_blocks.0.*lora_dropout"):
        PipelineReplayer(pipe)


@pytest.mark.parametrize(
    "config",
    [
        diffusers.FirstBlockCacheConfig(threshold=0.2),
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
    ],
    ids=lambda config: type(config).__name__,
)
def test_caches(config):
    pipe = flux_pipeline()
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match=r"`pipe.transformer.disable_cache\(\)`"):
        PipelineReplayer(pipe)
    pipe.transformer.disable_cache()
    check_pipeline(pipe)


def test_a_cache_that_the_model_does_not_know_of():
    pipe = sd3_pipeline()
    diffusers.apply_first_block_cache(pipe.transformer, diffusers.FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(ValueError, match="disable_cache"):
        check_pipeline(pipe)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: get_peft_model(model, TO_Q),
        lambda model: get_peft_model(model, TO_Q, mixed=True),
        torch.compile,
        torch.nn.DataParallel,
    ],
    ids=["peft", "mixed", "compiled", "parallel"],
)
def test_a_denoiser_in_something_else(wrap):
    pipe = sd3_pipeline()
    plain, pipe.transformer = pipe.transformer, wrap(pipe.transformer)
    with pytest.raises(ValueError, match=r"transformer is a .*\.unload\(\).*peft_config"):
        PipelineReplayer(pipe)
    if isinstance(pipe.transformer, PeftModel):
        assert pipe.transformer.unload() is plain


@families
def test_the_ratio_is_exactly_1_before_an_update(family):
    build, _ = PIPELINES[family]
    replayer = PipelineReplayer(build())
    report = measure_ratio(replayer, sample(replayer, family))
    assert report.deviations == {0: 0.0, 1: 0.0, 2: 0.0} and report.worst == (0, 0.0)


def test_dropout_that_came_after_the_check_is_measured():
    replayer = PipelineReplayer(sd3_pipeline())
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], lora_dropout=0.5, init_lora_weights=False)
    replayer.pipe.transformer.add_adapter(config)
    replayer.pipe.transformer.train()
    report = measure_ratio(replayer, sample(replayer, "sd3"), steps=(1, 2))
    assert list(report.deviations) == [1, 2] and report.worst[1] > 1e-6


def test_a_deviating_ratio_is_a_problem():
    assert RatioReport({0: 0.0, 1: 1e-6}).problem(epsilon=1e-4) is None
    assert "ratio of step 1" in (RatioReport({0: 0.0, 1: 2e-5}).problem(epsilon=1e-3) or "")
    assert RatioReport({0: 2e-6}).problem(epsilon=1e-5) is not None  # more than a tenth of the clip range
    report = RatioReport({0: 0.1, 1: math.nan, 2: 3.0})
    assert report.worst[0] == 1 and report.problem(epsilon=1e-4) is not None  # NaN is the largest
