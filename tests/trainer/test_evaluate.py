"""`evaluate()`, the best weights, and the moving average that is evaluated and saved in place of the weights."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.tiny_pipelines import PIPELINES
from tests.trainer.tiny_trainers import PROMPTS, logged, redness, same, tiny_trainer, trained, trained_weights


HELD_OUT = Dataset.from_dict({"prompt": ["a dog", "rain", "two cats"], "number": [1, 2, 3]})
EVERY_UPDATE = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def numbers(prompts, images, number=None, **columns):
    return [0.0] * len(images) if number is None else [float(n) for n in number]


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_it_is_repeatable_and_depends_on_the_weights_alone(tmp_path, family):
    trainer = tiny_trainer(tmp_path, family, eval_dataset=HELD_OUT, max_steps=1)
    first, second = trainer.evaluate(), trainer.evaluate()
    for metrics in (first, second):
        assert metrics.pop("eval_runtime") > metrics.pop("eval_rewards/redness/time") > 0
    assert first == second
    trainer.train()
    assert trainer.evaluate()["eval_reward"] != first["eval_reward"]
    again = tiny_trainer(tmp_path / "again", family, eval_dataset=HELD_OUT, per_device_eval_batch_size=1).evaluate()
    assert again["eval_reward"] == pytest.approx(
        first["eval_reward"], abs=1e-3
    )  # the batch size is none of its business


def test_its_metrics(tmp_path):
    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=[redness, numbers],
        reward_weights=[1.0, 0.5],
        eval_dataset=HELD_OUT,
        num_generations_eval=3,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_samples"] == 9
    assert metrics["eval_rewards/numbers/mean"] == 2.0
    assert metrics["eval_rewards/numbers/std"] == pytest.approx(np.std([1, 2, 3]))
    assert metrics["eval_reward"] == pytest.approx(metrics["eval_rewards/redness/mean"] + 0.5 * 2.0)
    assert metrics["eval_reward_std"] > 0 and metrics["eval_rewards/redness/std"] > 0
    assert logged(tmp_path, "eval_reward")[0]["eval_reward"] == metrics["eval_reward"]


def test_as_many_images_as_in_a_group_by_default(tmp_path):
    assert tiny_trainer(tmp_path, eval_dataset=HELD_OUT).evaluate()["eval_samples"] == 3 * 4


def test_it_samples_as_a_person_would(tmp_path):
    """With the pipeline's own scheduler: a stochastic step would show in the pictures."""
    seen = []

    def keep(prompts, images, **columns):
        seen.extend(np.asarray(image) for image in images)
        return redness(prompts, images)

    trainer = tiny_trainer(tmp_path, reward_funcs=keep, eval_dataset=HELD_OUT, num_generations_eval=2)
    calls = []
    step = FlowMatchEulerDiscreteScheduler.step
    trainer.pipe.scheduler.step = lambda *args, **kwargs: (
        calls.append(1) or step(trainer.pipe.scheduler, *args, **kwargs)
    )
    trainer.evaluate()
    assert len(calls) == 4  # one batch of six images, in four steps
    assert len(np.unique(np.stack(seen), axis=0)) == 6  # every image has its own noise


def test_several_data_sets(tmp_path):
    trainer = tiny_trainer(tmp_path, eval_dataset={"easy": HELD_OUT, "hard": PROMPTS})
    metrics = trainer.evaluate()
    assert metrics["eval_easy_samples"] == 12 and metrics["eval_hard_samples"] == 24


def test_a_data_set_given_with_the_call(tmp_path):
    trainer = tiny_trainer(tmp_path)
    assert trainer.evaluate(HELD_OUT, metric_key_prefix="test")["test_samples"] == 12
    with pytest.raises(ValueError, match="no prompts to evaluate on; pass eval_dataset"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="eval_dataset has no column 'prompt'"):
        trainer.evaluate(HELD_OUT.rename_column("prompt", "text"))


