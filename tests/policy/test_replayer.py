import copy
import io

import diffusers
import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch.distributions import Normal

from slas_trl.policy import PipelineReplayer, ReplayError
from slas_trl.schedulers import FlowSDEScheduler, stochastic_scheduler
from tests.tiny_pipelines import PIPELINES, autoencoder, finished, sd3_pipeline, sd_pipeline


PROMPTS = ["a red circle", "two dogs"]
GUIDED = {"negative_prompt": ["", ""], "true_cfg_scale": 2.0}  # two calls of FLUX for each step
LORA = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def denoiser_of(pipe) -> torch.nn.Module:
    return pipe.unet if "unet" in pipe.components else pipe.transformer


def call_of(family: str, **changes) -> dict:
    _, call = PIPELINES[family]
    return {
        "prompt": PROMPTS,
        "num_inference_steps": 4,
        "output_type": "np",
        "generator": seeded(0, 1),
        **call,
        **changes,
    }


def built(family: str):
    return PIPELINES[family][0]()


def replayer_and_rollout(family: str, **changes):
    replayer = PipelineReplayer(built(family))
    return replayer, replayer.sample(**call_of(family, **changes))


def replayer_of(kind: type[diffusers.StableDiffusion3Pipeline]) -> PipelineReplayer:
    return PipelineReplayer(finished(kind(**sd3_pipeline().components)))


def log_probs_of(replayer: PipelineReplayer, rollout) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([replayer.replay(rollout, step).log_prob for step in rollout.trainable_steps], dim=1)


families = pytest.mark.parametrize("family", PIPELINES)


@families
def test_a_rollout(family):
    replayer, rollout = replayer_and_rollout(family, output_type="pil")
    assert len(rollout) == 2 and len(rollout.images) == 2 and rollout.images[0].size == (16, 16)
    assert rollout.log_probs.shape == (2, 4) and rollout.log_probs.dtype == torch.float32
    assert rollout.trainable_steps == (0, 1, 2, 3)
    step = replayer.replay(rollout, 2)
    assert step.log_prob.shape == (2,) and step.mean.dtype == step.std.dtype == torch.float32
    assert step.model_output.shape == step.mean.shape == rollout.steps[2].sample.shape
    torch.testing.assert_close(step.std.item(), rollout.steps[2].std)
    torch.testing.assert_close(
        step.log_prob, Normal(step.mean, step.std).log_prob(rollout.steps[2].prev_sample).flatten(1).mean(1)
    )


@pytest.mark.parametrize("precision", ["autocast", "bf16 weights", "bf16 pipeline"])
@families
def test_log_probs_are_exact_in_lower_precision_too(family, precision):
    pipe = built(family)
    denoiser = denoiser_of(pipe).requires_grad_(True)
    if precision == "bf16 weights":
        denoiser.to(torch.bfloat16)
    if precision == "bf16 pipeline":
        pipe.to(torch.bfloat16)
    replayer = PipelineReplayer(pipe)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "bf16 pipeline"):
        rollout = replayer.sample(**call_of(family))
        for step in rollout.trainable_steps:
            log_prob = replayer.replay(rollout, step).log_prob
            assert torch.equal(log_prob, rollout.log_probs[:, step])
            assert log_prob.dtype == torch.float32
    log_prob.sum().backward()
    attention = [p for name, p in denoiser.named_parameters() if ".to_" in name and p.ndim == 2]
    assert len(attention) >= 7
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in attention)


@pytest.mark.parametrize(
    ("family", "options", "steps"),
    [
        ("sd3", {"noise_schedule": "dance_grpo"}, (0, 1, 2, 3)),
        ("sd3", {"noise_schedule": "cps"}, (0, 1, 2)),
        ("sd-v", {"eta": 0.2}, (0, 1, 2, 3)),
    ],
)
def test_other_noise_than_the_default(family, options, steps):
    pipe = built(family)
    replayer = PipelineReplayer(pipe, stochastic_scheduler(pipe, **options))
    rollout = replayer.sample(**call_of(family))
    assert rollout.trainable_steps == steps and rollout.log_probs[:, 3].isnan().all() == (3 not in steps)
    assert torch.equal(log_probs_of(replayer, rollout), rollout.log_probs[:, steps])
    if 3 not in steps:
        with pytest.raises(ValueError, match=r"Step 3 has no density.*\[0, 1, 2\]"):
            replayer.replay(rollout, 3)


