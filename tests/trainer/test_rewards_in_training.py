"""Rewards while training samples: called chunk by chunk, beside each other, with the same result in every order."""

import threading

import numpy as np
import pytest
import torch

from slas_trl.scripts.run_report import RunReport
from tests.policy.zoo.all import FAMILIES
from tests.tiny_pipelines import nan_in, sd3_pipeline, sd_pipeline, with_safety_checker
from tests.trainer.test_slas_trainer import blueness
from tests.trainer.tiny_trainers import (
    PROMPTS,
    Watched,
    logged,
    redness,
    same,
    tiny_trainer,
    trained,
    trained_weights,
    untimed,
)
from tests.trainer.zoo_trainers import zoo_trainer


def parts(prompts, images, **columns):
    """Scores by name, of which some are missing."""
    red = redness(prompts, images)
    return {
        "reward": red,
        "double": [2 * value for value in red],
        "odd": [None if i % 2 else 1.0 for i in range(len(red))],
    }


def test_concurrent_rewards_train_what_sequential_ones_do(tmp_path):
    def slow(prompts, images, **columns):
        threading.Event().wait(0.05)
        return blueness(prompts, images)

    rewards = [redness, "shapes_coloured_area", slow, parts]
    runs = {}
    for concurrent in (True, False):
        folder = tmp_path / str(concurrent)
        runs[concurrent] = trained(folder, reward_funcs=rewards, concurrent_rewards=concurrent, beta=0.1)
    assert same(trained_weights(runs[True]), trained_weights(runs[False]))
    lines = [[untimed(line) for line in logged(tmp_path / name)] for name in ("True", "False")]
    assert lines[0] == lines[1] and lines[0][0]["rewards/slow/mean"] > 0


def test_a_chunk_is_scored_while_the_next_is_sampled(tmp_path):
    scored = threading.Event()

    def waits(prompts, images, **columns):
        # The first chunk's score is not there before the second chunk is sampled.
        if len(trainer.rollouts) == 1:
            scored.wait(30)
        return redness(prompts, images)

    trainer = tiny_trainer(tmp_path, reward_funcs=waits, cls=Watched, max_steps=1, concurrent_rewards=True)
    sample = trainer.replayer.sample

    def sampling(**call):
        rollout = sample(**call)
        if len(trainer.rollouts) == 2:
            scored.set()
        return rollout

    trainer.replayer.sample = sampling
    trainer.train()
    assert scored.is_set() and len(trainer.rollouts) == 2


def test_the_rest_is_not_sampled_when_a_reward_cannot_score_the_first_chunk(tmp_path):
    def broken(prompts, images, **columns):
        raise RuntimeError("no such layer")

    trainer = tiny_trainer(tmp_path, reward_funcs=broken, cls=Watched, steps_per_generation=4)
    with pytest.raises(ValueError, match="Reward 'broken' raised RuntimeError: no such layer"):
        trainer.train()
    assert len(trainer.rollouts) == 1


def test_components_missing_scores_and_times_are_logged(tmp_path):
    trainer = tiny_trainer(tmp_path, reward_funcs=[parts, blueness], cls=Watched, max_steps=1)
    trainer.train()
    [line] = logged(tmp_path)
    red = redness([], [image for pictures in trainer.pictures for image in pictures])
    assert line["rewards/parts/mean"] == pytest.approx(np.mean(red))
    assert line["rewards/parts/double/mean"] == pytest.approx(2 * np.mean(red))
    assert line["rewards/parts/double/std"] == pytest.approx(2 * np.std(red))
    assert line["rewards/parts/odd/mean"] == 1.0 and line["rewards/parts/odd/std"] == 0.0
    assert line["rewards/parts/nan_share"] == 0.0 and line["rewards/parts/time"] > 0
    assert line["reward"] == pytest.approx(line["rewards/parts/mean"] + line["rewards/blueness/mean"])


def test_the_share_without_a_score(tmp_path):
    def some(prompts, images, **columns):
        return [None, *redness(prompts, images)[1:]]

    trained(tmp_path, reward_funcs=some, max_steps=1)  # two chunks of four
    assert logged(tmp_path)[0]["rewards/some/nan_share"] == pytest.approx(0.25)


