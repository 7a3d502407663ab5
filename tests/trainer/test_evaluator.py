"""`evaluate()`: what is drawn and scored, and what is not changed by it."""

import functools

import numpy as np
import pytest
import torch

from tests.tiny_pipelines import PIPELINES

from .tiny_trainers import EVALUATED, HELD_OUT, PROMPTS, logged, redness, same, tiny_trainer, trained, trained_weights


def numbers(prompts, images, number, **columns):
    return [float(n) for n in number]


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_it_is_repeatable_and_depends_on_the_weights_alone(tmp_path, family):
    trainer = tiny_trainer(tmp_path, family, eval_dataset=HELD_OUT, num_generations_eval=2, max_steps=1)
    first, second = trainer.evaluate(), trainer.evaluate()
    for metrics in (first, second):
        assert metrics.pop("eval_runtime") > metrics.pop("eval_rewards/redness/time") > 0
    assert first == second
    # The batch size is none of its business.
    trainer.args.per_device_eval_batch_size = 1
    assert trainer.evaluate()["eval_reward"] == pytest.approx(first["eval_reward"], abs=1e-3)
    trainer.train()
    assert trainer.evaluate()["eval_reward"] != first["eval_reward"]


def test_its_metrics(tmp_path):
    settings = {"train_dataset": HELD_OUT, "eval_dataset": HELD_OUT, "num_generations_eval": 3}
    trainer = tiny_trainer(tmp_path, reward_funcs=[redness, numbers], reward_weights=[1.0, 0.5], **settings)
    metrics = trainer.evaluate()
    assert metrics["eval_samples"] == 9
    assert metrics["eval_rewards/numbers/mean"] == 2.0
    assert metrics["eval_rewards/numbers/std"] == pytest.approx(np.std([1, 2, 3]))
    assert metrics["eval_reward"] == pytest.approx(metrics["eval_rewards/redness/mean"] + 0.5 * 2.0)
    assert metrics["eval_reward_std"] > 0 and metrics["eval_rewards/redness/std"] > 0
    assert logged(tmp_path, "eval_reward")[0]["eval_reward"] == metrics["eval_reward"]
    # As many images as in a group by default, and several data sets.
    trainer.args.num_generations_eval = None
    metrics = trainer.evaluate({"easy": HELD_OUT, "hard": HELD_OUT.select([0])})
    assert metrics["eval_easy_samples"] == 12 and metrics["eval_hard_samples"] == 4


@pytest.mark.parametrize("family", PIPELINES)
def test_pictures_are_those_of_a_plain_call(tmp_path, monkeypatch, family):
    """With the pipeline's own scheduler, and other noise for every image."""
    pipe, fresh, seen, calls = PIPELINES[family][0](), PIPELINES[family][0](), [], []
    plain_call = type(pipe).__call__

    @functools.wraps(plain_call)
    def recorded(self, **call):
        calls.append(call)
        return plain_call(self, **call)

    def keep(prompts, images, **columns):
        seen.extend(images)
        return redness(prompts, images)

    monkeypatch.setattr(type(pipe), "__call__", recorded)
    tiny_trainer(tmp_path, family, keep, model=pipe, num_generations_eval=2).evaluate(HELD_OUT)
    [call] = calls
    assert call["prompt"] == [prompt for prompt in HELD_OUT["prompt"] for _ in range(2)]
    assert call["num_inference_steps"] == 4
    generators = [torch.Generator().manual_seed(generator.initial_seed()) for generator in call["generator"]]
    plain = plain_call(fresh, **{**call, "generator": generators}).images
    assert [image.tobytes() for image in seen] == [image.tobytes() for image in plain]
    assert len({image.tobytes() for image in seen}) == 6


def test_a_missing_score_of_one_reward_is_no_score_of_0(tmp_path):
    def judge(prompts, images, **columns):
        return [None, *[0.8] * (len(images) - 1)]

    def constant(prompts, images, **columns):
        return [0.3] * len(images)

    metrics = tiny_trainer(tmp_path, reward_funcs=[constant, judge]).evaluate(HELD_OUT)
    assert metrics["eval_reward"] == pytest.approx(1.1) and metrics["eval_rewards/judge/nan_share"] > 0


def test_a_data_set_given_with_the_call(tmp_path):
    trainer = tiny_trainer(tmp_path, num_generations_eval=1)
    assert trainer.evaluate(HELD_OUT, metric_key_prefix="test")["test_samples"] == 3
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer.evaluate()
    with pytest.raises(ValueError, match="no column 'prompt'"):
        trainer.evaluate(HELD_OUT.rename_column("prompt", "text"))


def test_it_leaves_the_run_as_it_is(tmp_path):
    plain = trained(tmp_path / "plain")
    evaluated = trained(tmp_path / "evaluated", eval_dataset=HELD_OUT, **EVALUATED)
    assert same(trained_weights(plain), trained_weights(evaluated))
    assert [line["step"] for line in logged(tmp_path / "evaluated", "eval_reward")] == [1, 2]


@pytest.mark.parametrize("metric", ["loss", "rewards/blueness/mean", "eval_held_out_reward"])
def test_a_metric_that_no_evaluation_has_is_refused_before_training(tmp_path, metric):
    with pytest.raises(ValueError, match="metric_for_best_model"):
        tiny_trainer(tmp_path, eval_dataset=HELD_OUT, metric_for_best_model=metric, **EVALUATED)


def test_rewards_are_checked_with_the_columns_of_what_they_score(tmp_path):
    def by_number(prompts, images, completions, number):
        return [float(n) for n in number]

    trainer = tiny_trainer(tmp_path, eval_dataset=HELD_OUT, eval_reward_funcs=by_number)
    assert trainer.evaluate()["eval_rewards/by_number/mean"] == 2.0
    for held_out in (PROMPTS, {"a": HELD_OUT, "b": PROMPTS}):
        with pytest.raises(TypeError, match="by_number"):
            tiny_trainer(tmp_path, eval_dataset=held_out, eval_reward_funcs=by_number)