def test_it_leaves_the_run_as_it_is(tmp_path):
    plain = trained(tmp_path / "plain")
    evaluated = trained(tmp_path / "evaluated", eval_dataset=HELD_OUT, eval_strategy="steps", eval_steps=1)
    assert same(trained_weights(plain), trained_weights(evaluated))
    assert [line["step"] for line in logged(tmp_path / "evaluated", "eval_reward")] == [1, 2]


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_best_weights_are_loaded_at_the_end(tmp_path, full):
    class Remember(TrainerCallback):
        def __init__(self):
            self.weights = {}

        def on_step_end(self, args, state, control, model, **kwargs):
            self.weights[state.global_step] = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    scores = iter([0.5, 0.9, 0.1])
    remember = Remember()

    def reward(prompts, images, number=None, **columns):
        return redness(prompts, images) if number is None else [next(scores)] * len(images)

    trainer = tiny_trainer(
        tmp_path,
        reward_funcs=reward,
        full=full,
        eval_dataset=HELD_OUT.select([0]),
        callbacks=[remember],
        max_steps=3,
        load_best_model_at_end=True,  # by eval_reward
        **EVERY_UPDATE,
    )
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(0.9) and trainer.state.best_model_checkpoint.endswith("-2")
    best = list(trained_weights(trainer).values())
    assert all(torch.equal(a, b) for a, b in zip(best, remember.weights[2], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(best, remember.weights[3], strict=True))


@pytest.mark.parametrize(
    "metric",
    ["loss", "eval_rewards", "rewards/blueness/mean", "rewards/redness/a_component/mean", "eval_held_out_reward"],
)
def test_a_metric_that_no_evaluation_has_is_refused_before_training(tmp_path, metric):
    with pytest.raises(ValueError, match="metric_for_best_model must be one of .*, eval_rewards/redness/mean, but"):
        tiny_trainer(tmp_path, eval_dataset=HELD_OUT, metric_for_best_model=metric, **EVERY_UPDATE)


def test_metrics_that_evaluations_have(tmp_path):
    for metric in ("reward", "reward_std", "eval_rewards/redness/mean"):
        tiny_trainer(tmp_path, eval_dataset=HELD_OUT, metric_for_best_model=metric, **EVERY_UPDATE)
    several = {"held_out": HELD_OUT}
    tiny_trainer(tmp_path, eval_dataset=several, metric_for_best_model="eval_held_out_reward", **EVERY_UPDATE)


def test_rewards_are_checked_with_the_columns_of_what_they_score(tmp_path):
    def by_number(prompts, images, completions, number):
        return [float(n) for n in number]

    trainer = tiny_trainer(tmp_path, eval_dataset=HELD_OUT, eval_reward_funcs=by_number)
    assert trainer.evaluate()["eval_rewards/by_number/mean"] == 2.0
    for held_out in (PROMPTS, {"a": HELD_OUT, "b": PROMPTS}):
        with pytest.raises(TypeError, match="by_number"):
            tiny_trainer(tmp_path, eval_dataset=held_out, eval_reward_funcs=by_number)


def test_a_missing_score_of_one_reward_is_no_score_of_0_in_evaluation(tmp_path):
    def judge(prompts, images, **columns):
        return [None, *[0.8] * (len(images) - 1)]

    def constant(prompts, images, **columns):
        return [0.3] * len(images)

    trainer = tiny_trainer(tmp_path, reward_funcs=[constant, judge], eval_dataset=HELD_OUT)
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == pytest.approx(1.1) and metrics["eval_rewards/judge/nan_share"] > 0


# The moving average


def test_the_average_is_evaluated_and_saved_and_the_weights_are_trained(tmp_path):
    steps = []

    class Remember(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            steps.append([p.detach().clone() for p in model.parameters() if p.requires_grad])

    plain = trained(tmp_path / "plain", "sd", full=True, max_steps=3)
    trainer = tiny_trainer(
        tmp_path / "ema",
        "sd",
        full=True,
        use_ema=True,
        ema_decay=0.6,
        max_steps=3,
        callbacks=[Remember()],
        eval_dataset=HELD_OUT,
    )
    average = list(trained_weights(trainer).values())
    trainer.train()
    assert same(trained_weights(plain), trained_weights(trainer))  # it does not take part in training
    for weights in steps:
        average = [0.6 * a + 0.4 * w for a, w in zip(average, weights, strict=True)]

    trainer.save_model(str(tmp_path / "saved"))
    saved = type(trainer.model).from_pretrained(tmp_path / "saved" / "unet")
    for ours, by_hand in zip(saved.parameters(), average, strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-6)
    assert not same(trained_weights(trainer), dict(saved.named_parameters()))

    evaluated = trainer.evaluate()["eval_reward"]
    assert same(trained_weights(plain), trained_weights(trainer))  # the weights are back
    pipe = PIPELINES["sd"][0]()
    pipe.unet = saved
    fresh = tiny_trainer(tmp_path / "fresh", "sd", full=True, model=pipe, eval_dataset=HELD_OUT)
    assert fresh.evaluate()["eval_reward"] == evaluated != plain.evaluate(HELD_OUT)["eval_reward"]


def test_the_best_average(tmp_path):
    scores = iter([0.9, 0.1])

    def reward(prompts, images, number=None, **columns):
        return redness(prompts, images) if number is None else [next(scores, 0.0)] * len(images)

    trainer = trained(
        tmp_path,
        reward_funcs=reward,
        use_ema=True,
        eval_dataset=HELD_OUT.select([0]),
        metric_for_best_model="eval_reward",
        load_best_model_at_end=True,
        **EVERY_UPDATE,
    )
    trainer.save_model(str(tmp_path / "saved"))
    best, saved = (tmp_path / folder / "pytorch_lora_weights.safetensors" for folder in ("checkpoint-1", "saved"))
    assert same(load_file(best), load_file(saved))
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 1
