"""What a run shows while it trains, and the metrics that it leaves on disk."""

import numpy as np
import pytest
from transformers.trainer_callback import ProgressCallback

from slas_trl.trainer.callbacks import RLProgressCallback
from tests.trainer.tiny_trainers import PROMPTS, logged, tiny_trainer, trained


def test_the_progress_bar_shows_the_figures_that_matter(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, beta=0.1, disable_tqdm=False, max_steps=2)
    trainer.train()
    *_, bar = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "2/2" in line]
    *_, line = logged(tmp_path)
    for key, label in RLProgressCallback.SHOWN.items():
        assert f"{label}={line[key]:.3g}" in bar
    assert line["kl"] > 0
    callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert callbacks.count(RLProgressCallback) == 1 and ProgressCallback not in callbacks


def test_an_evaluation_is_written_above_the_bar(tmp_path, capsys):
    trained(tmp_path, disable_tqdm=False, max_steps=1, eval_dataset=PROMPTS, eval_strategy="steps", eval_steps=1)
    [line] = logged(tmp_path, "eval_reward")
    assert f"'eval_reward': '{line['eval_reward']:.4g}'" in capsys.readouterr().out


def test_metrics_of_a_resumed_run_are_those_of_one_run(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trained(tmp_path, max_steps=3, **settings)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.')  # killed while it wrote
    trainer = tiny_trainer(tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3]
    assert len(logged(tmp_path, "train_runtime")) == 1


def test_a_new_run_starts_a_new_file(tmp_path, capsys):
    trained(tmp_path, max_steps=2)
    trained(tmp_path, max_steps=1)
    assert [line["step"] for line in logged(tmp_path)] == [1]
    assert "images/s" not in capsys.readouterr().err  # disable_tqdm


def test_one_log_for_several_updates_has_their_means(tmp_path):
    trained(tmp_path / "one", max_steps=2)
    trained(tmp_path / "two", max_steps=2, logging_steps=2)
    ones, [both] = logged(tmp_path / "one"), logged(tmp_path / "two")
    for key in ("reward", "reward_std", "advantages/std", "ratio/mean"):
        assert both[key] == pytest.approx(np.mean([line[key] for line in ones]), rel=1e-6)
    assert both["step"] == 2 and both["step_time"] < 60
