"""The record of every rollout, and the panel that a run leaves."""

import numpy as np
import pytest
from PIL import Image
from transformers import TrainerCallback

from slas_trl.advantages import compute_advantages
from slas_trl.run_files import read_lines

from .tiny_trainers import PROMPTS, blueness, logged, redness, resumed, trained


def one_in_three(prompts, images, **columns):
    return [None if i % 3 else value for i, value in enumerate(redness(prompts, images))]


def test_a_line_for_each_rollout_and_a_picture(tmp_path):
    rewards = []

    def keep(prompts, images, **columns):
        rewards.append(redness(prompts, images))
        return rewards[-1]

    settings = {"reward_weights": [2.0, 0.0], "scale_rewards": "batch", "gamma": 1.0, "log_completions": True}
    held_out = {"eval_reward_funcs": one_in_three, "eval_dataset": PROMPTS}
    trained(tmp_path, reward_funcs=[keep, blueness], **held_out, **settings, max_steps=3)
    lines = read_lines(tmp_path / "calibration.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    rollouts = [rewards[i] + rewards[i + 1] for i in range(0, len(rewards), 2)]  # of two chunks each
    for line, scores, metrics in zip(lines, rollouts, logged(tmp_path), strict=True):
        result = compute_advantages([2 * score for score in scores], 4, gamma=1.0)
        assert line["group_std"] == pytest.approx(result.group_std.tolist(), rel=1e-4)
        groups = result.advantages.view(2, 4).abs().sum(1).tolist()
        assert line["group_abs_advantage"] == pytest.approx(groups, rel=1e-4)
        assert line["weights"] == {"keep": 2.0, "blueness": 0.0, "one_in_three": 0.0}
        assert line["scale_rewards"] == "batch"
        assert line["reward_std_of_images"] == pytest.approx(2 * np.std(scores), rel=1e-4)
        for key in ("reward", "rewards/blueness/mean", "rewards/blueness/std", "advantages/effective_share", "gamma"):
            assert line[key] == pytest.approx(metrics[key], rel=1e-4)
        # Of two groups: 0.3 of the groups is 0.6 of the narrower one.
        narrow = groups[int(np.argmin(line["group_std"]))]
        assert metrics["calibration/narrow_share"] == pytest.approx(0.6 * narrow / sum(groups), rel=1e-3)
    with Image.open(tmp_path / "calibration.png") as picture:
        assert picture.size == (1300, 1050) and np.asarray(picture.convert("L")).std() > 20


def test_a_resumed_run_has_a_line_for_each_rollout_and_update(tmp_path):
    """Two updates for each rollout, of which the second begins with the third update."""
    drawn = []

    class Drawn(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            drawn.append((tmp_path / "calibration.png").is_file())

    settings = {"log_completions": True, "gradient_accumulation_steps": 3, "max_steps": 5}
    trained(tmp_path, save_strategy="steps", save_steps=1, callbacks=[Drawn()], **settings)
    assert drawn == [False, True, True, True, True]  # with each checkpoint
    whole = read_lines(tmp_path / "calibration.jsonl")
    assert [line["step"] for line in whole] == [1, 3, 5]
    for checkpoint in (2, 3):  # between two rollouts, and in the middle of one
        for name in ("calibration.jsonl", "metrics.jsonl"):
            with (tmp_path / name).open("a") as file:
                file.write('{"step": 7, "loss": 1.0, "weights": {"redness": 1.0')  # killed while it wrote
        resumed(tmp_path, tmp_path / f"checkpoint-{checkpoint}", **settings)
        assert read_lines(tmp_path / "calibration.jsonl") == whole
        assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3, 4, 5]
        assert len(logged(tmp_path, "train_runtime")) == 1


def test_a_picture_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "calibration.png").mkdir()
    assert trained(tmp_path, log_completions=True, max_steps=1).state.global_step == 1
    assert "calibration panel could not be drawn" in caplog.text
