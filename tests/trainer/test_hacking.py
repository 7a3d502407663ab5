"""Held-out rewards: scored in evaluation, never trained on, and watched."""

import itertools

import pytest
from transformers import TrainerControl, TrainerState

from slas_trl.trainer.callbacks import RewardHackingCallback

from .tiny_trainers import (
    EVALUATED,
    HELD_OUT,
    blueness,
    logged,
    redness,
    resumed,
    same,
    tiny_trainer,
    told,
    trained,
    trained_weights,
)


WATCHED = {"eval_dataset": HELD_OUT, **EVALUATED, "max_steps": 5, "hacking_patience": 2}


def rising_and_falling():
    """With every call, of which an evaluation has three; the images decide about the rest."""
    up, down = itertools.count(1), itertools.count(-1, -1)

    def rising(prompts, images, **columns):
        call = next(up)
        return [call + value for value in redness(prompts, images)]

    def falling(prompts, images, **columns):
        return [float(next(down))] * len(images)

    return {"reward_funcs": rising, "eval_reward_funcs": falling}


def test_a_held_out_reward_is_logged_in_evaluation_and_changes_nothing(tmp_path):
    settings = {"eval_dataset": HELD_OUT, **EVALUATED}
    plain = trained(tmp_path / "plain", **settings)
    watched = trained(tmp_path / "watched", eval_reward_funcs=[blueness], **settings)
    assert same(trained_weights(plain), trained_weights(watched))
    lines = (logged(tmp_path / run, "eval_reward") for run in ("plain", "watched"))
    for before, after in zip(*lines, strict=True):
        assert after["eval_reward"] == before["eval_reward"] and after["eval_reward_std"] == before["eval_reward_std"]
        assert 0 < after["eval_rewards/blueness/mean"] < 1 and after["eval_rewards/blueness/nan_share"] == 0
    for line in logged(tmp_path / "watched", "rewards/redness/mean"):
        assert not [key for key in line if "blueness" in key]


@pytest.mark.parametrize(("action", "steps"), [("warn", 5), ("stop", 3)])
def test_training_ends_where_it_is_asked_to(tmp_path, caplog, action, steps):
    trainer = trained(tmp_path, **rising_and_falling(), **WATCHED, hacking_action=action)
    assert trainer.state.global_step == steps  # the third evaluation is the second that moved
    warned = told(caplog, "likely reward hacking")
    assert len(warned) == steps - 2 and "the held-out 'falling' fell (-1.333 to -5.333)" in warned[0]


def test_a_resumed_run_sees_what_was_before_it(tmp_path):
    settings = {**rising_and_falling(), **WATCHED, "hacking_action": "stop"}
    trained(tmp_path, **settings | {"max_steps": 2})
    assert resumed(tmp_path, True, **settings).state.global_step == 3


def test_a_reward_of_weight_0_is_held_out_too(tmp_path):
    trainer = tiny_trainer(tmp_path, reward_funcs=[redness, blueness], reward_weights=[1.0, 0.0])
    assert trainer.weight_of == {"redness": 1.0, "blueness": 0.0}
    assert any(isinstance(c, RewardHackingCallback) for c in trainer.callback_handler.callbacks)
    callbacks = tiny_trainer(tmp_path, reward_funcs=[redness, blueness]).callback_handler.callbacks
    assert not any(isinstance(callback, RewardHackingCallback) for callback in callbacks)


def verdict(trained_reward, held_out, patience=2, prefix="eval"):
    """Whether training is stopped after these evaluations."""
    callback, control, state = RewardHackingCallback(["other"], patience, "stop"), TrainerControl(), TrainerState()
    for step, (reward, other) in enumerate(zip(trained_reward, held_out, strict=True)):
        state.log_history.append({"loss": 0.1, "step": step})
        metrics = {f"{prefix}_reward": reward, f"{prefix}_rewards/other/mean": other}
        for _ in range(2):  # two evaluations at a step count once
            state.log_history.append({**metrics, "step": step})
            callback.on_evaluate(None, state, control, metrics=metrics)
    return control.should_training_stop


@pytest.mark.parametrize(
    ("trained_reward", "held_out", "stops"),
    [
        ([1, 2, 3], [3, 2, 1], True),
        ([1, 2], [2, 1], False),  # not long enough
        ([1, 2, 3], [1, 2, 3], False),  # a real gain
        ([3, 2, 1], [3, 2, 1], False),  # a loss, but no hacking
        ([1, 2, 2], [3, 2, 1], False),  # the reward stopped rising
        ([1, 2, 3], [3, 3, 1], False),  # the other did not fall every time
        ([1, 3, 2, 3, 4], [5, 4, 4, 3, 2], True),  # the last ones count
        ([1, 2, 3], [3, float("nan"), 1], False),
    ],
)
def test_what_counts_as_hacking(trained_reward, held_out, stops):
    assert verdict(trained_reward, held_out) == stops
    assert verdict(trained_reward, held_out, prefix="eval_hard") == stops
