"""GenEval's checks on pictures: real models with random weights, and a detector of one's own."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from slas_trl.rewards.detector import ObjectDetector, box_of, cut_out
from slas_trl.rewards.geneval import COLORS, Detection
from slas_trl.rewards.resolve import resolve_reward
from slas_trl.trainer.prompts import load_prompts
from tests.rewards.tiny_models import deep


LABELS = {0: "cat", 1: "dog", 2: "remote"}
KNOWN = {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}
SIZE = {"shortest_edge": 64, "longest_edge": 64}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
TINY = {"d_model": 128, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}


def yolos():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    image = {"image_size": [64, 64], "num_detection_tokens": 6, "use_mid_position_embeddings": False}
    made = transformers.YolosForObjectDetection(transformers.YolosConfig(**sizes, **image, **KNOWN))
    return made, transformers.YolosImageProcessor(size=SIZE)


def detr():
    backbone = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=STAGES)
    own = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    config = transformers.DetrConfig(backbone_config=backbone, num_queries=6, **own, **TINY, **KNOWN)
    return transformers.DetrForSegmentation(config), transformers.DetrImageProcessor(size=SIZE)


def mask2former():
    swin = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 2, "out_features": STAGES}
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 8}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "dim_feedforward": 8}
    backbone = transformers.SwinConfig(image_size=64, **swin)
    config = transformers.Mask2FormerConfig(backbone_config=backbone, num_queries=6, **sizes, **layers, **KNOWN)
    made = transformers.Mask2FormerForUniversalSegmentation(config)
    return made, transformers.Mask2FormerImageProcessor(size={"height": 64, "width": 64})


@pytest.fixture(scope="module", params=[yolos, detr, mask2former], ids=lambda make: make.__name__)
def model(request, tmp_path_factory):
    """A folder as `save_pretrained` leaves it, of a model with random weights that sees different things."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    torch.manual_seed(0)
    made, processor = request.param()
    for parameter in made.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def noise(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3))
    return Image.fromarray(pixels.astype(np.uint8))


ANY = [{"class": label, "count": 1} for label in ("cat", "dog", "tv remote")]


def test_a_model_of_transformers(model):
    reward = ObjectDetector(model=str(model), threshold=0.0, counting_threshold=0.0)
    images = [noise(0), noise(1, (48, 80)), noise(2), noise(3)]
    scores = reward(prompts=["a"] * 4, images=images, include=[ANY] * 4)
    assert scores.keys() == {"reward", "strict"}
    assert all(type(score) is float and 0 <= score <= 1 for values in scores.values() for score in values)
    assert reward([], [], include=[]) == []

    found = reward._detect(dict(enumerate(images)), dict.fromkeys(range(4), {"cat", "dog", "tv remote"}))
    assert any(found.values())
    for index, objects in found.items():
        for one in objects:
            assert one.label in LABELS.values() and 0 <= one.score <= 1
            if not model.name.startswith("yolos"):  # but with masks
                assert one.mask.shape == images[index].size[::-1] and one.box == box_of(one.mask)
    # Only what is asked for is kept, since masks are large.
    cats = reward._detect({0: images[0]}, {0: {"cat"}})[0]
    assert [one.box for one in cats] == [one.box for one in found[0] if one.label == "cat"]

    with pytest.raises(ValueError, match="no class 'remotes', but .*'tv remote'"):
        resolve_reward(f"object_detector:model={model}")(["a"], [noise(0)], include=[[{"class": "remotes"}]])

    # A score depends on its own row only, whatever the sizes and the batches.
    single = [reward(["a"], [image], include=[ANY])["reward"][0] for image in images]
    assert single == scores["reward"]
    assert dataclasses.replace(reward, batch_size=1)(["a"] * 4, images, include=[ANY] * 4) == scores
    gray, sixteen = ([into(image) for image in images] for into in (lambda image: image.convert("L"), deep))
    assert reward(["a"] * 4, sixteen, include=[ANY] * 4) == reward(["a"] * 4, gray, include=[ANY] * 4)


def test_weights_that_are_not_there(tmp_path):
    made, processor = yolos()
    made.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*safetensors"):
        ObjectDetector(model=str(tmp_path))(["a"], [noise(0)], include=[ANY])
    head = "class_labels_classifier.layers.2.weight"
    weights = {key: value for key, value in made.state_dict().items() if key != head}
    made.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=head):
        ObjectDetector(model=str(tmp_path))(["a"], [noise(0)], include=[ANY])


# A detector of one's own, which sees a dog in the middle of every picture.


@dataclass(frozen=True)
class Given(ObjectDetector):
    """Its checks on the objects that `find` finds."""

    find: Callable[[list[Image.Image]], list[list[Detection]]] = field(kw_only=True)
    classes: tuple[str, ...] = ("dog", "cat")

    def _known_classes(self) -> set[str]:
        return set(self.classes)

    def _run(self, images: list[Image.Image], names: list[set[str]]) -> list[list[Detection]]:
        return self.find(images)


MIDDLE = (16, 16, 48, 48)


def dog_in_the_middle(images: list[Image.Image]) -> list[list[Detection]]:
    return [[Detection("dog", 0.95, MIDDLE)] for _ in images]


