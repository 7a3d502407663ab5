"""`SLASTrainer` as a person uses it: what can be given, what is trained, and what is refused."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler, LDMTextToImagePipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import CLIPTextModel, TrainerCallback

from slas_trl import SLASConfig, SLASTrainer
from slas_trl.advantages import slas_advantages
from tests.policy.zoo import dit
from tests.tiny_pipelines import (
    PIPELINES,
    autoencoder,
    clip_config,
    clip_tokenizer,
    finished,
    sd3_pipeline,
    sd_pipeline,
    t5_encoder,
    t5_tokenizer,
)
from tests.trainer.tiny_trainers import (
    PROMPTS,
    Watched,
    logged,
    lora,
    redness,
    same,
    tiny_config,
    tiny_trainer,
    trained,
    trained_weights,
)


FAMILIES = ["sd", "sd3", "flux"]


def blueness(prompts, images, **columns):
    return [float(np.asarray(image)[..., 2].mean()) / 255 for image in images]


def pixart_pipeline():
    """Its denoiser has no adapters in diffusers."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
        use_additional_conditions=False,
    )
    return finished(
        PixArtSigmaPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=t5_encoder(),
            vae=autoencoder(4),
            transformer=transformer,
            scheduler=DDIMScheduler(clip_sample=False),
        )
    )


def ldm_pipeline():
    """Its denoiser has adapters, but the pipeline knows nothing of them."""
    sd, config = sd_pipeline(), clip_config()
    config.max_position_embeddings = 77
    return finished(
        LDMTextToImagePipeline(
            vqvae=sd.vae, bert=CLIPTextModel(config), tokenizer=clip_tokenizer(), unet=sd.unet, scheduler=sd.scheduler
        )
    )


# What can be given


def test_trains_as_it_stands(tmp_path):
    trainer = SLASTrainer(sd3_pipeline(), redness, tiny_config(tmp_path))
    before = trained_weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 2 and not same(before, trained_weights(trainer))
    assert trainer.args.prompt_dataset == "shapes" and len(trainer.train_dataset) > 100


