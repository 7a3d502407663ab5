"""CLIPScore and PickScore: the cosine that the model's own library gives, whichever library that is."""

import dataclasses
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from slas_trl.rewards import ClipScore, HPSv2, PickScore, clip_score, pick_score
from slas_trl.rewards.clip import load_clip
from slas_trl.rewards.resolve import resolve_reward
from tests.rewards.tiny_clips import (
    OPEN_CLIP_ARCHITECTURE,
    Harmful,
    in_hub_cache,
    picture,
    save_open_clip,
    save_transformers_clip,
)
from tests.rewards.tiny_models import deep
from tests.tiny_pipelines import clip_tokenizer


ROOT = Path(__file__).parents[2]
PROMPTS = ["a red dot", "a red dot", "two blue boxes on a table", "x", "a red dot", "a text of more than 16 tokens"]
SIZES = {(32, 32): "RGB", (90, 41): "L", (17, 200): "RGBA", (64, 64): "P", (50, 3): "RGB", (33, 47): "LA"}
IMAGES = [picture(*size, mode=mode) for size, mode in SIZES.items()]


@pytest.fixture(scope="module")
def transformers_clip(tmp_path_factory) -> str:
    return str(save_transformers_clip(tmp_path_factory.mktemp("clips") / "transformers"))


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory) -> str:
    pytest.importorskip("open_clip")
    cfg = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
    return str(save_open_clip(tmp_path_factory.mktemp("clips") / "open_clip", **cfg))


@pytest.fixture(scope="module")
def pick_score_folders(tmp_path_factory) -> tuple[str, str]:
    """A model without preprocessing, as PickScore_v1 is used, and a folder with preprocessing alone."""
    model = save_transformers_clip(tmp_path_factory.mktemp("pick_score") / "model")
    trained = CLIPModel.from_pretrained(model)
    trained.logit_scale.data.fill_(4.6052)
    trained.save_pretrained(model)
    processor = tmp_path_factory.mktemp("processor")
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (model / name).rename(processor / name)
    return str(model), str(processor)


@pytest.mark.parametrize(("option", "value"), [("device", "gpu"), ("dtype", "int8")])
def test_options_of_all_models_are_checked_before_one_is_loaded(option, value):
    with pytest.raises(ValueError, match=value):
        resolve_reward(f"clip_score:{option}={value}")
    assert resolve_reward("clip_score:device=cuda:7") == ClipScore(device="cuda:7")  # seen where it runs


def test_cosine_of_transformers(transformers_clip):
    model = CLIPModel.from_pretrained(transformers_clip).eval()
    tokenizer = AutoTokenizer.from_pretrained(transformers_clip)
    processor = AutoImageProcessor.from_pretrained(transformers_clip, backend="pil")
    expected = []
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):  # one at a time, so without padding
        tokens = tokenizer(prompt, truncation=True, max_length=16, return_tensors="pt")
        pixels = processor(image.convert("RGB"), return_tensors="pt", input_data_format="channels_last")
        with torch.no_grad():
            out = model(**tokens, **pixels)
        expected.append(cosine_similarity(out.image_embeds, out.text_embeds).item())
    scores = ClipScore(transformers_clip, batch_size=4)(PROMPTS, IMAGES, completions=IMAGES)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert max(scores) - min(scores) > 0.03  # so much more than the tolerance
    assert all(isinstance(score, float) and abs(score) <= 1 for score in scores)


def test_pick_score_of_its_authors(pick_score_folders):
    model = CLIPModel.from_pretrained(pick_score_folders[0]).eval()
    images = CLIPImageProcessorPil.from_pretrained(pick_score_folders[1])
    processor = CLIPProcessor(images, clip_tokenizer())
    expected = []
    for prompt, image in zip(PROMPTS, IMAGES, strict=True):
        options = {"padding": True, "truncation": True, "max_length": 16, "input_data_format": "channels_last"}
        inputs = processor(images=image.convert("RGB"), text=prompt, return_tensors="pt", **options)
        with torch.no_grad():
            out = model(**inputs)
        expected.append(out.logits_per_image.item())  # exp(logit_scale) times the cosine
    scores = PickScore(*pick_score_folders, batch_size=4)(PROMPTS, IMAGES)
    # To 1e-6 of the cosine: the scale is 100.
    assert [score / 100 for score in scores] == pytest.approx([score / 100 for score in expected], abs=1e-6)
    assert max(scores) - min(scores) > 3
    assert all(isinstance(score, float) for score in scores) and pick_score.__name__ == "pick_score"


