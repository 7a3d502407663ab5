"""HPSv2: pixel values, tokens and scores of its authors' package, to the bit and to 1e-6."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from slas_trl.rewards import HPSv2, hpsv2
from slas_trl.rewards.clip import normalized
from slas_trl.rewards.hps import FILES, SIZE, _padded, _resized
from slas_trl.rewards.resolve import resolve_reward
from tests.rewards.tiny_clips import OPEN_CLIP_ARCHITECTURE, picture, spread_out
from tests.rewards.tiny_models import deep


open_clip = pytest.importorskip("open_clip")
pytestmark = pytest.mark.rewards

SHAPES = [
    *[(224, 224), (224, 150), (3, 224), (223, 223), (225, 225), (223, 149), (225, 151)],
    *[(1, 1), (1, 97), (300, 1), (2, 2), (1, 224), (447, 1)],
    *[(512, 512), (720, 720), (1024, 1024), (768, 1360), (1600, 300), (100, 99), (448, 447), (333, 500), (37, 21)],
]
MODES = ["L", "P", "1", "LA", "PA", "CMYK", "YCbCr", "HSV", "I", "F", "RGBX"]
PROMPTS = ["a red dot", "two blue boxes on a table", "x", "a portrait, oil on canvas, 4k, " * 20]


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> ModuleType:
    """`hpsv2.src.open_clip`, which cannot be imported: a copy, beside the vocabulary that its wheel lacks."""
    found = importlib.util.find_spec("hpsv2")
    if found is None or found.origin is None:
        pytest.skip("needs the package hpsv2, see the Makefile")
    folder = tmp_path_factory.mktemp("hpsv2") / "hpsv2_open_clip"
    shutil.copytree(Path(found.origin).parent / "src" / "open_clip", folder)
    shutil.copy(Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz", folder)
    with pytest.MonkeyPatch.context() as patch:
        # It imports a drawing program by accident, which needs tkinter: not there in Debian's Python.
        patch.setitem(sys.modules, "turtle", SimpleNamespace(forward=None))
        patch.syspath_prepend(folder.parent)
        yield importlib.import_module(folder.name)
    for name in [name for name in sys.modules if name.split(".")[0] == folder.name]:
        del sys.modules[name]


def hpsv2_preprocess(image: Image.Image) -> torch.Tensor:
    """As the package does: a picture whose longer side is 224 is neither resized nor padded, and stays narrow."""
    pixels = _resized(image)
    return normalized(pixels if max(image.size) == SIZE else _padded(pixels))


@pytest.fixture
def small(monkeypatch):
    """In place of ViT-H-14, in both."""
    small = OPEN_CLIP_ARCHITECTURE | {"text_cfg": OPEN_CLIP_ARCHITECTURE["text_cfg"] | {"width": 64}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", small)
    return small


@pytest.fixture
def authors_preprocess(package, small, monkeypatch):
    return authors(package, small, monkeypatch)[1]


def authors(package, architecture, monkeypatch):
    """Model and preprocessing as `hpsv2.img_score` asks for them, but for the weights to start from."""
    if architecture:
        monkeypatch.setitem(sys.modules[f"{package.__name__}.factory"]._MODEL_CONFIGS, "ViT-H-14", architecture)
    model, _, preprocess = package.create_model_and_transforms("ViT-H-14", light_augmentation=True, output_dict=True)
    return model.eval(), preprocess


RANDOM = [tuple(int(2**side) for side in np.random.default_rng(seed).uniform(1, 10.5, 2)) for seed in range(20)]


@pytest.mark.parametrize("shape", SHAPES + RANDOM, ids=str)
def test_preprocessing_to_the_bit(shape, authors_preprocess):
    image = picture(*shape)
    expected = authors_preprocess(image)
    ours = hpsv2_preprocess(image)
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("mode", MODES)
def test_preprocessing_of_modes(mode, authors_preprocess):
    image = Image.fromarray(np.asarray(picture(150, 90), dtype=np.uint8)).convert("L" if mode in "1IFPA" else "RGB")
    if mode == "PA":
        image = image.convert("P")
    image = image.convert(mode)
    assert image.mode == mode
    assert torch.equal(hpsv2_preprocess(image), authors_preprocess(image))
    assert torch.equal(hpsv2_preprocess(deep(image)), hpsv2_preprocess(image.convert("L")))


def test_preprocessing_of_an_alpha_channel(authors_preprocess):
    """The package hands it on to its model, which fails; the colors are the same."""
    image = picture(150, 90)
    image.putalpha(picture(150, 90, seed=1, mode="L"))
    assert authors_preprocess(image).shape == (4, 224, 224)
    assert torch.equal(hpsv2_preprocess(image), authors_preprocess(image)[:3])


def test_an_image_with_nothing_left_of_its_width(authors_preprocess):
    image = picture(1000, 1)
    with pytest.raises(RuntimeError, match="should be greater than 0"):
        authors_preprocess(image)
    padding = (hpsv2_preprocess(image) == hpsv2_preprocess(Image.new("RGB", (1, 1)))).all(0)
    assert padding.all(1).sum() == 223


def test_tokens(package):
    generator = np.random.default_rng(0)
    symbols = list("aZ09 .,'\"!?()<>&;:#é中文🙂\t\n\u00a0ﬁ")
    symbols += ["'ll", " the ", "&amp;", "<end_of_text>", "l’été", "Ã©"]
    prompts = ["", " ", "A red circle", "word " * 100, *PROMPTS]
    prompts += ["".join(generator.choice(symbols, generator.integers(1, 150))) for _ in range(100)]
    assert torch.equal(open_clip.tokenize(prompts), package.tokenize(prompts))


IMAGES = [picture(224, 224), picture(512, 512), picture(768, 512), picture(90, 300)]


def expected_scores(model, preprocess, tokenize, prompts, images) -> list[float]:
    """One at a time, as the package does; in float32, as it does not."""
    scores = []
    for prompt, image in zip(prompts, images, strict=True):
        with torch.no_grad():
            outputs = model(preprocess(image)[None], tokenize([prompt]))
        scores.append((outputs["image_features"] @ outputs["text_features"].T).item())
    return scores


def test_scores(package, small, monkeypatch, tmp_path):
    model, preprocess = authors(package, small, monkeypatch)
    spread_out(model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / FILES["v2.1"])
    expected = expected_scores(model, preprocess, package.tokenize, PROMPTS, IMAGES)
    scores = HPSv2(checkpoint=str(tmp_path), batch_size=3)(PROMPTS, IMAGES)
    assert scores == pytest.approx(expected, abs=1e-6)
    assert max(scores) - min(scores) > 0.03
    assert all(isinstance(score, float) for score in scores)


@pytest.mark.slow
def test_scores_at_full_size(package, monkeypatch, tmp_path):
    model, preprocess = authors(package, None, monkeypatch)
    expected = expected_scores(model, preprocess, package.tokenize, PROMPTS, IMAGES)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "random.pt")
    del model
    scores = HPSv2(checkpoint=str(tmp_path / "random.pt"))(PROMPTS, IMAGES)
    (tmp_path / "random.pt").unlink()  # 4 GB
    assert scores == pytest.approx(expected, abs=1e-6)


@pytest.fixture
def checkpoint(small, tmp_path) -> Path:
    model = open_clip.CLIP(**small)
    spread_out(model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / FILES["v2.1"])
    return tmp_path / FILES["v2.1"]


def test_a_narrow_image_is_scored_as_its_neighbors_are(checkpoint):
    """One whose longer side is 224 is left narrow by the package, whose model then fails."""
    wide = picture(896, 600)
    images = [wide.resize(size, Image.Resampling.BICUBIC) for size in [(224, 150), (225, 151), (223, 149), (448, 300)]]
    assert hpsv2_preprocess(images[0]).shape == (3, 150, 224)
    scores = HPSv2(checkpoint=str(checkpoint))(["a red dot"] * 4, images)
    assert scores == pytest.approx([scores[0]] * 4, abs=0.02)


def test_versions_are_files_of_this_model(checkpoint):
    assert resolve_reward("hpsv2") == hpsv2 == HPSv2("v2.1")
    assert resolve_reward("hpsv2:version=v2.0") == HPSv2("v2.0")
    folder = str(checkpoint.parent)
    with pytest.raises(FileNotFoundError, match="HPS_v2_compressed.pt"):
        HPSv2("v2.0", folder)(PROMPTS, IMAGES)
    checkpoint = checkpoint.rename(checkpoint.with_name("HPS_v2_compressed.pt"))
    assert len(HPSv2("v2.0", folder)(PROMPTS, IMAGES)) == 4
    with pytest.raises(ValueError, match="version"):
        resolve_reward("hpsv2:version=2.1")
    with pytest.raises(FileNotFoundError, match="hps.pt"):
        HPSv2(checkpoint=f"{folder}/hps.pt")(PROMPTS, IMAGES)
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.save({"state_dict": weights | {"score_predictor.0.weight": torch.ones(1)}}, checkpoint)
    with pytest.raises(ValueError, match="does not fit HPSv2.*Unexpected key"):
        HPSv2(checkpoint=str(checkpoint))(PROMPTS, IMAGES)
