"""Reading words that are drawn, turned and noisy, and what a word with mistakes is worth."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from slas_trl.rewards import ocr as ocr_reward
from slas_trl.rewards.quoted_text import OCR, _reader, quoted_text, text_score
from slas_trl.rewards.resolve import resolve_reward
from tests.rewards.tiny_models import deep


pytestmark = pytest.mark.rewards
rapidocr = pytest.importorskip("rapidocr")
pytest.importorskip("rapidfuzz")

ROOT = Path(__file__).parents[2]
quick = OCR(min_side=128)  # enough for the large letters here


def picture(
    text: str, size: tuple[int, int] = (192, 64), height: int = 32, angle: float = 0, noise: float = 0, seed: int = 0
) -> Image.Image:
    """Dark letters in the middle of a light picture."""
    image = Image.new("RGB", size, (250, 240, 220))
    font = ImageFont.load_default(height)
    middle = (size[0] / 2, size[1] / 2)
    ImageDraw.Draw(image).multiline_text(middle, text, fill=(40, 30, 90), font=font, anchor="mm", align="center")
    image = image.rotate(angle, resample=Image.Resampling.BICUBIC, fillcolor=(250, 240, 220))
    pixels = np.asarray(image) + np.random.default_rng(seed).normal(0, noise, (*size[::-1], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("word", "angle", "noise"), [("HELLO", 6, 0), ("No. 42!", 0, 0), ("don't", -6, 25)])
def test_words(word, angle, noise):
    assert quick([f'a sign that says "{word}"'], [picture(word, angle=angle, noise=noise)]) == [1.0]


def test_default_options():
    lines = picture("Grand\nOpening", size=(160, 96), angle=3, noise=10)
    assert ocr_reward(['a banner, "Grand Opening"', 'a banner, "Grand Closing"'], [lines] * 2) == [1.0, 1 - 4 / 12]


def test_worse_words_score_less():
    shown = ["HELLO", "HELLA", "HALLA", "WORLD", ""]
    scores = quick(['a "hello"'] * len(shown), [picture(word) for word in shown])
    assert scores == pytest.approx([1, 4 / 5, 3 / 5, 1 / 5, 0])
    assert all(type(score) is float for score in scores)
    sign = picture("CLOSED\nHELLO", size=(192, 96))
    assert quick(['"hello"', '"closedhello"', '"open"'], [sign] * 3) == [1, 1, 0]
    assert quick.read(sign) == ["CLOSED", "HELLO"]


def test_small_pictures_and_other_modes():
    large = picture("CAT")
    shown = [picture("CAT", (32, 32), 14), large.convert("RGBA"), large.convert("P"), deep(large)]
    assert quick(['"cat"'] * 4, shown) == [1] * 4
    for size in ((1, 1), (20, 300)):
        blank, noise = Image.new("RGB", size, "white"), picture("", size, noise=90)
        assert max(quick(['"cat"'] * 2, [blank, noise])) < 0.5


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Hello, World"', "Hello, World"),
        ('"one", then “two”', "one"),
        ("it's a sign, 'Hello'", "Hello"),
        *((f"a {quoted}", "x") for quoted in ("„x“", "«x»", "« x »", "»x«", "「x」", "『x』", "＂x＂", '“x"', "‘x’")),
        ("the dog's bone and the cat's toy", None),
        ("the '90s and the '80s, rock 'n' roll", None),
        ("the students' sign 'don't stop'", "don't stop"),
        ("'no' and \"yes\"", "yes"),
        ('a 5" screen that shows "NEWS"', "NEWS"),
        ('写着"你好"', "你好"),
        ('"" and "HI"', "HI"),
        ('nothing: ""', None),
        ('"two\nlines"', "two\nlines"),
    ],
)
def test_quoted_text(prompt, text):
    assert quoted_text(prompt) == text


@pytest.mark.parametrize(
    ("target", "read", "score"),
    [
        ("Hello", "hello", 1),
        ("cat", "the cat sat", 1),
        ("cat", "", 0),
        ("cat", "cut", 2 / 3),
        ("cat", "cutlery and more of it", 0),  # at most the length of what was asked for
        ("Straße", "STRASSE", 1),
        ("50% off!", "50％ off！", 1),  # full-width signs
        ("don’t", "don't", 1),
        ("你好", "你 好", 1),
    ],
)
def test_text_score(target, read, score):
    assert text_score(target, read) == pytest.approx(score)


def test_prompts_without_text_have_no_score(caplog):
    reward = OCR(min_side=64, name="signs")
    for _ in range(2):
        assert reward(["a cat", 'a "cat"'], [picture("CAT")] * 2, category=["a", "b"]) == [None, 1.0]
    assert sum("signs" in record.message for record in caplog.records) == 1


def test_the_text_of_a_column():
    texts = ["cat", None, " ", 42]
    images = [picture(word) for word in ("CAT", "DOG", "DOG", "42")]
    assert quick(['a "dog"'] * 4, images, target_text=texts) == [1.0] * 4
    assert quick(["a cat"] * 2, images[:2], target_text=["CAT", None]) == [1.0, None]


@pytest.mark.parametrize(("size", "height"), [((1024, 48), 30), ((4000, 400), 120)])
def test_words_in_a_banner(size, height):
    assert ocr_reward(['"Grand Opening"'], [picture("GRAND OPENING", size, height, noise=2)]) == [1.0]


def looked_at(image: Image.Image, monkeypatch) -> tuple[int, int]:
    """The short and the long side of what the network that finds text is given, which time and memory grow with."""
    quick.read(Image.new("RGB", (64, 64)))
    finder, shapes = _reader(quick.threads or torch.get_num_threads(), quick.min_side).text_det, []
    network = finder.session
    monkeypatch.setattr(finder, "session", lambda pixels: shapes.append(pixels.shape) or network(pixels))
    quick.read(image)
    ((_, _, *sides),) = shapes
    return tuple(sorted(sides))


@pytest.mark.parametrize("size", [(64, 1024), (40_000, 3), (64, 64), (576, 192)])
def test_long_pictures_take_no_more_than_others(size, monkeypatch):
    short, long = looked_at(Image.new("RGB", size, "white"), monkeypatch)
    assert long <= 2016 and long <= 3.25 * short
    if ordinary := {(64, 64): (128, 128), (576, 192): (192, 576)}.get(size):  # which are not padded
        assert (short, long) == ordinary


def test_options():
    assert resolve_reward("ocr:threads=2,min_side=128") == OCR(threads=2, min_side=128)
    assert quick([], []) == []
    assert OCR(min_side=128, min_confidence=1)(['"cat"'], [picture("CAT")]) == [0]
    for options in ({"min_confidence": 2}, {"min_side": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            OCR(**options)


def test_offline_silent_and_without_writing(tmp_path):
    """In a process of its own, with a home that cannot be written to, and without a network; nothing is reported."""
    picture("HELLO").save(tmp_path / "hello.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    code = """
import socket, sys
from pathlib import Path
from PIL import Image

socket.socket.connect = socket.getaddrinfo = None
from slas_trl.rewards import ocr
folder = Path(sys.argv.pop(1))
before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
scores = ocr(['"hello"'] * 2, [Image.open(name) for name in sys.argv[1:]])
assert scores == [1.0, 0.0], scores
assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before
"""
    models = Path(rapidocr.__file__).parent / "models"
    # Test runners may have set these, and onnxruntime does not report anything then.
    env = {key: value for key, value in os.environ.items() if key not in ("CI", "ORT_DISABLE_TELEMETRY")}
    env |= {"HOME": "/dev/null", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, models, tmp_path / "hello.png", tmp_path / "black.png"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
