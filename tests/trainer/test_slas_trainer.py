"""`SLASTrainer` as a person uses it: what can be given, what is trained and logged, and what is refused."""

import dataclasses
import math
import os

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL.Image import Image
from transformers import TrainerCallback

from slas_trl import SLASConfig, SLASTrainer
from slas_trl.advantages import slas_advantages
from slas_trl.rewards import brightness
from tests.policy.zoo.all import FAMILIES as ZOO
from tests.tiny_pipelines import PIPELINES, sd3_pipeline

from .tiny_trainers import (
    DENOISERS,
    HELD_OUT,
    PROMPTS,
    SAVED,
    Watched,
    blueness,
    call_of,
    close,
    column,
    logged,
    lora,
    publish,
    redness,
    same,
    tiny_config,
    tiny_trainer,
    trained,
    trained_weights,
)
from .zoo_trainers import zoo_trainer


def test_a_folder_the_configurations_prompts_and_a_run_that_is_repeatable(tmp_path):
    """The adapter's random weights follow from the seed, whatever was drawn before."""
    sd3_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS["prompt"]))
    parts = {"model_init_kwargs": {"text_encoder_3": None, "tokenizer_3": None}}
    config = tiny_config(tmp_path / "run", prompt_dataset=str(tmp_path / "prompts.txt"), **parts)
    torch.manual_seed(1)
    trainer = SLASTrainer(str(tmp_path / "model"), redness, config, peft_config=lora())
    assert list(trainer.train_dataset["prompt"]) == list(PROMPTS["prompt"])
    trainer.train()
    torch.manual_seed(2)
    assert same(trained_weights(trainer), trained_weights(trained(tmp_path / "again")))
    assert not same(trained_weights(trainer), trained_weights(trained(tmp_path / "other", seed=43)))


def test_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = SLASTrainer(sd3_pipeline(), redness)
    assert isinstance(trainer.args, SLASConfig) and trainer.args.gamma == 0.5
    assert trainer.args.prompt_dataset == "shapes" and len(trainer.train_dataset) > 100
    trainer = tiny_trainer(tmp_path, peft_config=LoraConfig(r=4))
    names = {name.split(".lora_")[0].split("attn.")[1] for name in trained_weights(trainer)}
    assert names == {"to_q", "to_k", "to_v", "to_out.0"}


def test_epochs_are_passes_over_the_prompts(tmp_path):
    trainer = tiny_trainer(tmp_path, cls=Watched, max_steps=-1, num_train_epochs=2)
    trainer.train()
    groups = [rollout.call["prompt"][0] for rollout in trainer.rollouts]  # a chunk is a group
    assert trainer.state.global_step == 6 and trainer.state.epoch == 2.0
    assert sorted(groups[:6]) == sorted(groups[6:]) == sorted(PROMPTS["prompt"]) and groups[:6] != groups[6:]


def test_an_optimizer_of_ones_own(tmp_path):
    pipe = sd3_pipeline()
    optimizer = torch.optim.SGD(pipe.transformer.parameters(), lr=1e-2)
    trainer = tiny_trainer(tmp_path, full=True, model=pipe, optimizers=(optimizer, None))
    before = trained_weights(trainer)
    trainer.train()
    assert not same(before, trained_weights(trainer))


