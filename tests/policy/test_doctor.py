from inspect import signature

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    HeunDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    StableDiffusionAttendAndExcitePipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
    apply_first_block_cache,
)
from peft import LoraConfig, PeftModel, get_peft_model

from slas_trl.policy import PipelineReplayer, RatioReport, check_pipeline, find_dropout, measure_ratio
from slas_trl.policy.doctor import (
    counting_activations,
    load_pipeline,
    pipeline_problems,
    rollout_bytes,
    samples_per_call,
)
from slas_trl.shapes import ShapesPipeline, load_shapes_pipeline
from tests.tiny_pipelines import PIPELINES, flux_pipeline, sd3_pipeline, sd_pipeline


def sample(replayer: PipelineReplayer, family: str):
    _, call = PIPELINES[family]
    generator = torch.Generator().manual_seed(0)
    return replayer.sample(prompt=["a dog"] * 2, num_inference_steps=3, generator=generator, **call)


# Can it be a policy?


@pytest.mark.parametrize("family", PIPELINES)
def test_pipelines_that_can_be_trained_pass(family):
    build, _ = PIPELINES[family]
    check_pipeline(build())


def test_what_is_no_pipeline():
    with pytest.raises(TypeError, match="Expected a diffusers pipeline, but got a SD3Transformer2DModel"):
        check_pipeline(sd3_pipeline().transformer)


def test_a_pipeline_without_a_denoiser():
    pipe = sd_pipeline()
    pipe.unet = None
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no denoiser: expected .*'transformer'.*'unet'"):
        check_pipeline(pipe)


def test_a_pipeline_without_a_scheduler():
    pipe = sd_pipeline()
    pipe.scheduler = None
    with pytest.raises(ValueError, match="has no scheduler"):
        check_pipeline(pipe)


def test_a_wrapper_of_several_pipelines():
    class StableDiffusionCombinedPipeline(StableDiffusionPipeline):
        pass

    pipe = StableDiffusionCombinedPipeline(**sd_pipeline().components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="pass the one that denoises, not the wrapper"):
        check_pipeline(pipe)


def test_schedulers_of_higher_order():
    pipe = sd_pipeline()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="HeunDiscreteScheduler takes 2 model calls per step"):
        PipelineReplayer(pipe)


def test_dropout():
    pipe = sd3_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], lora_dropout=0.05))
    assert len(find_dropout(pipe.transformer)) == 2  # one for each block
    with pytest.raises(
        ValueError, match=r"transformer has dropout in 2 place\(s\), the first 'transformer_blocks.0.*"
    ):
        PipelineReplayer(pipe)


def test_no_dropout():
    pipe = sd3_pipeline()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    assert find_dropout(pipe.transformer) == []


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=0.2),
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500),
    ],
    ids=lambda config: type(config).__name__,
)
def test_caches(config):
    pipe = flux_pipeline()
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match=r"A cache is enabled on transformer.*`pipe.transformer.disable_cache\(\)`"):
        PipelineReplayer(pipe)
    pipe.transformer.disable_cache()
    check_pipeline(pipe)


def test_a_cache_that_the_model_does_not_know_of():
    pipe = sd3_pipeline()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(ValueError, match="A cache is enabled on transformer"):
        check_pipeline(pipe)


def test_all_problems_are_found():
    pipe = flux_pipeline()
    assert list(pipeline_problems(pipe)) == []
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], lora_dropout=0.05))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    pipe.scheduler = HeunDiscreteScheduler()
    order, cache, dropout = pipeline_problems(pipe)
    assert "HeunDiscreteScheduler" in order and "cache is enabled" in cache and "dropout in 2 place(s)" in dropout
    with pytest.raises(ValueError) as error:
        check_pipeline(pipe)
    assert str(error.value) == order


TO_Q = LoraConfig(target_modules=["to_q"])


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
    with pytest.raises(ValueError, match="transformer is a .*in its place.*peft_config"):
        PipelineReplayer(pipe)
    if isinstance(pipe.transformer, PeftModel):
        assert ".unload()" in next(pipeline_problems(pipe))
        assert pipe.transformer.unload() is plain


@pytest.mark.parametrize("kind", [StableDiffusionSAGPipeline, StableDiffusionAttendAndExcitePipeline])
def test_guidance_by_attention_maps(kind):
    parts = {name: part for name, part in sd_pipeline().components.items() if name in signature(kind).parameters}
    pipe = kind(**parts, requires_safety_checker=False)
    with pytest.raises(ValueError, match=f"{kind.__name__} reads the denoiser's attention maps"):
        check_pipeline(pipe)


