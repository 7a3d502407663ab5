"""
GenEval's checks on pictures: real models with random weights, a detector of one's own, and a CLIP that has learned to
tell colours from squares.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    DetrConfig,
    DetrForObjectDetection,
    DetrForSegmentation,
    DetrImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    ResNetConfig,
    SwinConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from examples.shapes_pictures import draw
from slas_trl import rewards
from slas_trl.rewards.by_name import resolve_reward
from slas_trl.rewards.geneval import COLORS, Detection
from slas_trl.rewards.object_detector import ObjectDetector, box_of, cut_out
from slas_trl.shapes import verifier, world
from slas_trl.trainer.prompts import load_prompts
from tests.rewards.tiny_models import deep


LABELS = {0: "cat", 1: "dog", 2: "remote"}
KNOWN = {"id2label": LABELS, "label2id": {label: index for index, label in LABELS.items()}}
SIZE = {"shortest_edge": 64, "longest_edge": 64}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def yolos():
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 64],
        num_detection_tokens=6,
        use_mid_position_embeddings=False,
        **KNOWN,
    )
    return YolosForObjectDetection(config), YolosImageProcessor(size=SIZE)


def detr(cls=DetrForObjectDetection):
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=STAGES)
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=128,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=6,
        **KNOWN,
    )
    return cls(config), DetrImageProcessor(size=SIZE)


def mask2former():
    backbone = SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=STAGES
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=8,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=8,
        num_queries=6,
        **KNOWN,
    )
    return Mask2FormerForUniversalSegmentation(config), Mask2FormerImageProcessor(size={"height": 64, "width": 64})


MODELS = {
    "yolos": yolos,
    "detr": detr,
    "detr-segmentation": lambda: detr(DetrForSegmentation),
    "mask2former": mask2former,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """A folder as `save_pretrained` leaves it, of a model with random weights that sees different things."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    made, processor = MODELS[request.param]()
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
    assert reward([], [], include=[]) == {"reward": [], "strict": []}

    found = reward._detect(dict(enumerate(images)), dict.fromkeys(range(4), {"cat", "dog", "tv remote"}))
    for index, objects in found.items():
        assert {one.label for one in objects} <= set(LABELS.values())
        for one in objects:
            assert 0 <= one.score <= 1
            if one.mask is not None:
                assert one.mask.shape == images[index].size[::-1]
                assert one.box == box_of(one.mask)
    if "segmentation" in model.name or "mask2former" in model.name:
        assert all(one.mask is not None for objects in found.values() for one in objects)
    assert any(found.values())
    # Only what is asked for is kept, since masks are large.
    cats = reward._detect({0: images[0]}, {0: {"cat"}})[0]
    expected = [one for one in found[0] if one.label == "cat"]
    assert [one.box for one in cats] == [one.box for one in expected]
    assert [one.score for one in cats] == pytest.approx([one.score for one in expected], abs=1e-5)

    # A score depends on its own row only, whatever the sizes and the batches.
    single = [reward(["a"], [image], include=[ANY])["reward"][0] for image in images]
    assert single == scores["reward"]
    assert dataclasses.replace(reward, batch_size=1)(["a"] * 4, images, include=[ANY] * 4) == scores
    assert reward(["a"] * 4, [image.convert("RGBA") for image in images], include=[ANY] * 4) == scores
    grey, sixteen = ([into(image) for image in images] for into in (lambda image: image.convert("L"), deep))
    assert reward(["a"] * 4, sixteen, include=[ANY] * 4) == reward(["a"] * 4, grey, include=[ANY] * 4)


def test_a_class_that_the_model_does_not_know(model):
    reward = resolve_reward(f"object_detector:model={model}")
    with pytest.raises(ValueError, match="class 'remotes'; did you mean 'remote'.* cat, dog, remote"):
        reward(["a"], [noise(0)], include=[[{"class": "remotes"}]])
    with pytest.raises(ValueError, match="does not know the class 'zebra'"):
        reward(["a"], [noise(0)], exclude=[[{"class": "zebra", "count": 1}]])


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing.*object_detector:model=PATH"):
        ObjectDetector(model="nobody/nothing")(["a"], [noise(0)], include=[ANY])
    yolos()[0].config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"needs the files of {tmp_path}.*safetensors"):
        ObjectDetector(model=str(tmp_path))(["a"], [noise(0)], include=[ANY])
    CLIPModel(tiny_clip()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="models for object detection or instance segmentation"):
        ObjectDetector(model=str(tmp_path))(["a"], [noise(0)], include=[ANY])


@pytest.mark.parametrize(
    ("other", "message"), [(None, "1 weights of a Yolos.* missing"), ((9, 16), "1 are of another size")]
)
def test_weights_without_the_head(tmp_path, other, message):
    head = "class_labels_classifier.layers.2.weight"
    made, processor = yolos()
    weights = {key: value for key, value in made.state_dict().items() if key != head}
    if other is not None:
        weights[head] = torch.zeros(other)
    made.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{message}.*{head}.*Expected a model that was trained"):
        ObjectDetector(model=str(tmp_path))(["a"], [noise(0)], include=[ANY])