def test_prompts_from_a_file_that_the_configuration_names(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\ntwo dogs\nsnow\n")
    trainer = SLASTrainer(sd3_pipeline(), redness, tiny_config(tmp_path, prompt_dataset=str(path), max_steps=1))
    trainer.train()
    assert list(trainer.train_dataset["prompt"]) == ["a cat", "two dogs", "snow"]


def test_epochs_are_passes_over_the_prompts(tmp_path):
    trainer = tiny_trainer(tmp_path, cls=Watched, max_steps=-1, num_train_epochs=2)
    trainer.train()
    groups = [rollout.call["prompt"][0] for rollout in trainer.rollouts]  # a chunk is a group
    assert trainer.state.global_step == 6 and trainer.state.epoch == 2.0
    assert sorted(groups[:6]) == sorted(groups[6:]) == sorted(PROMPTS["prompt"]) and groups[:6] != groups[6:]


def test_a_folder_in_place_of_the_pipeline(tmp_path):
    sd3_pipeline().save_pretrained(tmp_path / "model")
    trainer = SLASTrainer(
        str(tmp_path / "model"),
        redness,
        tiny_config(tmp_path / "run", model_init_kwargs={"text_encoder_3": None, "tokenizer_3": None}, max_steps=1),
        train_dataset=PROMPTS,
        peft_config=lora(),
    )
    trainer.train()
    assert same(trained_weights(trainer), trained_weights(trained(tmp_path / "again", max_steps=1)))


def test_callbacks_and_an_optimizer_of_ones_own(tmp_path):
    class Seen(TrainerCallback):
        steps = []

        def on_step_end(self, args, state, control, **kwargs):
            self.steps.append(state.global_step)

    pipe = sd3_pipeline()
    optimizer = torch.optim.SGD(pipe.transformer.parameters(), lr=1e-2)
    trainer = tiny_trainer(tmp_path, full=True, model=pipe, callbacks=[Seen()], optimizers=(optimizer, None))
    before = trained_weights(trainer)
    trainer.train()
    assert Seen.steps == [1, 2] and not same(before, trained_weights(trainer))


def test_columns_of_the_data_set_reach_every_reward(tmp_path):
    seen = []

    def by_tag(prompts, images, tag, **columns):
        seen.extend(zip(prompts, tag, strict=True))
        return redness(prompts, images)

    data = Dataset.from_dict({"prompt": ["a cat", "two dogs", "snow"], "tag": [["cat"], ["dog"], []]})
    config = tiny_config(tmp_path, reward_weights=[1.0, 0.5], max_steps=1)
    trainer = SLASTrainer(sd3_pipeline(), [by_tag, blueness], config, train_dataset=data, peft_config=lora())
    trainer.train()
    rows = list(zip(data["prompt"], data["tag"], strict=True))
    assert len(seen) == 8 and all(row in rows for row in seen)
    [line] = logged(tmp_path)
    total = line["rewards/by_tag/mean"] + 0.5 * line["rewards/blueness/mean"]
    assert line["reward"] == pytest.approx(total, rel=1e-5)


# What is trained


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_should_move_moves_and_nothing_else(tmp_path, family, full):
    trainer = tiny_trainer(tmp_path, family, full=full)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    others = [m for m in trainer.pipe.components.values() if isinstance(m, torch.nn.Module) and m is not trainer.model]
    frozen = [p.detach().clone() for module in others for p in module.parameters()]
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    expected = set(before) if full else {name for name in before if "lora" in name}
    matrices = {name for name in expected if before[name].ndim > 1}  # some biases have no influence, as those of keys
    assert matrices and matrices <= moved <= expected
    now = [p for module in others for p in module.parameters()]
    assert frozen and all(torch.equal(a, b) for a, b in zip(frozen, now, strict=True))
    assert trainer.model.dtype == torch.float32 and not any(p.requires_grad for p in now)


def test_a_denoiser_without_adapters_is_trained_in_full(tmp_path):
    pipe = pixart_pipeline()
    call = {"max_sequence_length": 8, "use_resolution_binning": False, "clean_caption": False}
    trainer = tiny_trainer(tmp_path, full=True, model=pipe, pipeline_kwargs=call)
    before = trained_weights(trainer)
    trainer.train()
    assert not same(before, trained_weights(trainer))
    with pytest.raises(ValueError, match="PixArtTransformer2DModel takes no adapter; leave peft_config out"):
        tiny_trainer(tmp_path, model=pipe)


def test_a_pipeline_that_knows_nothing_of_adapters(tmp_path):
    size = {"height": 64, "width": 64, "pipeline_kwargs": None}
    whole = trained(tmp_path, model=ldm_pipeline(), **size, save_strategy="steps", save_steps=1)
    resumed = tiny_trainer(tmp_path / "resumed", model=ldm_pipeline(), **size)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(trained_weights(whole), trained_weights(resumed))
    plain = ldm_pipeline()
    plain.unet.load_lora_adapter(tmp_path / "checkpoint-2", prefix=None, use_safetensors=True)
    inputs = torch.ones(1, 4, 8, 8), 5, torch.ones(1, 3, 16)
    assert torch.equal(plain.unet(*inputs)[0], whole.model(*inputs)[0])


# The loss


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_micro_step_is_the_equation(tmp_path, family, full, beta):
    trainer = tiny_trainer(tmp_path, family, cls=Watched, full=full, epsilon=1e-3, epsilon_high=2e-3, beta=beta)
    rollout = trainer.replayer.sample(
        **trainer.calls.call(PROMPTS, [0] * 4, [torch.Generator().manual_seed(i) for i in range(4)])
    )
    advantages = torch.tensor([1.0, -0.5, 0.25, -2.0])
    step = rollout.trainable_steps[1]
    reference = trainer.replayer.replay(rollout, step).mean.detach()
    with torch.no_grad():  # an update, so that the ratio is not 1
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += (0.02 if full else 0.5) * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(0)
                )

    loss = trainer.compute_loss(trainer.model, {"rollout": rollout, "advantages": advantages, "step": step})
    loss.backward()
    gradient = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    trainer.model.zero_grad()

    policy = trainer.replayer.replay(rollout, step)
    ratio = (policy.log_prob - rollout.log_probs[:, step]).exp()
    clipped = ratio.clamp(1 - 1e-3, 1 + 2e-3)
    by_hand = -torch.min(ratio * advantages, clipped * advantages)
    by_hand = by_hand + beta * ((policy.mean - reference) ** 2 / (2 * policy.std**2)).flatten(1).mean(1)
    by_hand.mean().backward()
    assert (ratio - 1).abs().max() > 1e-3  # the clip range matters here
    torch.testing.assert_close(loss, by_hand.mean())
    assert gradient and any(g.abs().max() > 0 for g in gradient)
    for ours, expected in zip(
        gradient, (p.grad for p in trainer.model.parameters() if p.grad is not None), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_an_update_is_the_mean_over_chunks_and_steps(tmp_path):
    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            self.taken = [p.grad.clone() for p in model.parameters() if p.requires_grad]

    kept = Gradient()
    # Without a learning rate the weights stay, and so the gradient can be computed once more.
    trainer = tiny_trainer(
        tmp_path, cls=Watched, callbacks=[kept], max_steps=1, learning_rate=0.0, max_grad_norm=0.0, gamma=0.25
    )
    trainer.train()
    images = [image for pictures in trainer.pictures for image in pictures]
    advantages = slas_advantages(redness([], images), 4, gamma=0.25).split(4)
    loss = torch.zeros(())
    for rollout, shaped in zip(trainer.rollouts, advantages, strict=True):
        for step in (0, 1, 2):  # the last of four is not trained
            ratio = (trainer.replayer.replay(rollout, step).log_prob - rollout.log_probs[:, step]).exp()
            loss = loss - (ratio * shaped).mean() / (2 * 3)
    trainer.model.zero_grad()
    loss.backward()
    expected = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert len(trainer.rollouts) == 2 and any(g.abs().max() > 1e-6 for g in expected)
    for ours, by_hand in zip(kept.taken, expected, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-8)
    assert logged(tmp_path)[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_kl_is_to_the_weights_before_training(tmp_path, full, bf16):
    trained(tmp_path, full=full, bf16=bf16, beta=0.1, max_steps=3)
    kl = [line["kl"] for line in logged(tmp_path)]
    assert kl[0] == 0.0 and 0 < kl[1] < kl[2]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2},
        {"gradient_accumulation_steps": 2},
        {"num_iterations": 2, "gradient_accumulation_steps": 3},
    ],
    ids=["two passes", "three updates", "two passes of two updates"],
)
def test_several_updates_of_one_rollout(tmp_path, settings):
    trainer = tiny_trainer(tmp_path, "sd", cls=Watched, full=True, epsilon=1e-5, max_steps=2, **settings)
    trainer.train()
    first, second = logged(tmp_path)
    assert len(trainer.rollouts) == 2  # one rollout of two chunks
    assert first["ratio/max_deviation"] == 0.0 and first["clip_ratio/region_mean"] == 0.0
    assert second["ratio/max_deviation"] > 1e-5
    assert 0 < second["clip_ratio/region_mean"] <= 1
    assert second["clip_ratio/region_mean"] == pytest.approx(
        second["clip_ratio/low_mean"] + second["clip_ratio/high_mean"]
    )
    assert "reward" in first and "reward" not in second