@pytest.mark.rewards
@pytest.mark.parametrize("repository", [False, True], ids=["folder", "both kinds of files"])
def test_cosine_of_open_clip(open_clip_folder, transformers_clip, tmp_path, repository):
    """With open_clip's own preprocessing; and by open_clip where files of both libraries are there."""
    import open_clip

    folder = open_clip_folder
    if repository:
        for place in (transformers_clip, open_clip_folder):
            for path in Path(place).iterdir():
                (tmp_path / path.name).symlink_to(path)
        folder = str(tmp_path)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{open_clip_folder}")
    texts = open_clip.tokenize(PROMPTS)
    pixels = torch.stack([preprocess(image.convert("RGB")) for image in IMAGES])
    with torch.no_grad():
        expected = cosine_similarity(model.eval().encode_image(pixels), model.encode_text(texts)).tolist()
    scores = ClipScore(folder, batch_size=4)(PROMPTS, IMAGES)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert max(scores) - min(scores) > 0.03  # so much more than the tolerance


@pytest.mark.rewards
def test_architectures_of_open_clip_have_their_weights_named(open_clip_folder, tmp_path, monkeypatch):
    import open_clip

    config = json.loads((Path(open_clip_folder) / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", config)
    weights = Path(open_clip_folder) / "open_clip_model.safetensors"
    named = ClipScore("ViT-tiny", str(weights))(PROMPTS, IMAGES)
    assert named != ClipScore(open_clip_folder)(PROMPTS, IMAGES)  # other preprocessing
    assert len(set(named)) == len(named)
    # The activation function of weights that open_clip knows is theirs.
    for name in ("ViT-gelu", "ViT-any"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**config, "quick_gelu": False})
    assert ClipScore("ViT-gelu", str(weights))(PROMPTS, IMAGES) != named
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *names: {"quick_gelu": True})
    assert ClipScore("ViT-any", str(weights))(PROMPTS, IMAGES) == named

    for name, tag in (("ViT-B-33", None), ("ViT-B-32", None), ("ViT-B-32", "no_such_tag")):
        with pytest.raises(FileNotFoundError, match=f"{name}.*pretrained"):
            ClipScore(name, tag)(PROMPTS, IMAGES)


def test_a_prompt_is_embedded_once_for_all_its_images(transformers_clip):
    encoder = load_clip(transformers_clip)
    assert encoder is load_clip(transformers_clip)
    lengths = []
    handle = encoder.model.text_model.register_forward_hook(lambda m, args, out: lengths.append(len(out[0])))
    try:
        scores = encoder.cosines(["a", "b"] * 3, IMAGES, batch_size=4)
    finally:
        handle.remove()
    assert lengths == [2]
    assert not scores.requires_grad and scores.dtype == torch.float32
    assert clip_score([], []) == []  # and no model is loaded for it
    with pytest.raises(ValueError, match="1 prompts and 6 images"):
        clip_score(["a"], IMAGES)
    with pytest.raises(ValueError, match="leave out pretrained='openai'"):
        ClipScore(transformers_clip, "openai")(PROMPTS, IMAGES)


def test_threads_share_a_model(transformers_clip):
    reward = ClipScore(transformers_clip)
    prompts = [[f"{letter} {prompt}" for prompt in PROMPTS] for letter in "abcdefgh"]
    with ThreadPoolExecutor(8) as pool:
        scores = list(pool.map(lambda texts: reward(texts, IMAGES), prompts * 4))
    assert scores == [reward(texts, IMAGES) for texts in prompts] * 4


def test_what_makes_no_difference(transformers_clip):
    reward = ClipScore(transformers_clip)
    assert reward(PROMPTS, [deep(image) for image in IMAGES]) == reward(PROMPTS, [i.convert("L") for i in IMAGES])
    expected = reward(PROMPTS, IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        assert reward(PROMPTS, IMAGES) == expected
    coarse = dataclasses.replace(reward, dtype="bfloat16")(PROMPTS, IMAGES)
    assert coarse != expected and coarse == pytest.approx(expected, abs=0.05)


def test_what_is_no_clip_is_refused(tmp_path, transformers_clip):
    """transformers itself would make up the weights that it does not find."""
    lacking = save_transformers_clip(tmp_path / "lacking")
    model = CLIPModel.from_pretrained(lacking)
    weights = model.state_dict()
    del weights["visual_projection.weight"]
    model.save_pretrained(lacking, state_dict=weights)
    with pytest.raises(ValueError, match="lack some of .* visual_projection.weight"):
        ClipScore(str(lacking))(PROMPTS, IMAGES)

    (lacking / "preprocessor_config.json").unlink()
    (empty := tmp_path / "empty").mkdir()
    (no_weights := tmp_path / "no_weights").mkdir()  # open_clip itself would go on with random ones
    (no_weights / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP_ARCHITECTURE}))
    for folder in (lacking, empty, *([no_weights] if importlib.util.find_spec("open_clip") else [])):
        with pytest.raises((FileNotFoundError, ValueError), match=str(folder)):
            ClipScore(str(folder))(PROMPTS, IMAGES)