def test_the_gradient_is_that_of_a_step_of_sd3_written_out():
    pipe = sd3_pipeline()
    replayer = PipelineReplayer(pipe)
    rollout = replayer.sample(**call_of("sd3", guidance_scale=4.5))
    parameters = list(pipe.transformer.requires_grad_(True).parameters())
    got = torch.autograd.grad(replayer.replay(rollout, 2).log_prob.sum(), parameters, allow_unused=True)

    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = pipe.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=True, max_sequence_length=8
        )
    sigmas = replayer.scheduler.sigmas
    x, following, sigma, dt = rollout.steps[2].sample, rollout.steps[2].prev_sample, sigmas[2], sigmas[3] - sigmas[2]
    unconditional, conditional = pipe.transformer(
        hidden_states=torch.cat([x, x]),
        timestep=(1000 * sigma).expand(4),
        encoder_hidden_states=torch.cat([negative, embeds]),
        pooled_projections=torch.cat([negative_pooled, pooled]),
        return_dict=False,
    )[0].chunk(2)
    v = unconditional + 4.5 * (conditional - unconditional)
    s = 0.7 * (sigma / (1 - sigma)).sqrt()
    mean = x * (1 + s**2 * dt / (2 * sigma)) + v * dt * (1 + s**2 * (1 - sigma) / (2 * sigma))
    log_prob = Normal(mean, s * (-dt).sqrt()).log_prob(following).mean(dim=(1, 2, 3))
    torch.testing.assert_close(log_prob.detach(), rollout.log_probs[:, 2])
    expected = torch.autograd.grad(log_prob.sum(), parameters, allow_unused=True)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@families
def test_the_gradient_is_the_slope_of_the_log_prob(family):
    replayer, rollout = replayer_and_rollout(family)
    weight = next(p for name, p in denoiser_of(replayer.pipe).named_parameters() if name.endswith("to_v.weight"))
    weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(replayer.replay(rollout, 1).log_prob.sum(), weight)
    direction = 0.02 * gradient / gradient.norm()

    def log_prob(offset: torch.Tensor) -> float:
        with torch.no_grad():
            weight.add_(offset)
            value = replayer.replay(rollout, 1).log_prob.double().sum().item()
            weight.sub_(offset)
        return value

    slope = (log_prob(direction) - log_prob(-direction)) / 2
    assert slope == pytest.approx(0.02 * gradient.norm().item(), rel=0.02, abs=1e-6)


def test_gradient_checkpointing_gives_the_same_gradient():
    replayer, rollout = replayer_and_rollout("sd3")
    transformer = replayer.pipe.transformer.requires_grad_(True)
    weight = transformer.transformer_blocks[0].attn.to_q.weight
    (expected,) = torch.autograd.grad(replayer.replay(rollout, 1).log_prob.sum(), weight)
    transformer.enable_gradient_checkpointing()
    transformer.train()
    step = replayer.replay(rollout, 1)
    assert torch.equal(step.log_prob, rollout.log_probs[:, 1])
    torch.testing.assert_close(torch.autograd.grad(step.log_prob.sum(), weight)[0], expected)


def state_of(pipe) -> tuple:
    components = {
        name: {key: id(value) for key, value in module.__dict__.items()}
        for name, module in pipe.components.items()
        if isinstance(module, torch.nn.Module) and module is not denoiser_of(pipe)  # diffusers hooks into FLUX's
    }
    attributes = {key: id(value) for key, value in pipe.__dict__.items()}
    return type(pipe), attributes, components, torch.get_rng_state().tolist(), torch.is_grad_enabled()


@families
def test_the_pipeline_and_the_random_state_are_left_as_they_were(family):
    pipe = built(family)
    replayer = PipelineReplayer(pipe)
    torch.manual_seed(3)
    before = state_of(pipe)
    rollout = replayer.sample(**call_of(family))
    assert state_of(pipe) == before
    torch.manual_seed(4)
    before = state_of(pipe)
    replayer.replay(rollout, 1)
    assert state_of(pipe) == before
    rollout.steps[1].sample = rollout.steps[1].sample + 1
    with pytest.raises(ReplayError):
        replayer.replay(rollout, 1)
    assert state_of(pipe) == before
    with pytest.raises(ZeroDivisionError):  # in the middle of a call, whose own end would put things back
        replayer.sample(**call_of(family, callback_on_step_end=lambda *given: 1 / 0))
    assert state_of(pipe) == before and replayer.scheduler.controller is None