# Can it be loaded?


def test_the_embedded_pipeline_from_a_folder(tmp_path):
    load_shapes_pipeline().save_pretrained(tmp_path)
    assert isinstance(load_pipeline(str(tmp_path), {"dtype": "float32"}), ShapesPipeline)


@pytest.mark.parametrize(
    ("file", "text", "what"),
    [
        ("model_index.json", None, "model_index.json"),
        ("model_index.json", "{}", "_class_name"),
        ("model_index.json", "{", "JSONDecodeError"),
        ("model_index.json", '{"_class_name": "NoSuchPipeline"}', "NoSuchPipeline"),
        ("text_encoder/model.safetensors", "cut", "afetensor"),
        ("unet/diffusion_pytorch_model.safetensors", "cut", "."),
        ("vae/config.json", "{", "config.json"),
    ],
)
def test_a_damaged_folder(tmp_path, file, text, what):
    sd_pipeline().save_pretrained(tmp_path)
    (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}' (cannot be loaded as a|holds no diffusers) pipeline: .*{what}"):
        load_pipeline(str(tmp_path), {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the device is there")
def test_arguments_that_cannot_be_used_do_not_show_their_values(tmp_path):
    sd_pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="with device_map, token: ") as error:
        load_pipeline(str(tmp_path), {"device_map": "cuda", "token": "hf_secret"})
    assert "hf_secret" not in str(error.value)


# Is its ratio 1?


@pytest.mark.parametrize("family", PIPELINES)
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


def test_an_update_is_measured():
    replayer = PipelineReplayer(sd3_pipeline())
    rollout = sample(replayer, "sd3")
    with torch.no_grad():
        replayer.pipe.transformer.proj_out.bias += 0.1
        assert measure_ratio(replayer, rollout).worst[1] > 1e-4


def test_nan_is_worst():
    step, deviation = RatioReport({0: 0.1, 1: float("nan"), 2: 3.0}).worst
    assert step == 1 and deviation != deviation


def test_a_deviating_ratio_is_a_problem():
    assert RatioReport({0: 0.0, 1: 1e-6}).problem(epsilon=1e-4) is None
    assert "ratio of step 1 should be 1, but it is off by 2e-05" in (
        RatioReport({0: 0.0, 1: 2e-5}).problem(epsilon=1e-3) or ""
    )
    assert RatioReport({0: 2e-6}).problem(epsilon=1e-5) is not None  # more than a tenth of the clip range
    assert RatioReport({0: float("nan")}).problem(epsilon=1e-4) is not None


# What does it take?


@pytest.mark.parametrize(
    ("family", "changes", "samples"),
    [
        ("sd", {}, (4,)),  # guidance in one batch
        ("sd", {"guidance_scale": 1.0}, (2,)),
        ("flux", {}, (2,)),  # guidance distilled
        ("flux", {"true_cfg_scale": 2.0, "negative_prompt": ["a cat"] * 2}, (2, 2)),
    ],
)
def test_samples_of_the_denoiser_calls(family, changes, samples):
    build, call = PIPELINES[family]
    rollout = PipelineReplayer(build()).sample(prompt=["a dog"] * 2, num_inference_steps=3, **{**call, **changes})
    assert samples_per_call(rollout) == [samples] * 3


def test_bytes_of_a_rollout():
    replayer = PipelineReplayer(sd_pipeline())
    rollout = sample(replayer, "sd")
    latents, embeddings = 2 * 4 * 8 * 8 * 4, 2 * 16 * 16 * 4
    # x_T to x_0, three outputs for twice the samples, and the embeddings of both prompts
    assert rollout_bytes(rollout) == 4 * latents + 3 * 2 * latents + 2 * embeddings


def test_activations():
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with counting_activations(layer) as kept:
        layer(x).sin().sum()
    assert sum(kept.values()) == 2 * x.nbytes  # the input of each of the two; the weight is known
    with counting_activations(layer, [x]) as kept:
        layer(x).sin().sum()
    assert sum(kept.values()) == x.nbytes


def test_gradient_checkpointing_keeps_fewer_activations():
    pipe = sd3_pipeline()
    pipe.transformer.requires_grad_(True).train()
    replayer = PipelineReplayer(pipe)
    rollout = sample(replayer, "sd3")
    sizes = []
    for checkpointing in (False, True):
        if checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        with counting_activations(pipe.transformer, rollout.memo) as kept:
            replayer.replay(rollout, 1)
        sizes.append(sum(kept.values()))
    assert 0 < sizes[1] < sizes[0] / 2