def test_a_reward_that_goes_to_another_folder(tmp_path, monkeypatch, capsys):
    def wandering(prompts, images, **columns):
        os.chdir(tmp_path / "elsewhere")
        return redness(prompts, images)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    trainer = trained("run", reward_funcs=wandering, max_steps=1, disable_tqdm=False, **SAVED)
    trainer.save_model()
    trainer.create_model_card()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert {"metrics.jsonl", "README.md", "checkpoint-1"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert "rollout, 32 denoiser passes" in capsys.readouterr().err


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_all_that_should_move_moves_and_nothing_else(tmp_path, family, full):
    """And the pipeline is as before otherwise."""
    trainer = tiny_trainer(tmp_path, family, full=full, max_steps=1)
    scheduler = type(trainer.pipe.scheduler)
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
    assert type(trainer.pipe.scheduler) is scheduler
    assert trainer.model.dtype == torch.float32 and not any(p.requires_grad for p in now)


@pytest.mark.parametrize("name", [name for name, family in ZOO.items() if family.task == "text-to-image"])
def test_one_update_of_every_family(name, tmp_path):
    drawn = []

    def reward(prompts, images, **columns):
        drawn.extend(zip(prompts, images, strict=True))
        return redness(prompts, images)

    trainer = zoo_trainer(ZOO[name], tmp_path, reward)
    before = trained_weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 1 and not same(trained_weights(trainer), before)
    assert len(drawn) == 4 and {prompt for prompt, _ in drawn} <= set(PROMPTS["prompt"])
    assert all(isinstance(image, Image) and image.mode == "RGB" for _, image in drawn)
    (line,) = logged(tmp_path)
    assert line["ratio/max_deviation"] == 0.0 and line["grad_norm"] > 0


def test_a_video_is_trained_shown_and_judged_by_its_middle_frame(tmp_path):
    family, frames = ZOO["wan2.1"], []

    def watching(prompts, images, **columns):
        frames.extend(len(image) for image in images)
        return brightness(prompts, [image[2] for image in images])

    wide = dataclasses.replace(family, call={**family.call, "num_frames": 5})
    rewards = [watching, "brightness"]
    zoo_trainer(wide, tmp_path, rewards, report_to="tensorboard", log_completions=True).train()
    assert set(frames) == {5}  # a user's own reward sees all of them
    [line] = logged(tmp_path)
    assert line["rewards/brightness/mean"] == pytest.approx(line["rewards/watching/mean"])


@pytest.mark.parametrize(
    ("family", "kind", "beta"),
    [
        ("sd", "adapter", 0.0),
        ("sd", "full", 0.3),
        ("sd3", "adapter", 0.3),
        ("sd3", "full", 0.0),
        ("flux", "full", 0.3),
        *(("flux", kind, 0.3) for kind in ("continued", "continued, against the base")),
    ],
)
def test_a_micro_step_is_the_equation(tmp_path, family, kind, beta):
    pipe = PIPELINES[family][0]()
    if kind.startswith("continued"):
        publish(pipe, [DENOISERS[family]], tmp_path / "published")
    adapter = lora() if kind == "adapter" else None
    settings = {"epsilon": 1e-3, "epsilon_high": 2e-3, "beta": beta}
    settings |= {"kl_reference": "base"} if kind == "continued, against the base" else {}
    trainer = tiny_trainer(tmp_path, family, model=pipe, peft_config=adapter, **settings)
    rollout = trainer.replayer.sample(**call_of(family, 4))
    advantages = torch.tensor([1.0, -0.5, 0.25, -2.0])
    step = rollout.trainable_steps[1]
    with torch.no_grad():
        if kind == "continued, against the base":
            pipe.transformer.disable_adapters()
        reference = trainer.replayer.replay(rollout, step).mean
        if kind == "continued, against the base":
            pipe.transformer.enable_adapters()
        random = torch.Generator().manual_seed(0)
        for parameter in trainer.model.parameters():  # an update, so that the ratio is not 1
            if parameter.requires_grad:
                parameter += (0.02 if kind == "full" else 0.5) * torch.randn(parameter.shape, generator=random)

    loss = trainer.compute_loss(trainer.model, {"rollout": rollout, "advantages": advantages, "step": step})
    loss.backward()
    gradient = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()

    policy = trainer.replayer.replay(rollout, step)
    ratio = (policy.log_prob - rollout.log_probs[:, step]).exp()
    by_hand = -torch.min(ratio * advantages, ratio.clamp(1 - 1e-3, 1 + 2e-3) * advantages)
    by_hand = by_hand + beta * ((policy.mean - reference) ** 2 / (2 * policy.std**2)).flatten(1).mean(1)
    by_hand.mean().backward()
    assert (ratio - 1).abs().max() > 1e-3  # the clip range matters here
    torch.testing.assert_close(loss, by_hand.mean())
    assert any(g.abs().max() > 0 for g in gradient.values())
    close(gradient, {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})


def test_an_update_is_the_mean_over_chunks_and_steps(tmp_path):
    class Gradient(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            self.taken = [p.grad.clone() for p in model.parameters() if p.requires_grad]

    kept = Gradient()
    # Without a learning rate the weights stay, and so the gradient can be computed once more.
    settings = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, "gamma": 0.25}
    trainer = trained(tmp_path, cls=Watched, callbacks=[kept], **settings)
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
    """Autocast moves neither the ratio nor the KL."""
    trainer = trained(tmp_path, full=full, bf16=bf16, beta=0.1, max_steps=3)
    kl = column(tmp_path, "kl")
    assert kl[0] == 0.0 and 0 < kl[1] < kl[2] and column(tmp_path, "ratio/max_deviation") == [0.0] * 3
    assert trainer.model.dtype == torch.float32


@pytest.mark.parametrize(
    "settings",
    [
        {"num_iterations": 2, "max_steps": 2},
        {"gradient_accumulation_steps": 2, "max_steps": 3},
        {"num_iterations": 2, "gradient_accumulation_steps": 3, "max_steps": 4},
    ],
    ids=["two passes", "three updates", "two passes of two updates"],
)
def test_several_updates_of_one_rollout(tmp_path, settings):
    trainer = trained(tmp_path, "sd", cls=Watched, full=True, epsilon=1e-5, **settings)
    chunks = [id(rollout) for rollout in trainer.rollouts]
    assert len(chunks) == 2  # one rollout
    done = [(chunks.index(id(inputs["rollout"])), inputs["step"]) for inputs in trainer.micro_steps]
    everything = {(chunk, step) for chunk in (0, 1) for step in (0, 1, 2)}
    assert all(set(done[i : i + 6]) == everything for i in range(0, len(done), 6))  # in every pass
    first, second, *_ = logged(tmp_path)
    assert first["ratio/max_deviation"] == 0.0 and first["clip_ratio/region_mean"] == 0.0
    assert second["ratio/max_deviation"] > 1e-5
    low, high, region = (second[f"clip_ratio/{which}_mean"] for which in ("low", "high", "region"))
    assert 0 < region <= 1 and region == pytest.approx(low + high)
    assert "reward" in first and "reward" not in second


def test_a_share_of_the_timesteps(tmp_path):
    steps, settings = 3, {"num_inference_steps": 6, "timestep_fraction": 0.6, "learning_rate": 0.0}
    trainer = trained(tmp_path, cls=Watched, **settings)
    drawn = [{inputs["step"] for inputs in trainer.micro_steps if inputs["rollout"] is r} for r in trainer.rollouts]
    assert len(trainer.micro_steps) == 4 * steps and all(len(each) == steps for each in drawn)
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]  # the chunks of a rollout
    assert set.union(*drawn) <= set(range(5))