@pytest.mark.parametrize("how", ["zero noise", "empty window"])
@families
def test_without_noise_the_images_are_those_of_a_plain_call(family, how):
    pipe = built(family)
    expected = pipe(**call_of(family)).images
    scheduler = (
        stochastic_scheduler(pipe, noise_level=0.0, eta=0.0) if how == "zero noise" else stochastic_scheduler(pipe)
    )
    if how == "empty window":
        scheduler.window = range(0)
    rollout = PipelineReplayer(pipe, scheduler).sample(**call_of(family))
    assert rollout.trainable_steps == () and rollout.log_probs.isnan().all()
    np.testing.assert_allclose(rollout.images, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("generator", ["one", "list", "same", "none"])
def test_the_kinds_of_generator(generator):
    """ "same" is `init_same_noise`: images of a group start alike, and part at the first step."""

    def sample():
        torch.manual_seed(8)
        given = {"one": seeded(0)[0], "list": seeded(0, 1), "same": seeded(7, 7), "none": None}[generator]
        prompts = [PROMPTS[0]] * 2 if generator == "same" else PROMPTS
        return replayer.sample(**call_of("sd3", generator=given, prompt=prompts))

    replayer = PipelineReplayer(sd3_pipeline())
    rollout, again = sample(), sample()
    assert torch.equal(log_probs_of(replayer, rollout), rollout.log_probs)
    np.testing.assert_array_equal(rollout.images, again.images)  # reproducible
    x, following = rollout.steps[0].sample, rollout.steps[0].prev_sample
    assert torch.equal(x[0], x[1]) == (generator == "same")
    assert not torch.equal(following[0] - x[0], following[1] - x[1])


@families
def test_with_a_noise_generator_each_a_sample_does_not_depend_on_its_batch(family):
    replayer = PipelineReplayer(built(family))
    together = replayer.sample(**call_of(family), noise_generator=seeded(10, 11))
    alone = replayer.sample(**call_of(family, prompt=PROMPTS[1:], generator=seeded(1)), noise_generator=seeded(11))
    for both, one in zip(together.steps, alone.steps, strict=True):
        torch.testing.assert_close(both.prev_sample[1:], one.prev_sample, rtol=1e-3, atol=1e-3)


def test_as_many_noise_generators_as_images():
    replayer = PipelineReplayer(sd3_pipeline())
    rollout = replayer.sample(
        **call_of("sd3", generator=None), num_images_per_prompt=2, noise_generator=seeded(1, 2, 3, 4)
    )
    assert len(rollout) == 4
    with pytest.raises(ValueError, match="each of 4 samples, got 2"):
        replayer.sample(**call_of("sd3", generator=None), num_images_per_prompt=2, noise_generator=seeded(1, 2))


def test_only_the_steps_in_the_window_are_stochastic():
    pipe = sd3_pipeline()
    scheduler = stochastic_scheduler(pipe)
    replayer = PipelineReplayer(pipe, scheduler)
    scheduler.window = range(1, 4, 2)
    rollout = replayer.sample(**call_of("sd3"))
    assert rollout.trainable_steps == (1, 3)
    assert rollout.log_probs.isnan().any(0).tolist() == [True, False, True, False]
    scheduler.window = range(0, 1)  # that of a later rollout
    for known in (rollout, replayer.restore(rollout.state(), call_of("sd3"))):
        assert known.window == range(1, 4, 2)
        assert torch.equal(log_probs_of(replayer, known), rollout.log_probs[:, [1, 3]])
    assert scheduler.window == range(0, 1)


def test_a_stochastic_scheduler_of_the_pipeline_s_own_is_used_as_it_is():
    pipe = sd3_pipeline()
    with pytest.raises(TypeError, match="FlowSDEScheduler.*FlowMatchEuler"):
        PipelineReplayer(pipe, pipe.scheduler)
    pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, noise_schedule="cps", noise_level=0.9)
    replayer = PipelineReplayer(pipe)
    assert replayer.scheduler is pipe.scheduler
    rollout = replayer.sample(**call_of("sd3"))
    assert rollout.trainable_steps == (0, 1, 2) and pipe.scheduler.controller is None
    assert torch.equal(log_probs_of(replayer, rollout), rollout.log_probs[:, :3])


@pytest.mark.parametrize(("family", "changed"), [("sd", "latents"), ("sd3", "latents"), ("sd3", "prompt_embeds")])
def test_a_callback_may_change_in_place_what_it_gets_between_steps(family, changed):
    """Kandinsky 5 does so itself; here the left half is kept gray, or the prompt fades."""

    def change(pipe, index, timestep, kwargs):
        kwargs[changed][..., :4] *= 0
        return kwargs

    given = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", changed]}
    replayer, rollout = replayer_and_rollout(family, guidance_scale=1.0, **given)
    if changed == "latents":
        assert not rollout.steps[1].sample[..., :4].any() and rollout.steps[0].prev_sample[..., :4].any()
    for _ in range(2):
        assert torch.equal(log_probs_of(replayer, rollout), rollout.log_probs)