# A detector of one's own, which sees what is in the pictures of the shapes world.


@dataclass(frozen=True)
class Given(ObjectDetector):
    """Its checks on the objects that `find` finds."""

    find: Callable[[list[Image.Image]], list[list[Detection]]] = field(kw_only=True)
    classes: tuple[str, ...] = ("dog", "cat")

    def _known_classes(self) -> dict[str, str]:
        return {name: name for name in self.classes}

    def _run(self, images: list[Image.Image], names: list[set[str]]) -> list[list[Detection]]:
        return self.find(images)


def find_shapes(images: list[Image.Image]) -> list[list[Detection]]:
    found = []
    for image, things in zip(images, verifier._find(verifier.to_pixels(images)), strict=True):
        scale = image.width / 32
        boxes = [tuple(scale * side for side in thing.box) for thing in things]
        found.append(
            [Detection(thing.shape or "unknown", 0.95, box) for thing, box in zip(things, boxes, strict=True)]
        )
    return found


def asked(caption: world.Caption) -> dict:
    """What a caption of the shapes world says, colours aside, in GenEval's format."""
    include = [{"class": thing.shape, "count": caption.count} for thing in caption.things]
    row = {"tag": caption.category, "include": include}
    if caption.relation:
        # "a left of b" is of a, which must come after what it is left of.
        row["include"] = [include[1], {**include[0], "position": [caption.relation, 0]}]
    if caption.category == "counting":
        row["exclude"] = [{**include[0], "count": caption.count + 1}]
    return row


def pictures(category: str) -> tuple[list[world.Caption], list[Image.Image]]:
    captions = [caption for caption in world.captions_of("test") if caption.category == category]
    drawn = draw(captions, np.random.default_rng(0))
    return captions, [Image.fromarray((picture * 255).round().astype(np.uint8)) for picture in drawn]


SHAPES = Given(find=find_shapes, classes=world.SHAPES)


@pytest.mark.parametrize("category", ["single_object", "two_object", "counting", "position"])
def test_pictures_of_shapes(category):
    captions, images = pictures(category)
    rows = [asked(caption) for caption in captions]
    scores = SHAPES([caption.text for caption in captions], images, metadata=rows)
    assert np.mean(scores["strict"]) > 0.95  # shapes that touch may be taken for one
    # Another picture shows something else.
    half = len(images) // 2
    others = SHAPES([caption.text for caption in captions], images[half:] + images[:half], metadata=rows)
    assert np.mean(others["strict"]) < 0.5
    assert np.mean(others["strict"]) <= np.mean(others["reward"]) < np.mean(scores["reward"])


def test_strict():
    captions, images = pictures("counting")
    rows = [asked(caption) for caption in captions]
    images = images[1:] + images[:1]
    graded = SHAPES([""] * len(rows), images, metadata=rows)
    strict = dataclasses.replace(SHAPES, strict=True)([""] * len(rows), images, metadata=rows)
    assert strict["reward"] == strict["strict"] == graded["strict"] != graded["reward"]


def test_the_specification_may_be_columns_or_one_column():
    captions, images = pictures("position")
    rows = [asked(caption) for caption in captions]
    scores = SHAPES([""] * len(rows), images, metadata=rows, completions=images, trainer_state=None)
    assert SHAPES([""] * len(rows), images, metadata=[json.dumps(row) for row in rows]) == scores
    columns = {key: [row[key] for row in rows] for key in ("tag", "include")}
    assert SHAPES([""] * len(rows), images, **columns, exclude=[None] * len(rows)) == scores


def test_the_specification_in_a_file(tmp_path):
    """Rows of GenEval's kind differ in their keys; tables fill the gaps."""
    kinds = [pictures(category) for category in ("counting", "position", "single_object")]
    captions = [caption for of_kind, _ in kinds for caption in of_kind[:4]]
    images = [image for _, of_kind in kinds for image in of_kind[:4]]
    rows = [{"prompt": caption.text, **asked(caption)} for caption in captions]
    expected = SHAPES([""] * len(rows), images, metadata=rows)
    assert set(expected["strict"]) == {1.0}

    plain, nested = tmp_path / "rows.jsonl", tmp_path / "nested.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows))
    nested.write_text("".join(json.dumps({"prompt": row["prompt"], "metadata": row}) + "\n" for row in rows))
    for file in (plain, nested):
        data = load_prompts(str(file))
        columns = {key: [row[key] for row in data] for key in data.column_names if key != "prompt"}
        assert SHAPES(data["prompt"][:], images, **columns) == expected
    # Without positions, Arrow has a column for each key, and None in it.
    counted = [{key: row.get(key) for key in ("prompt", "tag", "include", "exclude")} for row in rows[:4] + rows[8:]]
    data = Dataset.from_list(counted)
    columns = {key: data[key][:] for key in ("tag", "include", "exclude")}
    assert set(SHAPES(data["prompt"][:], images[:4] + images[8:], **columns)["strict"]) == {1.0}