def test_every_pass_trains_every_step_of_every_chunk_once(tmp_path):
    trainer = tiny_trainer(tmp_path, cls=Watched, num_iterations=2, gradient_accumulation_steps=3, max_steps=4)
    trainer.train()
    chunks = [id(rollout) for rollout in trainer.rollouts]
    trained = [(chunks.index(id(inputs["rollout"])), inputs["step"]) for inputs in trainer.micro_steps]
    everything = {(chunk, step) for chunk in (0, 1) for step in (0, 1, 2)}
    assert len(chunks) == 2 and set(trained[:6]) == set(trained[6:]) == everything


# Sampling


@pytest.mark.parametrize(("fraction", "steps"), [(1.0, 5), (0.6, 3), (0.2, 1), (0.01, 1)])
def test_a_share_of_the_timesteps(tmp_path, fraction, steps):
    trainer = tiny_trainer(
        tmp_path, cls=Watched, num_inference_steps=6, timestep_fraction=fraction, max_steps=2, learning_rate=0.0
    )
    trainer.train()
    drawn = [{inputs["step"] for inputs in trainer.micro_steps if inputs["rollout"] is r} for r in trainer.rollouts]
    assert len(trainer.micro_steps) == 4 * steps and all(len(each) == steps for each in drawn)
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]  # the chunks of a rollout
    assert set.union(*drawn) <= set(range(5))


def test_the_final_step_is_trained_if_asked_for(tmp_path):
    trainer = tiny_trainer(tmp_path, "sd", cls=Watched, train_final_step=True, max_steps=1)
    trainer.train()
    assert {inputs["step"] for inputs in trainer.micro_steps} == {0, 1, 2, 3}


def test_a_final_step_without_noise_cannot_be_trained(tmp_path):
    with pytest.raises(ValueError, match="4 timesteps should be trained .* 4 steps, of which 3 can be trained"):
        tiny_trainer(tmp_path, "sd3", train_final_step=True, noise_schedule="cps").train()