def test_a_rollout_is_saved_and_restored():
    replayer, rollout = replayer_and_rollout("flux", **GUIDED)
    file = io.BytesIO()
    torch.save(rollout.state(), file)
    file.seek(0)
    call = call_of("flux", **GUIDED, generator=seeded(8, 9))  # seeds do not matter
    bias = replayer.pipe.transformer.proj_out.bias.detach()
    before = bias.clone()
    bias += 0.5  # nor do the weights by then, if put back before the replay
    restored = PipelineReplayer(replayer.pipe).restore(torch.load(file, weights_only=True), call)
    bias.copy_(before)
    assert torch.equal(restored.log_probs, rollout.log_probs) and restored.trainable_steps == rollout.trainable_steps
    assert torch.equal(log_probs_of(replayer, restored), rollout.log_probs)


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_the_reference_is_the_model_without_the_adapter(family):
    """Two adapters, of which one is trained: the other belongs to the reference too, and all is left as it was."""
    pipe, reference = built(family), built(family)
    for name in ("style", "policy"):
        torch.manual_seed(len(name))
        denoiser_of(pipe).add_adapter(LORA, adapter_name=name)
    torch.manual_seed(len("style"))
    denoiser_of(reference).add_adapter(LORA, adapter_name="style")
    denoiser_of(pipe).set_adapters(["style", "policy"])
    for name, parameter in denoiser_of(pipe).named_parameters():
        parameter.requires_grad_(".policy." in name)
    before = [parameter.requires_grad for parameter in denoiser_of(pipe).parameters()]
    replayer = PipelineReplayer(pipe)
    rollout = replayer.sample(**call_of(family))
    found = replayer.reference(rollout, 1, adapter="policy")
    assert not found.log_prob.requires_grad and not torch.allclose(found.mean, replayer.replay(rollout, 1).mean)
    with torch.no_grad():
        expected = PipelineReplayer(reference).replay(rollout, 1).log_prob
    torch.testing.assert_close(found.log_prob, expected)
    with pytest.raises(ValueError, match="Step 9 has no density"):
        replayer.reference(rollout, 9)
    assert [parameter.requires_grad for parameter in denoiser_of(pipe).parameters()] == before
    assert torch.equal(log_probs_of(replayer, rollout), rollout.log_probs)


def test_without_adapters_the_reference_is_a_frozen_copy():
    replayer, rollout = replayer_and_rollout("sd3")
    with pytest.raises(ValueError, match="no adapter to disable; pass `models`"):
        replayer.reference(rollout, 0)
    frozen = copy.deepcopy(replayer.pipe.transformer)
    with torch.no_grad():
        replayer.pipe.transformer.proj_out.weight.mul_(1.5)
    assert torch.equal(replayer.reference(rollout, 2, {"transformer": frozen}).log_prob, rollout.log_probs[:, 2])
    assert not torch.allclose(replayer.replay(rollout, 2).log_prob, rollout.log_probs[:, 2])


def test_models_are_called_in_place_of_the_denoiser_and_at_one_step_alone():
    replayer, rollout = replayer_and_rollout("flux", **GUIDED)
    transformer, calls = replayer.pipe.transformer, []

    def wrapped(*args, **kwargs):  # as DDP, FSDP or torch.compile would
        calls.append(kwargs["timestep"])
        return transformer(*args, **kwargs)

    assert torch.equal(replayer.replay(rollout, 3, models={"transformer": wrapped}).log_prob, rollout.log_probs[:, 3])
    assert len(calls) == 2  # with and without the prompt
    replayer.models["transformer"] = wrapped
    replayer.sample(**call_of("flux"))
    assert len(calls) == 2 + 4
    with pytest.raises(ValueError, match=r"\['unet'\], but the pipeline's denoisers are \['transformer'\]"):
        replayer.replay(rollout, 0, models={"unet": transformer})