def test_components_of_images_that_cannot_be_used_do_not_count(tmp_path):
    trainer = tiny_trainer(tmp_path, reward_funcs=parts, cls=Watched)
    with trainer._start_scoring(trainer.scorer) as scoring:
        images = trainer.draw(
            trainer.train_dataset, [0, 1, 2], [torch.Generator().manual_seed(i) for i in range(3)], 3
        )
        trainer._add_images(scoring, trainer.train_dataset, [0, 1, 2], images)
        scores = trainer._gather_scores(scoring, usable=torch.tensor([True, False, True]))
    assert scores.rewards.isnan().tolist() == [[False], [True], [False]]
    assert scores.components["parts/double"].isnan().tolist() == [False, True, False]


# Pictures that show nothing of the policy


def test_a_picture_that_the_decoder_made_nan_has_no_score(tmp_path, caplog):
    pipe = sd3_pipeline()
    nan_in(pipe.vae, 0)
    seen = []

    def red(prompts, images, **columns):
        seen.append(len(images))
        return redness(prompts, images)

    trainer = tiny_trainer(tmp_path, model=pipe, reward_funcs=red, cls=Watched, eval_dataset=PROMPTS, max_steps=1)
    trainer.train()
    assert seen == [3, 3]  # of each chunk of four
    advantages = trainer.micro_steps[0]["advantages"]
    assert advantages[0] == 0 and (advantages[1:] != 0).all()
    (line,) = logged(tmp_path)
    assert line["rewards/red/nan_share"] == 0.25
    warned = [r.getMessage() for r in caplog.records if "1 of 4 pictures of a chunk" in r.getMessage()]
    assert len(warned) == 2 and trainer.train_dataset["prompt"][0] in " ".join(warned)
    assert trainer.evaluate()["eval_rewards/red/nan_share"] > 0


def test_pictures_that_are_all_nan_end_the_run_with_the_reason(tmp_path):
    pipe = sd3_pipeline()
    nan_in(pipe.vae, 0, 1, 2, 3)
    with pytest.raises(ValueError, match="No image of the first rollout got a score: .*vae in torch.float32"):
        tiny_trainer(tmp_path, model=pipe).train()


def test_flagged_pictures_have_no_score(tmp_path):
    pipe = with_safety_checker(sd_pipeline(), threshold=-2.0)
    with pytest.raises(ValueError, match="got a score: .*safety checker"):
        tiny_trainer(tmp_path, "sd", model=pipe).train()


def test_five_rollouts_in_a_row_without_a_score_end_the_run(tmp_path):
    calls = iter(range(100))

    def tired(prompts, images, **columns):
        return redness(prompts, images) if next(calls) < 2 else [None] * len(images)

    with pytest.raises(ValueError, match="the rollout after update 5 got a score, the 5th in a row"):
        tiny_trainer(tmp_path, reward_funcs=tired, max_steps=40, beta=0.1).train()
    assert (tmp_path / "checkpoint-5" / "pytorch_lora_weights.safetensors").is_file()


def test_rewards_that_differ_in_no_group_are_told_once(tmp_path, caplog):
    tiny_trainer(tmp_path, reward_funcs=lambda prompts, images, **columns: [0.5] * len(images), max_steps=3).train()
    assert len([r for r in caplog.records if "In no group do the rewards differ" in r.getMessage()]) == 1


# Videos


def test_a_video_is_trained_shown_and_judged_by_its_middle_frame(tmp_path):
    family = FAMILIES["wan2.1"]
    frames = []

    def watching(prompts, images, **columns):
        frames.extend(len(image) for image in images)
        return [np.asarray(image[2]).mean() for image in images]

    wide = type(family)(**{**vars(family), "call": {**family.call, "num_frames": 5}})
    trainer = zoo_trainer(wide, tmp_path, [watching, "brightness"], report_to="tensorboard", log_completions=True)
    report = RunReport(trainer, "a/video", 2, 1)
    before = report.measure()
    trainer.train()
    text = report.write(before, report.measure())
    assert set(frames) == {5}  # a user's own reward sees all of them
    assert "brightness" in text and (tmp_path / "evaluation.json").is_file()
    assert list(tmp_path.glob("samples/*"))