SEES_DOGS = Given(find=dog_in_the_middle)
DOG, LEFT_CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}
ROWS = [
    {"tag": "single_object", "include": [DOG]},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]},
    {"tag": "position", "include": [DOG, LEFT_CAT]},
]
IMAGES = [noise(seed) for seed in range(3)]


def test_the_specification_may_be_columns_or_one_column(tmp_path):
    """Rows of GenEval's kind differ in their keys; tables fill the gaps."""
    scores = SEES_DOGS([""] * 3, IMAGES, metadata=ROWS, completions=IMAGES, trainer_state=None)
    assert scores == {"reward": [1, 1 / 2, 1 / 3], "strict": [1, 0, 0]}
    strict = dataclasses.replace(SEES_DOGS, strict=True)([""] * 3, IMAGES, metadata=ROWS)
    assert strict == {"reward": [1, 0, 0], "strict": [1, 0, 0]}
    assert SEES_DOGS([""] * 3, IMAGES, metadata=[json.dumps(row) for row in ROWS]) == scores

    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": "a", **row}) + "\n" for row in ROWS))
    data = load_prompts(str(file))
    columns = {key: [row[key] for row in data] for key in data.column_names if key != "prompt"}
    assert SEES_DOGS(data["prompt"][:], IMAGES, **columns) == scores
    # Without positions, Arrow has a column for each key, and None in it.
    data = Dataset.from_list([{key: row.get(key) for key in ("tag", "include", "exclude")} for row in ROWS[:2]])
    found = SEES_DOGS([""] * 2, IMAGES[:2], **{key: data[key][:] for key in data.features})
    assert found == {name: values[:2] for name, values in scores.items()}


def test_rows_of_which_nothing_is_asked_have_no_score():
    """And without colors, no CLIP is loaded."""
    rows = [ROWS[0], None, {"include": None}]
    assert SEES_DOGS([""] * 3, IMAGES, metadata=rows) == {"reward": [1, None, None], "strict": [1, None, None]}
    with pytest.raises(ValueError, match="metadata"):
        SEES_DOGS([""] * 3, IMAGES, category=["colors"] * 3)


# Colors


RGB = {
    **{"red": (220, 30, 30), "orange": (250, 140, 20), "yellow": (250, 230, 30), "green": (30, 160, 50)},
    **{"blue": (30, 60, 210), "purple": (130, 30, 160), "pink": (250, 150, 190), "brown": (120, 70, 30)},
    **{"black": (15, 15, 15), "white": (245, 245, 245)},
}


class Clip:
    """In the place of a CLIP: sees the nearest color of what is not background, and reads the color in a text."""

    def images(self, images, batch_size):
        seen = []
        for image in images:
            pixels = np.asarray(image, float).reshape(-1, 3)
            mean = pixels[(pixels != 0x99).any(1)].mean(0)
            seen.append(np.argmin([np.abs(mean - RGB[color]).sum() for color in COLORS]))
        return torch.eye(len(COLORS))[seen]

    def texts(self, texts, batch_size):
        return torch.eye(len(COLORS))[[next(i for i, color in enumerate(COLORS) if color in text) for text in texts]]


@pytest.fixture
def clip(monkeypatch):
    monkeypatch.setattr("slas_trl.rewards.detector.load_clip", lambda name, *options: Clip())
    return "any"


def square(color: str, background: str = "white") -> Image.Image:
    image = Image.new("RGB", (64, 64), RGB[background])
    ImageDraw.Draw(image).rectangle((16, 16, 47, 47), fill=RGB[color])
    return image


def a_dog(color: str) -> list[dict]:
    return [{"class": "dog", "count": 1, "color": color}]


@pytest.mark.parametrize("color", COLORS)
def test_colors_by_clip(clip, color):
    reward = Given(clip=clip, find=dog_in_the_middle)
    scores = reward([""] * len(COLORS), [square(color)] * len(COLORS), include=[a_dog(asked) for asked in COLORS])
    assert scores["strict"] == [float(asked == color) for asked in COLORS]
    assert scores["reward"] == [1.0 if asked == color else 0.5 for asked in COLORS]


def test_a_mask_keeps_the_background_out(clip):
    mask = np.zeros((64, 64), dtype=bool)
    mask[28:36, 28:36] = True
    picture = square("blue")
    picture.paste(RGB["red"], (28, 28, 36, 36))  # a small red dog, in a box that is mostly blue

    asked = {"include": [a_dog("red"), a_dog("blue")]}
    assert Given(clip=clip, find=dog_in_the_middle)([""] * 2, [picture] * 2, **asked)["strict"] == [0, 1]
    cut = np.asarray(cut_out(picture, Detection("dog", 0.9, MIDDLE, mask)))
    assert cut.shape == (32, 32, 3)
    assert {tuple(pixel) for pixel in cut.reshape(-1, 3).tolist()} == {RGB["red"], (0x99,) * 3}
    for box in ((-5, -5, 200, 200), (63.7, 63.7, 63.9, 63.9), (70, 70, 80, 80), (10, 10, 10, 10)):
        part = cut_out(picture, Detection("dog", 0.9, box))  # of what is within the picture
        assert 1 <= part.width <= 64 and 1 <= part.height <= 64