def test_the_denoiser_in_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        pipe = sd3_pipeline()
        pipe.transformer.add_adapter(LORA)
        replayer = PipelineReplayer(pipe)
        replayer.models["transformer"] = torch.nn.parallel.DistributedDataParallel(pipe.transformer)
        rollout = replayer.sample(**call_of("sd3"))
        for step in rollout.trainable_steps:
            log_prob = replayer.replay(rollout, step).log_prob
            assert torch.equal(log_prob, rollout.log_probs[:, step])
            log_prob.sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for name, p in pipe.transformer.named_parameters() if "lora" in name)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_replay_follows_the_weights(autocast):
    """The log-prob rises along its gradient: what a trainer relies on. Autocast caches nothing in between."""
    replayer = PipelineReplayer(sd_pipeline())
    weight = replayer.pipe.unet.conv_out.weight.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rollout = replayer.sample(**call_of("sd"))
        log_prob = replayer.replay(rollout, 2).log_prob.sum()
        (gradient,) = torch.autograd.grad(log_prob, weight)
        with torch.no_grad():
            weight += 1e-3 * gradient if not autocast else 0.5 * weight
            after = replayer.replay(rollout, 2).log_prob
    assert not torch.equal(after, rollout.log_probs[:, 2]) and (autocast or after.sum() > log_prob)


@pytest.mark.parametrize("by_torch", [True, False])
def test_randomness_between_steps_is_replayed_if_it_is_torch_s(by_torch):
    def disturb(pipe, index, timestep, kwargs):
        noise = torch.randn(1) if by_torch else float(np.random.default_rng().standard_normal())
        return {"latents": kwargs["latents"] + 0.1 * noise}

    replayer, rollout = replayer_and_rollout("sd3", callback_on_step_end=disturb)
    torch.randn(5)
    if by_torch:
        assert torch.equal(log_probs_of(replayer, rollout), rollout.log_probs)
        return
    assert torch.equal(replayer.replay(rollout, 0).log_prob, rollout.log_probs[:, 0])
    with pytest.raises(ReplayError, match="step 2 .* outside of scheduler.step"):
        replayer.replay(rollout, 2)


@pytest.mark.parametrize(
    ("family", "sampled", "changes", "step", "message"),
    [
        ("sd", {}, {"latents": torch.zeros(2, 4, 8, 8)}, 0, "the latents differ from the recorded ones"),
        ("sd", {}, {"height": 24}, 0, r"the latents are \(2, 4, 12, 8\) .*; recorded were \(2, 4, 8, 8\)"),
        ("sd", {}, {"num_inference_steps": 2}, 3, "ended before step 3 of 4"),
        (
            "flux",
            GUIDED,
            {"true_cfg_scale": 1.0},
            1,
            r"2 denoiser call\(s\), but the replay .* after 1",
        ),
        ("flux", {}, GUIDED, 1, "called 'encode_prompt' where sampling called nothing"),
        ("flux", GUIDED, {}, 1, "Step 0 has more calls than the 1 recorded"),
    ],
)
def test_another_call_than_the_recorded_one(family, sampled, changes, step, message):
    replayer, rollout = replayer_and_rollout(family, **sampled)
    rollout.call.update(generator=seeded(5, 6))  # the recorded states count
    assert torch.equal(replayer.replay(rollout, step).log_prob, rollout.log_probs[:, step])
    rollout.call.update(changes)
    if not changes:
        for recorded in rollout.steps:
            recorded.outputs.pop()
    with pytest.raises(ReplayError, match=message):
        replayer.replay(rollout, step)


class Twice(diffusers.StableDiffusion3Pipeline):
    def prepare_latents(self, *args, **kwargs):
        latents = super().prepare_latents(*args, **kwargs)
        return self.scheduler.step(latents, self.scheduler.timesteps[0], latents).prev_sample


class Idle(diffusers.StableDiffusion3Pipeline):
    def __call__(self, prompt=None, generator=None, **kwargs):
        return (torch.zeros(len(prompt), 3, 16, 16),)


@pytest.mark.parametrize(
    ("kind", "message"), [(Twice, "index 0 without a call of the denoiser"), (Idle, r"Idle .* scheduler\.step")]
)
def test_pipelines_that_do_not_step_once_for_each_call_of_the_denoiser(kind, message):
    with pytest.raises(ValueError, match=message):
        replayer_of(kind).sample(**call_of("sd3"))


def test_a_pipeline_that_steps_more_samples_than_it_returns():
    """DiT steps the unconditional half too, and throws it away; its log-probs would belong to no image."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=1, sample_size=8
    )
    pipe = finished(diffusers.DiTPipeline(transformer, autoencoder(4), diffusers.DDIMScheduler()))
    with pytest.raises(ValueError, match="DiTPipeline denoises 4 samples for 2 images; expected one for each"):
        PipelineReplayer(pipe).sample(class_labels=[1, 2], num_inference_steps=2)