def test_the_final_step_is_trained_if_asked_for(tmp_path):
    trainer = trained(tmp_path, "sd", cls=Watched, train_final_step=True, max_steps=1)
    assert {inputs["step"] for inputs in trainer.micro_steps} == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="timestep_fraction"):  # it has no noise
        trained(tmp_path, train_final_step=True, noise_schedule="cps")


@pytest.mark.parametrize(("family", "shared"), [("sd", True), ("flux", False)])
def test_the_initial_noise_of_a_group(tmp_path, family, shared):
    # Chunks of three, so that a group of six lies in two of them.
    settings = {"per_device_train_batch_size": 3, "num_generations": 6, "steps_per_generation": 4, "max_steps": 1}
    trainer = trained(tmp_path, family, cls=Watched, init_same_noise=shared, **settings)
    first = torch.cat([rollout.steps[0].sample for rollout in trainer.rollouts]).flatten(1)
    last = torch.cat([rollout.steps[-1].prev_sample for rollout in trainer.rollouts]).flatten(1)
    assert len(first) == 12 and len(first.unique(dim=0)) == (2 if shared else 12)
    assert len(last.unique(dim=0)) == 12
    assert not shared or (first[:6] == first[0]).all()


def parts(prompts, images, **columns):
    """Scores by name, of which some are missing."""
    red = redness(prompts, images)
    odd = [None if i % 2 else 1.0 for i in range(len(red))]
    return {"reward": red, "double": [2 * value for value in red], "odd": odd}