@pytest.mark.rewards
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("transformers_clip", "pytorch_model.bin"),
        ("open_clip_folder", "open_clip_pytorch_model.bin"),
        (None, "hps.pt"),
    ],
)
def test_nothing_but_tensors_is_unpickled(source, name, old, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    for path in Path(request.getfixturevalue(source)).iterdir() if source else ():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).symlink_to(path)
    torch.save({"logit_scale": Harmful()}, tmp_path / name, _use_new_zipfile_serialization=not old)
    reward = ClipScore(str(tmp_path)) if source else HPSv2(checkpoint=name)
    with pytest.raises((pickle.UnpicklingError, RuntimeError, ValueError), match="(?i)weights.only"):
        reward(PROMPTS, IMAGES)
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.rewards
def test_offline(tmp_path, monkeypatch, transformers_clip, open_clip_folder):
    """From the cache where it is there; and otherwise, which repository goes where."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for repository, folder in {"someone/clip": transformers_clip, "someone/open-clip": open_clip_folder}.items():
        in_hub_cache(tmp_path, repository, Path(folder))
        assert ClipScore(repository)(PROMPTS, IMAGES) == ClipScore(folder)(PROMPTS, IMAGES)
    (config_alone := tmp_path / "config").mkdir()
    (config_alone / "open_clip_config.json").symlink_to(Path(open_clip_folder) / "open_clip_config.json")
    in_hub_cache(tmp_path, "someone/half-of-it", config_alone)
    (head := tmp_path / "head.pth").touch()
    for name, files in {
        "clip_score": "openai/clip-vit-large-patch14",
        "clip_score:model=someone/half-of-it": "someone/half-of-it",
        "clip_score:model=ViT-B-32,pretrained=laion2b_s34b_b79k": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        "pick_score:model=someone/clip": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "hpsv2": "xswu/HPSv2 HPS_v2.1_compressed.pt",
        "aesthetic": "trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth",
        f"aesthetic:head={head}": "openai/clip-vit-large-patch14",
        "image_reward": "zai-org/ImageReward ImageReward.pt",
        f"image_reward:model={head}": "google-bert/bert-base-uncased vocab.txt",
        "object_detector:model=nobody/nothing": "nobody/nothing",
    }.items():
        with pytest.raises(FileNotFoundError, match=f"`hf download {files}`"):
            resolve_reward(name)(PROMPTS, IMAGES, include=[[{"class": "cat"}]] * 6)


@pytest.mark.slow
def test_without_the_optional_packages(transformers_clip, tmp_path):
    """The same scores without torchvision; and without open_clip, the command that installs it."""
    (tmp_path / "open_clip_config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    for i, image in enumerate(IMAGES):
        image.save(tmp_path / f"{i}.png")
    code = f"""
import json, sys
sys.modules.update(torchvision=None, open_clip=None, timm=None)
from PIL import Image
from slas_trl.rewards.resolve import resolve_reward
prompts, images = json.load(open("prompts.json")), [Image.open(f"{{i}}.png") for i in range(6)]
print(json.dumps(resolve_reward("clip_score:model={transformers_clip}")(prompts, images)))
for name in ("clip_score:model={tmp_path}", "clip_score:model=ViT-B-32", "hpsv2"):
    try:
        resolve_reward(name)(prompts, images)
    except ImportError as error:
        print(error)
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environ, text=True, timeout=300)
    scores, *errors = printed.splitlines()
    assert json.loads(scores) == ClipScore(transformers_clip)(PROMPTS, IMAGES) and len(errors) == 3
    assert all("The package open_clip is needed" in said and "slas-trl[rewards]" in said for said in errors)