@pytest.mark.parametrize(("start", "window"), [(1, [1, 2]), (None, None)])
def test_a_window_of_stochastic_steps(tmp_path, start, window):
    trainer = tiny_trainer(
        tmp_path, cls=Watched, num_inference_steps=6, sde_window_size=2, sde_window_start=start, max_steps=4
    )
    trainer.train()
    for rollout in trainer.rollouts:
        steps = list(rollout.trainable_steps)
        trained = {inputs["step"] for inputs in trainer.micro_steps if inputs["rollout"] is rollout}
        assert trained == set(steps) and steps == (window or [steps[0], steps[0] + 1])
        assert steps[0] <= 3 and all(step.std == 0 for i, step in enumerate(rollout.steps) if i not in steps)
    if start is None:
        assert len({rollout.trainable_steps for rollout in trainer.rollouts}) > 1


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_initial_noise_of_a_group(tmp_path, family, shared):
    # Chunks of three, so that a group of six lies in two of them.
    trainer = tiny_trainer(
        tmp_path,
        family,
        cls=Watched,
        init_same_noise=shared,
        per_device_train_batch_size=3,
        num_generations=6,
        steps_per_generation=4,
        max_steps=1,
    )
    trainer.train()
    first = torch.cat([rollout.steps[0].sample for rollout in trainer.rollouts]).flatten(1)
    last = torch.cat([rollout.steps[-1].prev_sample for rollout in trainer.rollouts]).flatten(1)
    assert len(first) == 12 and len(first.unique(dim=0)) == (2 if shared else 12)
    assert len(last.unique(dim=0)) == 12
    assert not shared or (first[:6] == first[0]).all()


@pytest.mark.parametrize(("guidance", "batch"), [(5.0, 8), (1.0, 4)])
def test_guidance_in_sampling_and_in_the_loss(tmp_path, guidance, batch):
    trainer = tiny_trainer(tmp_path, "sd", guidance_scale=guidance, max_steps=1)
    seen = {True: set(), False: set()}

    def hook(module, args, kwargs):
        seen[torch.is_grad_enabled()].add(len(args[0] if args else kwargs["sample"]))

    trainer.model.register_forward_pre_hook(hook, with_kwargs=True)
    trainer.train()
    assert seen == {True: {batch}, False: {batch}}