def test_what_is_logged(tmp_path):
    trainer = trained(tmp_path, reward_funcs=[parts, blueness], cls=Watched, beta=0.1)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    for name in (
        ["loss", "grad_norm", "learning_rate", "epoch", "step_time", "images_per_second", "kl", "gamma"]
        + ["reward", "reward_std", "frac_reward_zero_std", "frac_groups_filtered", "rewards/parts/time"]
        + [f"clip_ratio/{which}_mean" for which in ("low", "high", "region")]
        + [f"advantages/{which}" for which in ("std", "abs_max", "clip_fraction", "effective_share", "batch_std")]
        + ["ratio/mean", "ratio/max_deviation"]
    ):
        assert all(math.isfinite(line[name]) for line in lines), name
    assert all(line["ratio/mean"] == 1.0 and line["images_per_second"] > 0 for line in lines)
    assert len(logged(tmp_path, "train_runtime")) == 1
    red = redness([], [image for pictures in trainer.pictures[:2] for image in pictures])
    first = lines[0]
    assert first["reward"] == pytest.approx(first["rewards/parts/mean"] + first["rewards/blueness/mean"])
    assert first["rewards/parts/mean"] == pytest.approx(np.mean(red))
    assert first["rewards/parts/double/mean"] == pytest.approx(2 * np.mean(red))
    assert first["rewards/parts/double/std"] == pytest.approx(2 * np.std(red))
    assert first["rewards/parts/odd/mean"] == 1.0 and first["rewards/parts/odd/std"] == 0.0
    assert first["rewards/parts/nan_share"] == 0.0


def traffic(trainer, name: str) -> list[str]:
    """Where a frozen component is told to go, and what else happens, in order."""
    events, device = [], trainer.accelerator.device

    def noting(event, call):
        return lambda *args, **kwargs: (events[-1:] == [event] or events.append(event), call(*args, **kwargs))[1]

    # On a machine without accelerators both are the CPU; the objects tell them apart.
    trainer.pipe.components[name].to = lambda to: events.append("here" if to is device else "away")
    trainer.replayer.sample = noting("sample", trainer.replayer.sample)
    trainer.compute_loss = noting("train", trainer.compute_loss)
    return events


def test_frozen_components_are_away_while_the_denoiser_is_trained(tmp_path):
    """And come back for a rollout that is resumed."""
    settings = {"gradient_accumulation_steps": 3, "max_steps": 3, **SAVED}
    plain = tiny_trainer(tmp_path / "plain", **settings)
    stays = traffic(plain, "vae")
    plain.train()
    assert stays == ["sample", "train"] * 2
    whole, again = (tiny_trainer(tmp_path / name, offload_frozen_components=True, **settings) for name in "ab")
    for trainer in (whole, again):
        components = [traffic(trainer, name) for name in ("text_encoder", "text_encoder_2", "vae")]
        from_checkpoint = str(tmp_path / "a" / "checkpoint-1") if trainer is again else None
        trainer.train(resume_from_checkpoint=from_checkpoint)
        begin = ["here", "away", "train"] if trainer is again else ["here", "sample", "away", "train"]
        assert all(events == [*begin, "here", "sample", "away", "train", "here"] for events in components)
        assert same(trained_weights(trainer), trained_weights(plain))
    components[0].clear()
    again.evaluate(HELD_OUT)
    assert components[0] == ["here", "here"]


def test_a_compiled_denoiser(tmp_path):
    """By the backend that compiles nothing but traces everything, for which no compiler is needed."""
    settings = {"use_ema": True, "max_steps": 1, "num_inference_steps": 3}
    compiled = trained(tmp_path, torch_compile=True, torch_compile_backend="eager", **settings)
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    assert column(tmp_path, "ratio/max_deviation") == [0.0]
    plain = trained_weights(trained(tmp_path / "plain", **settings))
    close(dict(zip(plain, trained_weights(compiled).values(), strict=True)), plain, rtol=1e-4, atol=1e-5)
    compiled.save_model()
    assert list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize(("family", "name"), [("sd", "activation_checkpointing"), ("flux", "gradient_checkpointing")])
def test_gradient_checkpointing(tmp_path, family, name):
    plain = trained(tmp_path / "plain", family, max_steps=1)
    checkpointed = tiny_trainer(tmp_path, family, max_steps=1, **{name: True})
    assert checkpointed.model.is_gradient_checkpointing
    checkpointed.train()
    assert column(tmp_path, "ratio/max_deviation") == [0.0]
    close(trained_weights(checkpointed), trained_weights(plain))


def test_a_denoiser_that_computes_something_else_in_train_mode(tmp_path):
    family = ZOO["hidream"]
    changes = {"pipeline_kwargs": family.call, "max_steps": 1, "gradient_checkpointing": True}
    trainer = trained(tmp_path, model=family.build(), guidance_scale=None, height=None, width=None, **changes)
    assert trainer.state.log_history[0]["ratio/max_deviation"] == 0 and trainer.state.log_history[0]["grad_norm"] > 0
