"""Sampled pictures with their prompts in the trackers."""

import importlib.util
import io
import json
import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer.tiny_trainers import PROMPTS, Watched, tiny_trainer


ROOT = Path(__file__).parents[2]


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


def test_no_pictures_if_they_are_not_wanted(tmp_path):
    tiny_trainer(tmp_path, report_to="tensorboard", log_completions=False, max_steps=1).train()
    events = recorded(tmp_path)
    assert events.Tags()["images"] == [] and events.Scalars("train/reward")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_shows_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tiny_trainer(tmp_path / "run", report_to="wandb", log_completions=True, max_steps=2).train()
    shown = {path.name.split("_")[0] for path in (tmp_path / "wandb").rglob("media/images/**/*.png")}
    assert shown == {"calibration", *map(str, range(8))}


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
@pytest.mark.slow
def test_trackio_shows_pictures_and_their_prompts(tmp_path):
    """In a process of its own: trackio takes its folder from the environment when it is imported."""
    script = f"""
        from tests.trainer.tiny_trainers import tiny_trainer

        settings = {{"report_to": "trackio", "project": "tiny", "log_completions": True}}
        tiny_trainer({str(tmp_path / "run")!r}, **settings, max_steps=2).train()
        """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    folder = tmp_path / "trackio"
    settings = {"TRACKIO_DIR": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]

    rows = sqlite3.connect(folder / "tiny.db").execute("SELECT metrics FROM metrics ORDER BY step").fetchall()
    lines = [json.loads(metrics) for (metrics,) in rows]
    [pictures] = [line for line in lines if "samples/0" in line]
    assert pictures["train/global_step"] == 0
    for i in range(8):
        entry = pictures[f"samples/{i}"]
        assert entry["_type"] == "trackio.image" and entry["caption"] in PROMPTS["prompt"]
        assert Image.open(folder / "media" / entry["file_path"]).size == (16, 16)
    assert [line["train/global_step"] for line in lines if "train/reward" in line] == [1, 2]
    [panel] = [line for line in lines if "calibration" in line]
    assert panel["train/global_step"] == 2 and "too few" in panel["calibration"]["caption"]
    assert Image.open(folder / "media" / panel["calibration"]["file_path"]).size == (1300, 1050)
