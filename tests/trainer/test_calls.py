"""Data sets as calls of a pipeline: images to edit, columns by name, one-frame videos."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from slas_trl.trainer.calls import PipelineCalls, as_pictures
from slas_trl.trainer.prompts import load_prompts
from tests.policy.zoo.all import FAMILIES
from tests.tiny_pipelines import PIPELINES, flux_pipeline, sd3_pipeline, sd_pipeline

from .tiny_trainers import PROMPTS, logged, redness, same, tiny_config, tiny_trainer, trained_weights
from .zoo_trainers import zoo_trainer


COLOURS = ["red", "green", "blue", "white"]


def pictures(size: int = 16) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), colour) for colour in COLOURS]


def edits(**columns) -> Dataset:
    return Dataset.from_dict({"prompt": [f"make {c} brighter" for c in COLOURS], "image": pictures(), **columns})


# Reading


def read(data: Dataset, indices: list[int], tmp_path, family: str = "kontext") -> list[dict]:
    return PipelineCalls(FAMILIES[family].build(), tiny_config(tmp_path, "flux")).rows(data, indices)


def test_images_as_such_and_paths_are_the_same(tmp_path):
    for colour, picture in zip(COLOURS, pictures(), strict=True):
        picture.save(tmp_path / f"{colour}.png")
    files = [str(tmp_path / f"{colour}.png") for colour in COLOURS]
    as_paths = Dataset.from_dict({"prompt": COLOURS, "image": files})
    as_feature = as_paths.cast(Features({"prompt": Value("string"), "image": ImageFeature()}))
    for data in (edits(), as_paths, as_feature):
        rows = read(data, [2, 0, 2], tmp_path)
        assert [np.asarray(row["image"])[0, 0].tolist() for row in rows] == [[0, 0, 255], [255, 0, 0], [0, 0, 255]]
        assert rows[0] is rows[2]  # read once


def test_paths_in_a_file_are_relative_to_it(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for colour, picture in zip(COLOURS, pictures(), strict=True):
        picture.save(tmp_path / "pictures" / f"{colour}.png")
    lines = [{"prompt": f"a {c} one", "image": f"pictures/{c}.png"} for c in COLOURS]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir("/")
    rows = read(load_prompts(str(tmp_path / "edits.jsonl")), [0, 3], tmp_path)
    assert [row["image"].getpixel((0, 0)) for row in rows] == [(255, 0, 0), (255, 255, 255)]


def test_transparent_images_become_rgb(tmp_path):
    data = Dataset.from_dict({"prompt": ["a cat"], "image": [Image.new("RGBA", (4, 4), (255, 0, 0, 128))]})
    assert read(data, [0], tmp_path)[0]["image"].mode == "RGB"


def test_an_image_that_is_not_there(tmp_path):
    data = Dataset.from_dict({"prompt": ["a cat", "a dog"], "image": ["nowhere.png", "nowhere.png"]})
    with pytest.raises(ValueError, match="The column 'image' of row 1 holds no image: .*nowhere.png"):
        read(data, [1], tmp_path)


def test_a_row_without_its_image(tmp_path):
    data = Dataset.from_dict({"prompt": ["a cat", "a dog"], "image": [pictures()[0], None]})
    with pytest.raises(ValueError, match="Row 1 has nothing in the column 'image', which the pipeline needs"):
        read(data, [0, 1], tmp_path)


def test_names_of_images_that_do_not_reach_the_pipeline_stay_texts(tmp_path):
    data = Dataset.from_dict({"prompt": ["a cat"], "image": ["COCO_1.jpg"], "source_image": ["none"]})
    assert read(data, [0], tmp_path, "flux") == [{"prompt": "a cat", "image": "COCO_1.jpg", "source_image": "none"}]


def test_several_images_in_a_row(tmp_path):
    data = Dataset.from_dict({"prompt": ["both"], "image": [pictures()[:2]]})
    assert [image.getpixel((0, 0)) for image in read(data, [0], tmp_path)[0]["image"]] == [(255, 0, 0), (0, 128, 0)]


# Which columns reach the pipeline


def columns_of(tmp_path, build, data: Dataset, family: str = "sd3", **settings) -> list[str]:
    return PipelineCalls(build(), tiny_config(tmp_path, family, **settings)).columns(data)


def test_columns_reach_the_pipeline_by_name(tmp_path):
    data = edits(negative_prompt=["dark"] * 4, height=[16] * 4, category=["x"] * 4)
    # Numbers do not by themselves, nor what the pipeline does not take.
    assert columns_of(tmp_path, FAMILIES["sd3-img2img"].build, data) == ["image", "negative_prompt"]
    assert columns_of(tmp_path, sd3_pipeline, data) == ["negative_prompt"]
    assert columns_of(tmp_path, sd3_pipeline, data, pipeline_columns=[]) == []


def test_arguments_that_are_set_are_not_taken_from_a_column(tmp_path):
    data = edits(negative_prompt=["dark"] * 4)
    given = {"max_sequence_length": 8, "negative_prompt": ["pale"] * 4}
    assert columns_of(tmp_path, sd3_pipeline, data, pipeline_kwargs=given) == []


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        (["depth"], r"no such column, only \['prompt', 'image'\]"),
        (["image"], "StableDiffusion3Pipeline has no such argument"),
        (["prompt"], "the trainer or pipeline_kwargs sets that argument"),
    ],
)
def test_columns_that_cannot_reach_it(tmp_path, columns, why):
    with pytest.raises(ValueError, match=f"pipeline_columns names '{columns[0]}', but .*{why}"):
        columns_of(tmp_path, sd3_pipeline, edits(), pipeline_columns=columns)


def test_an_argument_that_the_pipeline_does_not_take(tmp_path):
    with pytest.raises(ValueError, match="FluxPipeline takes no true_guidance; it takes prompt, .*true_cfg_scale"):
        PipelineCalls(flux_pipeline(), tiny_config(tmp_path, "flux", pipeline_kwargs={"true_guidance": 2.0}))


# Calls


def test_texts_go_in_lists(tmp_path):
    data = Dataset.from_dict({"prompt": COLOURS, "negative_prompt": ["a", "b", "c", "d"]})
    calls = PipelineCalls(sd_pipeline(), tiny_config(tmp_path, "sd"))
    call = calls.call(data, [0, 0, 3], [torch.Generator()] * 3)
    assert call["prompt"] == ["red", "red", "white"] and call["negative_prompt"] == ["a", "a", "d"]
    assert [list(chunk) for chunk in calls.chunks(data, [0, 0, 3, 3, 3], 3)] == [[0, 1, 2], [3, 4]]


def test_images_go_one_row_at_a_time(tmp_path):
    calls = PipelineCalls(FAMILIES["kontext"].build(), tiny_config(tmp_path, "flux"))
    call = calls.call(edits(), [1, 1, 1], [torch.Generator()] * 3)
    assert call["prompt"] == "make green brighter" and call["num_images_per_prompt"] == 3
    assert call["image"].getpixel((0, 0)) == (0, 128, 0)
    # Another row is another call, also where there were room.
    assert [list(chunk) for chunk in calls.chunks(edits(), [0, 0, 1, 1, 1], 4)] == [[0, 1], [2, 3, 4]]


def test_numbers_go_one_row_at_a_time_too(tmp_path):
    data = Dataset.from_dict({"prompt": COLOURS, "guidance_scale": [1.0, 2.0, 3.0, 4.0]})
    settings = {"pipeline_columns": ["guidance_scale"], "guidance_scale": None}
    trainer = zoo_trainer(FAMILIES["sd3"], tmp_path, redness, data, **settings)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.calls.call(data, [2, 2], [torch.Generator()] * 2)["guidance_scale"] == 3.0


def test_prompts_to_evaluate_on_have_the_columns_of_those_to_train_on(tmp_path):
    trainer = zoo_trainer(FAMILIES["kontext"], tmp_path, redness, edits())
    with pytest.raises(ValueError, match=r"evaluate on lack the columns \['image'\], which FluxKontextPipeline"):
        trainer.evaluate(PROMPTS)


def test_a_pipeline_that_could_edit_says_that_it_does_not(tmp_path, caplog):
    zoo_trainer(FAMILIES["kontext"], tmp_path, redness)
    assert "FluxKontextPipeline takes an image, but no column of the data set is one" in caplog.text


def test_an_image_that_cannot_be_read_costs_nothing(tmp_path, caplog):
    for i, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{i}.png")
    data = Dataset.from_dict({"prompt": COLOURS, "image": [str(tmp_path / f"{i}.png") for i in range(4)]})
    trainer = zoo_trainer(FAMILIES["pix2pix"], tmp_path / "run", redness, data, max_steps=3, num_train_epochs=9)
    (tmp_path / "3.png").unlink()
    with pytest.raises(ValueError, match="The column 'image' of row 3 holds no image"):
        trainer.train()
    assert "The data set failed" in caplog.text


def test_a_random_window_and_a_start_in_the_middle(tmp_path):
    settings = {"num_inference_steps": 6, "sde_window_size": 2, "timestep_fraction": 0.5}
    one_each = {"per_device_train_batch_size": 1, "steps_per_generation": 4}
    with pytest.raises(ValueError, match="The pipeline begins at step 1 of 6 .*set sde_window_start to 1 or more"):
        zoo_trainer(FAMILIES["sd3-img2img"], tmp_path, redness, edits(), **settings, **one_each).train()
    settings |= {**one_each, "sde_window_start": 2, "sde_window_slide_every": 1, "max_steps": 3}
    trainer = zoo_trainer(FAMILIES["sd3-img2img"], tmp_path, redness, edits(), **settings)
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.evaluate(edits())["eval_samples"] == 8  # one image a call here too


def test_a_chunk_with_images_is_of_one_group(tmp_path):
    with pytest.raises(ValueError, match=r"per_device_train_batch_size \(4\) must divide num_generations \(2\)"):
        zoo_trainer(FAMILIES["kontext"], tmp_path, redness, edits(), per_device_train_batch_size=4)


def test_a_pipeline_that_takes_one_image_a_call(tmp_path):
    trainer = zoo_trainer(FAMILIES["sd3-img2img"], tmp_path, redness, edits(), timestep_fraction=0.5)
    with pytest.raises(ValueError, match="did not make 2 images of one prompt and its images.*per_device_train_batch"):
        trainer.train()


ONE_IMAGE_A_CALL = ["sd3-img2img"]  # with a generator each, diffusers cuts an image for each out of the one image
EDITING = [name for name, family in FAMILIES.items() if family.images(1)]


@pytest.mark.parametrize("name", EDITING)
def test_one_update_of_editing(name, tmp_path):
    """The pipeline gets the image of the row, and so does the reward."""
    seen = []

    def brighter(prompts, images, image, **columns):
        seen.extend(zip(prompts, image, strict=True))
        return [
            np.asarray(after).mean() - np.asarray(before).mean() for after, before in zip(images, image, strict=True)
        ]

    given = FAMILIES[name].images(1)
    data = {column: [_first(value)] * 4 for column, value in given.items()}
    data["image"] = [picture.resize(data["image"][0].size) for picture in pictures()]
    dataset = Dataset.from_dict({"prompt": COLOURS, **data})
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
    expected = {
        colour: np.asarray(picture)[0, 0].tolist() for colour, picture in zip(COLOURS, pictures(), strict=True)
    }
    assert len(seen) == 4
    for prompt, image in seen:
        assert np.asarray(image)[0, 0].tolist() == expected[prompt]


def _first(value):
    return value[0] if isinstance(value, list) else value


def test_the_image_decides_what_is_sampled(tmp_path):
    """With the same noise, other images give other pictures; without the column, the pipeline would not run at all."""
    data = Dataset.from_dict({"prompt": ["brighter"] * 4, "image": pictures(32)})
    trainer = zoo_trainer(FAMILIES["pix2pix"], tmp_path, redness, data)
    drawn = trainer.draw(data, [0, 1, 1], [torch.Generator().manual_seed(0) for _ in range(3)], 2)
    assert drawn[1] == drawn[2] != drawn[0]


def test_evaluation_of_editing(tmp_path):
    data = Dataset.from_dict({"prompt": COLOURS, "image": pictures(32)})
    trainer = zoo_trainer(FAMILIES["pix2pix"], tmp_path, redness, data, num_generations_eval=3)
    metrics = trainer.evaluate(data)
    assert metrics["eval_samples"] == 12 and trainer.evaluate(data)["eval_reward"] == metrics["eval_reward"]


# What comes back


def test_videos_of_one_frame_are_images():
    frames = np.random.default_rng(0).random((2, 1, 4, 6, 3), dtype=np.float32)
    images = [Image.fromarray((frame[0] * 255).round().astype(np.uint8)) for frame in frames]
    for returned in (
        frames,
        frames[:, 0],
        [[image] for image in images],
        images,
        torch.tensor(frames).movedim(-1, -3),
    ):
        made = as_pictures(returned, [None] * 2, "a dot")
        assert all(np.array_equal(np.asarray(ours), np.asarray(i)) for ours, i in zip(made, images, strict=True))


def test_videos_are_lists_of_frames():
    videos = as_pictures(np.zeros((2, 3, 4, 6, 3), dtype=np.float32), [None, None], "a dot")
    assert [len(video) for video in videos] == [3, 3] and videos[0][0].size == (6, 4)


@pytest.mark.parametrize("family", PIPELINES)
def test_pictures_are_those_of_a_plain_call(tmp_path, family):
    trainer = tiny_trainer(tmp_path, family)
    drawn = trainer.draw(PROMPTS, [0, 1], [torch.Generator().manual_seed(i) for i in (0, 1)], 2)
    build, call = PIPELINES[family]
    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    plain = build()(prompt=PROMPTS["prompt"][:2], num_inference_steps=4, generator=generators, **call).images
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in plain]


def test_one_negative_prompt_for_all(tmp_path):
    given = {"max_sequence_length": 8, "negative_prompt": "dark"}
    calls = PipelineCalls(sd3_pipeline(), tiny_config(tmp_path, "sd3", pipeline_kwargs=given))
    assert calls.call(PROMPTS, [0, 1], [torch.Generator()] * 2)["negative_prompt"] == ["dark", "dark"]
