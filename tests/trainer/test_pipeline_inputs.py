"""Rows of a data set as arguments of a pipeline: images to edit, columns by name; and what comes back as pictures."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from slas_trl.trainer import pipeline_inputs
from slas_trl.trainer.pipeline_inputs import PipelineInputs, as_pictures
from slas_trl.trainer.prompts import load_prompts
from tests.policy.zoo.all import FAMILIES
from tests.tiny_pipelines import flux_pipeline, sd3_pipeline, sd_pipeline

from .tiny_trainers import PROMPTS, logged, redness, same, tiny_config, trained_weights
from .zoo_trainers import zoo_trainer


COLORS = {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def pictures(size: int = 16) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), color) for color in COLORS]


def edits(size: int = 16, **columns) -> Dataset:
    return Dataset.from_dict({"prompt": list(COLORS), "image": pictures(size), **columns})


def saved(folder) -> list[str]:
    """Paths of the pictures."""
    for color, picture in zip(COLORS, pictures(), strict=True):
        picture.save(folder / f"{color}.png")
    return [str(folder / f"{color}.png") for color in COLORS]


def first_pixel(picture: Image.Image) -> tuple:
    return picture.getpixel((0, 0))


def call_of(inputs: PipelineInputs, data: Dataset, indices: list[int]) -> dict:
    """The arguments of the one call for these rows."""
    [batch] = inputs.batches(data, indices, [torch.Generator().manual_seed(0) for _ in indices], len(indices))
    return batch.call


def read(data: Dataset, indices: list[int], tmp_path, family: str = "kontext") -> list[dict]:
    inputs = PipelineInputs(FAMILIES[family].build(), tiny_config(tmp_path, "flux"))
    return [inputs.row(data, i) for i in indices]


def test_images_as_such_and_paths_are_the_same(tmp_path):
    as_paths = Dataset.from_dict({"prompt": list(COLORS), "image": saved(tmp_path)})
    as_feature = as_paths.cast(Features({"prompt": Value("string"), "image": ImageFeature()}))
    for data in (edits(), as_paths, as_feature):
        rows = read(data, [2, 0, 2], tmp_path)
        assert [first_pixel(row["image"]) for row in rows] == [COLORS["blue"], COLORS["red"], COLORS["blue"]]


def test_paths_in_a_file_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    saved(tmp_path / "pictures")
    lines = [{"prompt": f"a {color} one", "image": f"pictures/{color}.png"} for color in COLORS]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir("/")
    rows = read(load_prompts(str(tmp_path / "edits.jsonl")), [0, 3], tmp_path)
    assert [first_pixel(row["image"]) for row in rows] == [COLORS["red"], COLORS["white"]]


def test_transparent_images_become_rgb_and_several_stay_a_list(tmp_path):
    data = Dataset.from_dict({"prompt": ["a cat"], "image": [Image.new("RGBA", (4, 4), (255, 0, 0, 128))]})
    assert read(data, [0], tmp_path)[0]["image"].mode == "RGB"
    data = Dataset.from_dict({"prompt": ["both"], "image": [pictures()[:2]]})
    assert [first_pixel(image) for image in read(data, [0], tmp_path)[0]["image"]] == [COLORS["red"], COLORS["green"]]


@pytest.mark.parametrize("value", ["nowhere.png", None])
def test_a_row_without_its_image(tmp_path, value):
    data = Dataset.from_dict({"prompt": ["a cat", "a dog"], "image": [saved(tmp_path)[0], value]})
    with pytest.raises(ValueError, match="(?i)(?=.*'image')(?=.*row 1)"):
        read(data, [0, 1], tmp_path)


def test_names_of_images_that_do_not_reach_the_pipeline_stay_texts(tmp_path):
    data = Dataset.from_dict({"prompt": ["a cat"], "image": ["COCO_1.jpg"], "source_image": ["none"]})
    assert read(data, [0], tmp_path, "flux") == [{"prompt": "a cat", "image": "COCO_1.jpg", "source_image": "none"}]


def columns_of(tmp_path, pipe, data: Dataset, **settings) -> list[str]:
    return PipelineInputs(pipe, tiny_config(tmp_path, **settings)).columns(data)


def test_columns_reach_the_pipeline_by_name(tmp_path):
    data = edits(negative_prompt=["dark"] * 4, height=[16] * 4, category=["x"] * 4)
    # Numbers do not by themselves, nor what the pipeline does not take, nor what is set for all.
    assert columns_of(tmp_path, FAMILIES["sd3-img2img"].build(), data) == ["image", "negative_prompt"]
    assert columns_of(tmp_path, sd3_pipeline(), data) == ["negative_prompt"]
    assert columns_of(tmp_path, sd3_pipeline(), data, pipeline_columns=[]) == []
    assert columns_of(tmp_path, sd3_pipeline(), data, pipeline_kwargs={"negative_prompt": ["pale"] * 4}) == []


@pytest.mark.parametrize("column", ["depth", "image", "prompt"])
def test_columns_that_cannot_reach_it(tmp_path, column):
    """There is no such one; the pipeline does not take it; the trainer sets it."""
    with pytest.raises(ValueError, match=f"pipeline_columns names '{column}'"):
        columns_of(tmp_path, sd3_pipeline(), edits(), pipeline_columns=[column])
    with pytest.raises(ValueError, match="true_guidance.*true_cfg_scale"):
        PipelineInputs(flux_pipeline(), tiny_config(tmp_path, "flux", pipeline_kwargs={"true_guidance": 2.0}))


def test_prompts_to_evaluate_on_have_the_columns_of_those_to_train_on(tmp_path):
    trainer = zoo_trainer(FAMILIES["kontext"], tmp_path, redness, edits())
    with pytest.raises(ValueError, match=r"\['image'\]"):
        trainer.evaluate(PROMPTS)


def test_texts_go_in_lists(tmp_path):
    data = Dataset.from_dict({"prompt": list(COLORS), "negative_prompt": ["a", "b", "c", "d"]})
    inputs = PipelineInputs(sd_pipeline(), tiny_config(tmp_path, "sd"))
    call = call_of(inputs, data, [0, 0, 3])
    assert call["prompt"] == ["red", "red", "white"] and call["negative_prompt"] == ["a", "a", "d"]
    assert inputs.chunks(data, [0, 0, 3, 3, 3], 3) == [slice(0, 3), slice(3, 5)]
    for_all = PipelineInputs(sd_pipeline(), tiny_config(tmp_path, "sd", pipeline_kwargs={"negative_prompt": "dark"}))
    assert call_of(for_all, PROMPTS, [0, 1])["negative_prompt"] == ["dark", "dark"]


def test_images_go_one_row_at_a_time(tmp_path):
    inputs = PipelineInputs(FAMILIES["kontext"].build(), tiny_config(tmp_path, "flux"))
    call = call_of(inputs, edits(), [1, 1, 1])
    assert call["prompt"] == "green" and call["num_images_per_prompt"] == 3
    assert first_pixel(call["image"]) == COLORS["green"]
    # Another row is another call, also where there were room.
    assert inputs.chunks(edits(), [0, 0, 1, 1, 1], 4) == [slice(0, 2), slice(2, 5)]


def test_numbers_go_one_row_at_a_time_too(tmp_path):
    data, seen = Dataset.from_dict({"prompt": list(COLORS), "guidance_scale": [1.0, 2.0, 3.0, 4.0]}), []
    settings = {"pipeline_columns": ["guidance_scale"], "guidance_scale": None}
    trainer = zoo_trainer(FAMILIES["sd3"], tmp_path, redness, data, **settings)
    sample = trainer.replayer.sample
    trainer.replayer.sample = lambda **call: seen.append((call["prompt"], call["guidance_scale"])) or sample(**call)
    trainer.train()
    assert len(seen) == 2 and set(seen) <= set(zip(data["prompt"], data["guidance_scale"], strict=True))


def test_a_chunk_with_images_is_of_one_group(tmp_path):
    with pytest.raises(ValueError, match="per_device_train_batch_size.*num_generations"):
        zoo_trainer(FAMILIES["kontext"], tmp_path, redness, edits(), per_device_train_batch_size=4)


def test_each_picture_is_decoded_once_in_a_rollout(tmp_path, monkeypatch):
    decoded, load = [], pipeline_inputs.load_image
    monkeypatch.setattr(pipeline_inputs, "load_image", lambda path: decoded.append(path) or load(path))
    data = Dataset.from_dict({"prompt": list(COLORS), "image": saved(tmp_path)})
    settings = {"num_generations": 4, "steps_per_generation": 4, "per_device_train_batch_size": 2, "max_steps": 1}
    zoo_trainer(FAMILIES["kontext"], tmp_path / "run", redness, data, **settings).train()  # two prompts, in four calls
    assert len(decoded) == len(set(decoded)) == 2


def test_an_image_that_cannot_be_read_costs_nothing(tmp_path, caplog):
    data = Dataset.from_dict({"prompt": list(COLORS), "image": saved(tmp_path)})
    trainer = zoo_trainer(FAMILIES["pix2pix"], tmp_path / "run", redness, data, max_steps=3, num_train_epochs=9)
    (tmp_path / "white.png").unlink()
    with pytest.raises(ValueError, match="'image' of row 3"):
        trainer.train()
    assert "The data set failed" in caplog.text


def test_a_start_in_the_middle_and_one_image_a_call(tmp_path):
    family, settings = FAMILIES["sd3-img2img"], {"num_inference_steps": 6, "timestep_fraction": 0.5}
    settings |= {"sde_window_size": 2, "per_device_train_batch_size": 1, "steps_per_generation": 4}
    with pytest.raises(ValueError, match="sde_window_start"):
        zoo_trainer(family, tmp_path, redness, edits(), **settings).train()
    settings |= {"sde_window_start": 2, "sde_window_slide_every": 1, "max_steps": 3}
    trainer = zoo_trainer(family, tmp_path, redness, edits(), **settings)
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.evaluate(edits())["eval_samples"] == 8  # one image a call here too


ONE_IMAGE_A_CALL = ["sd3-img2img"]  # with a generator each, diffusers cuts an image for each out of the one image


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.images(1)])
def test_one_update_of_editing(name, tmp_path):
    """The pipeline gets the image of the row, and so does the reward."""
    seen = []

    def brighter(prompts, images, image, **columns):
        seen.extend(zip(prompts, image, strict=True))
        return [np.mean(after) - np.mean(before) for after, before in zip(images, image, strict=True)]

    given = {key: value[0] if isinstance(value, list) else value for key, value in FAMILIES[name].images(1).items()}
    data = {column: [value] * 4 for column, value in given.items()}
    data["image"] = [picture.resize(given["image"].size) for picture in pictures()]
    dataset = Dataset.from_dict({"prompt": list(COLORS), **data})
    call = {key: value for key, value in FAMILIES[name].call.items() if key not in ("height", "width")}
    negative = {"negative_prompt": "dark"} if "negative_prompt" in call else {}  # one for the one prompt of a call
    settings = {"pipeline_kwargs": {**call, **negative}, "guidance_scale": None}
    if "strength" in call:  # begins in the middle of the schedule
        settings["timestep_fraction"] = 0.5
    if name in ONE_IMAGE_A_CALL:
        settings |= {"per_device_train_batch_size": 1, "steps_per_generation": 4}
    trainer = zoo_trainer(FAMILIES[name], tmp_path, brighter, dataset, **settings)
    before = trained_weights(trainer)
    trainer.train()
    assert not same(trained_weights(trainer), before) and logged(tmp_path)[0]["ratio/max_deviation"] == 0.0
    assert len(seen) == 4 and all(first_pixel(image) == COLORS[prompt] for prompt, image in seen)


def test_videos_of_one_frame_are_images_and_others_lists_of_frames():
    frames = np.random.default_rng(0).random((2, 1, 4, 6, 3), dtype=np.float32)
    images = [Image.fromarray((frame[0] * 255).round().astype(np.uint8)) for frame in frames]
    as_tensor, in_lists = torch.tensor(frames).movedim(-1, -3), [[image] for image in images]
    for returned in (frames, frames[:, 0], in_lists, images, as_tensor):
        made = as_pictures(returned, [None] * 2, "a dot")
        assert all(np.array_equal(ours, image) for ours, image in zip(made, images, strict=True))
    videos = as_pictures(np.zeros((2, 3, 4, 6, 3), dtype=np.float32), [None, None], "a dot")
    assert [len(video) for video in videos] == [3, 3] and videos[0][0].size == (6, 4)
