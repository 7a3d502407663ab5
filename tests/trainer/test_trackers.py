"""Sampled pictures with their prompts in the trackers."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slas_trl.trainer.calibration import CalibrationCallback

from .tiny_trainers import Watched, tiny_trainer


def recorded(folder: Path) -> EventAccumulator:
    [file] = folder.rglob("events.out.tfevents.*")
    return EventAccumulator(str(file), {"images": 0, "tensors": 0, "scalars": 0}).Reload()


def test_tensorboard_shows_pictures_and_their_prompts(tmp_path):
    trainer = tiny_trainer(tmp_path, cls=Watched, report_to="tensorboard", log_completions=True, max_steps=2)
    trainer.train()
    events = recorded(tmp_path)
    names = {f"samples/{i}" for i in range(8)}
    assert names <= set(events.Tags()["images"])
    shown = [picture for chunk in trainer.pictures[:2] for picture in chunk]
    for i, picture in enumerate(shown):
        [event] = events.Images(f"samples/{i}")  # of the first rollout: the next one is the tenth after it
        assert event.step == 0
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), picture)
        [text] = events.Tensors(f"samples/{i}/prompt/text_summary")
        assert text.tensor_proto.string_val[0].decode() == trainer.rollouts[i // 4].call["prompt"][0]
    assert [event.step for event in events.Scalars("train/reward")] == [1, 2]
    assert len(events.Scalars("train/calibration/narrow_share")) == 2
    [event] = events.Images("calibration")
    assert event.step == 2
    with Image.open(io.BytesIO(event.encoded_image_string)) as shown, Image.open(tmp_path / "calibration.png") as file:
        np.testing.assert_array_equal(shown, file.convert("RGB"))
    [text] = events.Tensors("calibration/reading/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "2 rollouts are too few to tell; it takes 10."


def test_every_tenth_rollout_is_shown(tmp_path):
    small = {"num_inference_steps": 2, "height": 8, "width": 8, "num_generations": 2}
    tiny_trainer(tmp_path, report_to="tensorboard", log_completions=True, max_steps=11, **small).train()
    assert [event.step for event in recorded(tmp_path).Images("samples/0")] == [0, 10]


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_trackers_that_take_pictures_with_captions(monkeypatch, tracker):
    shown: list[dict] = []
    module = SimpleNamespace(Image=lambda image, caption: (image, caption), log=shown.append)
    monkeypatch.setitem(sys.modules, tracker, module)
    callback = CalibrationCallback(SimpleNamespace(callbacks=[]))
    callback.show(SimpleNamespace(report_to=[tracker]), {"samples/0": "a picture"}, ["a cat"], 3, "prompt")
    assert shown == [{"samples/0": ("a picture", "a cat"), "train/global_step": 3}]
