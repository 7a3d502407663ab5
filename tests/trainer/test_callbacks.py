"""What a run shows while it trains, and the metrics that it leaves on disk."""

import numpy as np
import pytest
from transformers.trainer_callback import ProgressCallback

from slas_trl.trainer.callbacks import RLProgressCallback

from .tiny_trainers import PROMPTS, logged, trained


def test_the_progress_bar_shows_the_figures_that_matter_and_evaluations_above_it(tmp_path, capsys):
    settings = {"eval_dataset": PROMPTS, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trained(tmp_path, beta=0.1, disable_tqdm=False, max_steps=2, **settings)
    printed = capsys.readouterr()
    assert f"'eval_reward': '{logged(tmp_path, 'eval_reward')[0]['eval_reward']:.4g}'" in printed.out
    *_, bar = [line for line in printed.err.replace("\r", "\n").splitlines() if "2/2" in line]
    *_, line = logged(tmp_path)
    for key, label in RLProgressCallback.SHOWN.items():
        assert f"{label}={line[key]:.3g}" in bar
    assert line["kl"] > 0
    callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert callbacks.count(RLProgressCallback) == 1 and ProgressCallback not in callbacks


def test_one_log_for_several_updates_has_their_means_and_a_new_run_a_new_file(tmp_path, capsys):
    trained(tmp_path, max_steps=2)
    ones = logged(tmp_path)
    trained(tmp_path, max_steps=2, logging_steps=2)
    [both] = logged(tmp_path)
    assert not list(tmp_path.glob("*calibration*")) and "calibration/narrow_share" in both  # without log_completions
    assert "images/s" not in capsys.readouterr().err  # disable_tqdm
    for key in ("reward", "reward_std", "advantages/std", "ratio/mean"):
        assert both[key] == pytest.approx(np.mean([line[key] for line in ones]), rel=1e-6)
    assert both["step"] == 2 and both["step_time"] < 60