def test_rows_of_which_nothing_is_asked_have_no_score():
    _, images = pictures("single_object")
    rows = [{"include": [{"class": "circle"}]}, None, {"include": None}]
    for scores in SHAPES([""] * 3, images[:3], metadata=rows).values():
        assert scores[0] is not None
        assert scores[1:] == [None, None]
    with pytest.raises(ValueError, match=r'column "metadata".*"include".*Its columns are \[\'category\'\]'):
        SHAPES([""] * 3, images[:3], category=["colors"] * 3)
    with pytest.raises(ValueError, match="does not know the class 'circel'; did you mean 'circle'"):
        SHAPES([""], images[:1], metadata=[{"include": [{"class": "circel"}]}])


# Colours


def tiny_clip(vocabulary: int = 512) -> CLIPConfig:
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shared, "vocab_size": vocabulary, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    return CLIPConfig(text_config=text, vision_config={**shared, "image_size": 16, "patch_size": 8}, projection_dim=16)


RGB = {
    "red": (220, 30, 30),
    "orange": (250, 140, 20),
    "yellow": (250, 230, 30),
    "green": (30, 160, 50),
    "blue": (30, 60, 210),
    "purple": (130, 30, 160),
    "pink": (250, 150, 190),
    "brown": (120, 70, 30),
    "black": (15, 15, 15),
    "white": (245, 245, 245),
}


def words_tokenizer() -> CLIPTokenizer:
    """One token for each word of the questions about colours, and for each letter of other words."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["photo", "of", "object", "colored", "dog", *COLORS]
    merges, known = [], set()
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            known.add(pieces[0])
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters), *sorted(known)]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=16)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a CLIP that has learned for some seconds which colour a square is."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = words_tokenizer()
    model = CLIPModel(tiny_clip())
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer
    )
    questions = ["a photo of a {} dog", "a photo of a {}-colored dog", "a photo of a {} object"]
    tokens = tokenizer([q.format(c) for c in COLORS for q in questions], return_tensors="pt", padding=True)
    rng = np.random.default_rng(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(120):
        images = []
        for color in COLORS:
            pixels = np.full((16, 16, 3), 0x99, float)
            top = rng.integers(0, 6)
            pixels[top:, :] = np.array(RGB[color]) + rng.normal(0, 10, 3)
            images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
        output = model(**tokens, **processor(images=images, return_tensors="pt"))
        right = torch.arange(len(COLORS)).repeat_interleave(len(questions))
        loss = torch.nn.functional.cross_entropy(output.logits_per_text, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def square(color: str, background: str = "white") -> Image.Image:
    image = Image.new("RGB", (64, 64), RGB[background])
    ImageDraw.Draw(image).rectangle((16, 16, 47, 47), fill=RGB[color])
    return image


def dog_in_the_middle(images: list[Image.Image]) -> list[list[Detection]]:
    return [[Detection("dog", 0.9, (16, 16, 48, 48))] for _ in images]


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

    def whole(images, mask=None):
        return [[Detection("dog", 0.9, (16, 16, 48, 48), mask)] for _ in images]

    def masked(images):
        return whole(images, mask)

    asked = {"include": [a_dog("red"), a_dog("blue")]}
    assert Given(clip=clip, find=whole)([""] * 2, [picture] * 2, **asked)["strict"] == [0, 1]
    cut = np.asarray(cut_out(picture, masked([picture])[0][0]))
    assert cut.shape == (32, 32, 3)
    assert {tuple(pixel) for pixel in cut.reshape(-1, 3).tolist()} == {RGB["red"], (0x99,) * 3}


@pytest.mark.parametrize("box", [(-5, -5, 200, 200), (63.7, 63.7, 63.9, 63.9), (70, 70, 80, 80), (10, 10, 10, 10)])
def test_boxes_at_the_edge_are_cut_out_within_the_picture(box):
    part = cut_out(square("red"), Detection("dog", 0.9, box))
    assert 1 <= part.width <= 64
    assert 1 <= part.height <= 64


def test_clip_is_loaded_only_for_colors():
    reward = Given(clip="nobody/nothing", find=dog_in_the_middle)
    assert reward([""], [square("red")], include=[[{"class": "dog"}]])["reward"] == [1.0]


def test_names():
    assert rewards.object_detector.__name__ == "object_detector"
    assert rewards.ObjectDetector is ObjectDetector
    named = resolve_reward("object_detector:name=counts,strict=true,threshold=0.5")
    assert named == ObjectDetector(name="counts", strict=True, threshold=0.5)