def test_rewards_see_the_pictures_of_the_pipeline(tmp_path):
    given = []

    def keep(prompts, images, **columns):
        given.extend(images)
        return redness(prompts, images)

    trainer = tiny_trainer(tmp_path, "sd", keep, cls=Watched, max_steps=1, learning_rate=0.0)
    trainer.train()
    latents = torch.cat([rollout.steps[-1].prev_sample for rollout in trainer.rollouts])
    with torch.no_grad():
        decoded = trainer.pipe.vae.decode(latents / trainer.pipe.vae.config.scaling_factor)[0]
    expected = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert (expected < 100).any() and (expected > 150).any()  # dark ones and bright ones
    for image, pixels in zip(given, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pipeline_works_as_before_afterwards(tmp_path, family, full):
    build, call = PIPELINES[family]
    pipe, fresh = build(), build()

    def picture(pipe):
        return pipe(
            "a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt", **call
        )[0]

    tiny_trainer(tmp_path, family, model=pipe, full=full, learning_rate=0.0).train()
    assert type(pipe) is type(fresh) and type(pipe.scheduler) is type(fresh.scheduler)
    assert torch.equal(picture(pipe), picture(fresh))


# Rewards


def test_a_reward_of_weight_0_is_logged_and_not_trained_on(tmp_path):
    alone = trained(tmp_path / "alone")
    watched = trained(tmp_path / "watched", reward_funcs=[redness, blueness], reward_weights=[1.0, 0.0])
    assert same(trained_weights(alone), trained_weights(watched))
    for one, two in zip(logged(tmp_path / "alone"), logged(tmp_path / "watched"), strict=True):
        assert one["reward"] == two["reward"] == pytest.approx(two["rewards/redness/mean"])
        assert two["rewards/blueness/mean"] > 0 and two["rewards/blueness/std"] > 0


def test_images_without_a_score_have_no_part_in_it(tmp_path):
    def half(prompts, images, **columns):
        return [None if i % 2 else value for i, value in enumerate(redness(prompts, images))]

    trainer = tiny_trainer(tmp_path, reward_funcs=half, cls=Watched, max_steps=1)
    trainer.train()
    advantages = trainer.micro_steps[0]["advantages"]
    assert (advantages[1::2] == 0).all() and (advantages[::2] != 0).all()


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_no_score_at_all_is_an_error(tmp_path, nothing):
    def scoreless(prompts, images, **columns):
        return [nothing] * len(images)

    with pytest.raises(ValueError, match="No image of the first rollout got a score: scoreless returned only"):
        tiny_trainer(tmp_path, reward_funcs=scoreless).train()
    with pytest.raises(ValueError, match="got a score: scoreless returned only"):  # redness is not trained on
        tiny_trainer(tmp_path, reward_funcs=[redness, scoreless], reward_weights=[0.0, 1.0]).train()


def test_a_reward_that_fails_is_named_and_nothing_is_half_written(tmp_path):
    def short(prompts, images, **columns):
        return [0.5]

    with pytest.raises(ValueError, match="Reward 'short' returned 1 values for 4 images"):
        tiny_trainer(tmp_path, reward_funcs=short, save_strategy="steps", save_steps=1).train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_coarse_reward_gets_a_warning(tmp_path, caplog):
    def rounded(prompts, images, **columns):
        return [round(value, 2) for value in redness(prompts, images)]

    def half_precision(prompts, images, **columns):
        return torch.tensor([0.4 + value / 20 for value in redness(prompts, images)]).half()

    for reward in (rounded, half_precision, redness):
        caplog.clear()
        tiny_trainer(tmp_path, "sd", reward, max_steps=1).train()
        warned = [record.getMessage() for record in caplog.records if "resolves differences" in record.getMessage()]
        assert len(warned) == (reward is not redness)
        assert all(repr(reward.__name__) in text and "Score in float32" in text for text in warned)


# Logs


def test_what_is_logged(tmp_path):
    trained(tmp_path, reward_funcs=[redness, blueness], beta=0.1)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    for name in (
        ["loss", "grad_norm", "learning_rate", "epoch", "step_time", "images_per_second", "kl", "gamma"]
        + ["reward", "reward_std", "frac_reward_zero_std", "frac_groups_filtered"]
        + [f"rewards/{reward}/{figure}" for reward in ("redness", "blueness") for figure in ("mean", "std")]
        + [f"clip_ratio/{which}_mean" for which in ("low", "high", "region")]
        + [f"advantages/{which}" for which in ("std", "abs_max", "clip_fraction", "effective_share", "batch_std")]
        + ["ratio/mean", "ratio/max_deviation"]
    ):
        assert all(math.isfinite(line[name]) for line in lines), name
    assert all(line["ratio/mean"] == 1.0 and line["images_per_second"] > 0 for line in lines)
    assert len(logged(tmp_path, "train_runtime")) == 1


# Precision and memory


def test_autocast_does_not_move_the_ratio(tmp_path):
    trainer = trained(tmp_path, "sd", full=True, bf16=True)
    assert all(line["ratio/max_deviation"] == 0.0 for line in logged(tmp_path))
    assert trainer.model.dtype == torch.float32


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_denoiser_that_computes_something_else_in_train_mode(tmp_path, gradient_checkpointing):
    family = dit.FAMILIES["hidream"]
    changes = {"pipeline_kwargs": family.call, "max_steps": 1, "gradient_checkpointing": gradient_checkpointing}
    trainer = trained(tmp_path, model=family.build(), guidance_scale=None, height=None, width=None, **changes)
    assert trainer.state.log_history[0]["ratio/max_deviation"] == 0 and trainer.state.log_history[0]["grad_norm"] > 0


def test_gradient_checkpointing_gives_the_same_weights(tmp_path):
    plain, checkpointed = trained(tmp_path / "plain"), tiny_trainer(tmp_path, gradient_checkpointing=True)
    assert checkpointed.model.is_gradient_checkpointing
    checkpointed.train()
    for ours, expected in zip(trained_weights(checkpointed).values(), trained_weights(plain).values(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_default_configuration_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = SLASTrainer(sd3_pipeline(), redness)
    assert isinstance(trainer.args, SLASConfig) and trainer.args.gamma == 0.5


def test_a_run_is_repeatable(tmp_path):
    """The adapter's random weights follow from the seed, whatever was drawn before."""
    one, two, other = sd3_pipeline(), sd3_pipeline(), sd3_pipeline()
    torch.manual_seed(1)
    one = trained(tmp_path / "one", model=one)
    torch.manual_seed(2)
    two = trained(tmp_path / "two", model=two)
    other = trained(tmp_path / "other", model=other, seed=43)
    assert same(trained_weights(one), trained_weights(two))
    assert not same(trained_weights(one), trained_weights(other))
