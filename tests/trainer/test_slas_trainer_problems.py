"""`SLASTrainer` when something is wrong: settings that do not fit, failing rewards, pictures and updates with NaN."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.tiny_pipelines import nan_in, sd3_pipeline, sd_pipeline, with_safety_checker

from .tiny_trainers import (
    HELD_OUT,
    PROMPTS,
    Watched,
    blueness,
    column,
    lora,
    redness,
    same,
    tiny_trainer,
    told,
    trained,
    trained_weights,
)


def test_a_folder_that_cannot_be_written_to_is_told_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="output_dir .*file/run' cannot be written to"):
        tiny_trainer(tmp_path / "file" / "run")


def with_dropout():
    pipe = sd3_pipeline()
    pipe.transformer.transformer_blocks[0].ff.net[1].p = 0.1
    return pipe


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"train_dataset": PROMPTS.select([0])}, ValueError, "1 prompts, .*needs 2"),
        ({"train_dataset": Dataset.from_dict({"text": ["a"] * 4})}, ValueError, r"'prompt'.*\['text'\]"),
        ({"peft_config": lora(lora_dropout=0.05)}, ValueError, "lora_dropout"),
        ({"peft_config": {"r": 4}}, TypeError, "peft_config"),
        ({"model": with_dropout()}, ValueError, "transformer has dropout"),
        ({"model": sd3_pipeline().transformer}, TypeError, "SD3Transformer2DModel"),
        ({"model": sd3_pipeline().to(torch.bfloat16), "full": True}, ValueError, "torch.bfloat16"),
        ({"reward_funcs": lambda prompts, images: [0.5] * len(images)}, TypeError, "columns"),
        ({"eval_reward_funcs": blueness}, ValueError, "eval_dataset"),
        ({"eval_reward_funcs": redness, "eval_dataset": HELD_OUT}, ValueError, "redness"),
        ({"reward_funcs": [redness, blueness], "reward_weights": [1.0] * 3}, ValueError, "reward_weights.* 3 .* 2 "),
    ],
)
def test_what_does_not_fit_is_refused_at_once(tmp_path, changes, error, named):
    with pytest.raises(error, match=named):
        tiny_trainer(tmp_path, **changes)


def test_a_noisy_denoiser(tmp_path):
    """At the last step. The ratio of every trained step is checked before the first update."""
    pipe, generator, calls = sd3_pipeline(), torch.Generator(), []

    def noisy(module, args, kwargs, output):
        calls.append(torch.is_grad_enabled())
        noise = 1e-2 * torch.randn(output[0].shape, generator=generator)
        return (output[0] + noise,) if kwargs["timestep"][0] < 800 else output

    pipe.transformer.register_forward_hook(noisy, with_kwargs=True)
    trainer = tiny_trainer(tmp_path, model=pipe)
    before = trained_weights(trainer)
    with pytest.raises(ValueError, match="ratio of step 2 should be 1"):
        trainer.train()
    assert calls.count(True) == 3 and same(before, trained_weights(trainer))  # all three steps, and no update


def scoreless(prompts, images, **columns):
    return [None] * len(images)


def with_nan(*rows):
    pipe = sd3_pipeline()
    nan_in(pipe.vae, *rows)
    return pipe


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"reward_funcs": scoreless}, "scoreless"),
        ({"reward_funcs": [redness, scoreless], "reward_weights": [0.0, 1.0]}, "scoreless"),  # only it is trained on
        ({"model": with_nan(0, 1, 2, 3)}, "vae in torch.float32"),
        ({"family": "sd", "model": with_safety_checker(sd_pipeline(), threshold=-2.0)}, "safety checker"),
    ],
)
def test_no_score_at_all_is_an_error(tmp_path, changes, named):
    with pytest.raises(ValueError, match=f"first rollout got a score: .*{named}"):
        trained(tmp_path, **changes)


def test_later_rollouts_without_a_score(tmp_path, caplog):
    """One is told, and five in a row end the run."""
    calls = iter(range(100))

    def tired(prompts, images, **columns):
        return redness(prompts, images) if next(calls) < 2 else [None] * len(images)

    with pytest.raises(ValueError, match="update 5 got a score, the 5th in a row"):
        trained(tmp_path, reward_funcs=tired, max_steps=40, beta=0.1)
    assert len(told(caplog, "after update 1 got a score")) == 1
    assert (tmp_path / "checkpoint-5" / "pytorch_lora_weights.safetensors").is_file()


def test_pictures_without_a_score_have_no_part_in_it(tmp_path, caplog):
    """The decoder makes one NaN, and the reward gives another no score."""
    seen = []

    def picky(prompts, images, **columns):
        seen.append(len(images))
        return [*redness(prompts, images)[:-1], None]

    trainer = trained(tmp_path, model=with_nan(0), reward_funcs=picky, cls=Watched, max_steps=1)
    assert seen == [3, 3]  # of each chunk of four
    advantages = trainer.micro_steps[0]["advantages"]
    assert (advantages[[0, 3]] == 0).all() and (advantages[1:3] != 0).all()
    assert column(tmp_path, "rewards/picky/nan_share") == [0.5]
    warned = told(caplog, "1 of 4 pictures of a chunk")
    assert len(warned) == 2 and any(repr(prompt) in warned[0] for prompt in PROMPTS["prompt"])
    assert trainer.evaluate(HELD_OUT)["eval_rewards/picky/nan_share"] > 0


def test_a_coarse_reward_gets_a_warning(tmp_path, caplog):
    def rounded(prompts, images, **columns):
        return [round(value, 2) for value in redness(prompts, images)]

    def half_precision(prompts, images, **columns):
        return torch.tensor([0.4 + value / 20 for value in redness(prompts, images)]).half()

    trained(tmp_path, "sd", [rounded, half_precision, redness], max_steps=1)
    warned = told(caplog, "resolves differences")
    assert len(warned) == 2 and "'rounded'" in warned[0] and "'half_precision'" in warned[1]


def test_rewards_that_differ_in_no_group_are_told_once(tmp_path, caplog):
    def constant(prompts, images, **columns):
        return [0.5] * len(images)

    trained(tmp_path, reward_funcs=constant, max_steps=3)
    assert len(told(caplog, "In no group do the rewards differ")) == 1


class Break(TrainerCallback):
    """Makes trained weights NaN after some updates, for the next one; keeps what each began with."""

    def __init__(self, *updates: int):
        self.updates, self.whole, self.changed = updates, None, []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.begun = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        now = [p.detach() for p in model.parameters() if p.requires_grad]
        pairs = zip(self.begun, now, strict=True)
        self.changed.append(any(not torch.equal(old, new) for old, new in pairs if new.isfinite().all()))

    def on_step_end(self, args, state, control, model, **kwargs):
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.whole is not None:
            for parameter, whole in zip(parameters, self.whole, strict=True):
                parameter.data.copy_(whole)
            self.whole = None
        if state.global_step in self.updates:
            self.whole = [p.detach().clone() for p in parameters]
            parameters[0].data.fill_(math.nan)


def test_an_update_with_nan_is_skipped_and_the_image_named(tmp_path, caplog):
    """Others follow: single ones do not end the run. A skipped one changes nothing, by momentum or decay either."""
    breaks = Break(2, 4)
    settings = {"max_steps": 6, "max_skipped_updates": 1, "weight_decay": 0.1}
    trainer = trained(tmp_path, callbacks=[breaks], **settings)
    assert column(tmp_path, "update_skipped") == [0.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert breaks.changed == [True, True, False, True, False, True]
    assert all(math.isfinite(loss) for loss in column(tmp_path, "loss")[3::2])  # NaN is not carried on
    warning, _ = told(caplog, "is skipped")
    assert "Update 3 is skipped" in warning and "(image 0 of its chunk, step" in warning
    assert any(repr(prompt) in warning for prompt in PROMPTS["prompt"])
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {4.0}
    assert all(weight.isfinite().all() for weight in trained_weights(trainer).values())


def test_a_loss_that_is_not_finite_is_no_update_even_where_its_gradient_is(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1)
    trainer.args.epsilon = math.nan  # min(x, nan) has the gradient of nan, a constant
    before = trained_weights(trainer)
    with pytest.raises(ValueError, match="Update 1 of 1 had NaN"):
        trainer.train()
    assert same(trained_weights(trainer), before)


def test_nan_before_any_update_is_no_divergence(tmp_path):
    trainer = tiny_trainer(tmp_path)
    next(p for p in trainer.model.parameters() if not p.requires_grad).data.fill_(math.nan)
    with pytest.raises(ValueError, match="before any update"):
        trainer.train()


@pytest.mark.parametrize(
    ("broken", "settings", "said", "left"),
    [
        # Whoever reads "done" takes the weights that are written for what training made of them.
        ([2], {"max_steps": 3}, "Update 3 of 3 had NaN", [0.0, 0.0]),
        (range(1, 9), {"max_steps": 9, "max_skipped_updates": 2}, "Update 4 of 9 .*max_skipped_upd", [0.0, 1.0, 1.0]),
    ],
    ids=["the last", "too many in a row"],
)
def test_a_run_that_ends_with_nan_keeps_what_was_learned(tmp_path, broken, settings, said, left):
    with pytest.raises(ValueError, match=said):
        trained(tmp_path, callbacks=[Break(*broken)], **settings)
    assert column(tmp_path, "update_skipped") == left
    assert (tmp_path / f"checkpoint-{len(left)}" / "pytorch_lora_weights.safetensors").is_file()
