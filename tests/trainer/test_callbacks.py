"""What a run shows while it trains, and the metrics that it leaves on disk."""

import json

import numpy as np
import pytest
import torch
from transformers.trainer_callback import ProgressCallback

from slas_trl.trainer.callbacks import EMACallback, MetricsFileCallback, RLProgressCallback
from tests.trainer.tiny_trainers import PROMPTS, logged, tiny_trainer, trained


def test_the_progress_bar_shows_the_figures_that_matter(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, beta=0.1, disable_tqdm=False, max_steps=2)
    trainer.train()
    *_, bar = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "2/2" in line]
    *_, line = logged(tmp_path)
    for label, key in (
        ("reward", "reward"),
        ("std", "reward_std"),
        ("kl", "kl"),
        ("clip", "clip_ratio/region_mean"),
        ("images/s", "images_per_second"),
    ):
        assert f"{label}={line[key]:.3g}" in bar
    assert line["kl"] > 0
    callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert callbacks.count(RLProgressCallback) == 1 and ProgressCallback not in callbacks


def test_figures_stay_on_the_bar_until_there_are_newer_ones(tmp_path, capsys):
    """Only the first update of a rollout has a reward."""
    trained(tmp_path, disable_tqdm=False, gradient_accumulation_steps=3, max_steps=2)
    *_, bar = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "2/2" in line]
    first, second = logged(tmp_path)
    assert f"reward={first['reward']:.3g}" in bar and "reward" not in second
    assert f"images/s={first['images_per_second']:.3g}" in bar and "images_per_second" not in second


def test_an_evaluation_is_written_above_the_bar(tmp_path, capsys):
    trained(tmp_path, disable_tqdm=False, max_steps=1, eval_dataset=PROMPTS, eval_strategy="steps", eval_steps=1)
    [line] = logged(tmp_path, "eval_reward")
    assert f"'eval_reward': '{line['eval_reward']:.4g}'" in capsys.readouterr().out


def test_without_a_bar_there_is_none(tmp_path, capsys):
    trainer = trained(tmp_path, max_steps=1)
    assert not any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks)
    assert "images/s" not in capsys.readouterr().err


def test_metrics_of_a_resumed_run_are_those_of_one_run(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, max_steps=3, **settings)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.')  # killed while it wrote
    trainer = tiny_trainer(tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3]
    assert len(logged(tmp_path, "train_runtime")) == 1


def test_a_new_run_starts_a_new_file(tmp_path):
    trained(tmp_path, max_steps=3)
    trained(tmp_path, max_steps=1)
    assert [line["step"] for line in logged(tmp_path)] == [1]


def test_one_log_for_several_updates_has_their_means(tmp_path):
    trained(tmp_path / "one", max_steps=2)
    trained(tmp_path / "two", max_steps=2, logging_steps=2)
    ones, [both] = logged(tmp_path / "one"), logged(tmp_path / "two")
    for key in ("reward", "reward_std", "advantages/std", "ratio/mean"):
        assert both[key] == pytest.approx(np.mean([line[key] for line in ones]), rel=1e-6)
    assert both["step"] == 2 and both["step_time"] < 60


def test_only_the_main_process_writes(tmp_path):
    class State:
        is_world_process_zero, global_step = False, 1

    class Args:
        output_dir = str(tmp_path)

    MetricsFileCallback().on_log(Args, State, None, {"loss": 1.0})
    assert not list(tmp_path.iterdir())


def test_the_moving_average_begins_with_the_weights_before_training():
    weight, seen = torch.nn.Parameter(torch.zeros(1)), []
    ema = EMACallback(torch.nn.ParameterList([weight]), decay=0.9)
    ema.on_train_begin(None, None, None)
    for value in (1.0, 2.0, 3.0):
        weight.data.fill_(value)
        ema.on_step_end(None, None, None)
        with ema.averaged():
            seen.append(weight.item())
    assert seen == pytest.approx([0.1, 0.29, 0.561])


def test_the_moving_average_and_its_files(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(3))
    ema = EMACallback(torch.nn.ParameterList([weight]), decay=0.5)
    with ema.averaged():  # there is none before training
        assert weight.tolist() == [0.0] * 3
    ema.on_train_begin(None, None, None)
    for value in (1.0, 2.0, 3.0, 4.0):
        with torch.no_grad():
            weight.fill_(value)
        ema.on_step_end(None, None, None)
    with ema.averaged():
        average = weight.detach().clone()
        assert average.tolist() == [3.0625] * 3
    assert weight.tolist() == [4.0] * 3
    with pytest.raises(KeyError), ema.averaged():
        raise KeyError
    assert weight.tolist() == [4.0] * 3  # put back after an error too

    ema.save(tmp_path, writes=False)
    assert not list(tmp_path.iterdir())
    ema.save(tmp_path, writes=True)
    other = torch.nn.Parameter(torch.zeros(3))
    restored = EMACallback(torch.nn.ParameterList([other]), decay=0.5)
    restored.load(tmp_path)
    assert torch.equal(other, weight)
    with restored.averaged():
        assert torch.equal(other, average)
    assert json.dumps(restored.model.optimization_step) == "4"
