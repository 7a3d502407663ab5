"""Rewards without a model: what they prefer, and on which scale."""

import io

import numpy as np
import pytest
from PIL import Image

from slas_trl.images import to_rgb
from slas_trl.rewards import brightness, incompressibility, jpeg_compressibility
from slas_trl.rewards.resolve import resolve_reward


def test_size_of_a_jpeg():
    noise = np.random.default_rng(0).normal(0, 1, (64, 64, 3))
    images = [Image.fromarray((128 + n * noise).clip(0, 255).astype(np.uint8)) for n in (0, 5, 20, 80)]
    sizes = incompressibility([""] * 4, images)
    assert sizes == sorted(sizes)
    assert jpeg_compressibility([""] * 4, images) == [-size for size in sizes]

    images[2].save(file := io.BytesIO(), "JPEG", quality=95)
    assert sizes[2] == len(file.getvalue()) / 1000


def test_brightness():
    plain = [Image.new("RGB", (64, 64), color) for color in ("black", "white", "#333333", "lime", "red", "blue")]
    assert brightness([""] * 6, plain) == pytest.approx([0, 1, 0.2, 0.587, 0.299, 0.114])
    plain[0].paste((255, 255, 255), (0, 0, 32, 64))
    assert brightness([""], plain[:1]) == pytest.approx([0.5])


SIXTEEN = np.array([[0, 256 * 51 + 51, 65535]], dtype=np.uint16)


@pytest.mark.parametrize(
    ("image", "levels"),
    [
        (Image.fromarray(SIXTEEN), [0, 51, 255]),
        (Image.fromarray(SIXTEEN // 256), [0, 0, 1]),
        (Image.fromarray(SIXTEEN.astype(np.int32)), [0, 51, 255]),
        (Image.fromarray(SIXTEEN.astype(np.int32) // 257), [0, 51, 255]),
        (Image.fromarray(SIXTEEN.astype(np.float32) / 65535), [0, 51, 255]),
        (Image.fromarray(SIXTEEN.astype(np.float32) / 257), [0, 51, 255]),
        (Image.fromarray(SIXTEEN.astype(np.float32)), [0, 51, 255]),
        (Image.fromarray(np.array([[0.0, 0.2, 1.05]], dtype=np.float32)), [0, 51, 255]),
        (Image.fromarray(np.array([[-1, 0.2, 2e5, np.nan]], dtype=np.float32)), [0, 0, 255, 0]),
        (Image.new("La", (1, 1), (51, 255)), [51]),
        (Image.new("LA", (1, 1), (51, 0)), [51]),
        (Image.new("RGBA", (1, 1), (51, 51, 51, 0)), [51]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else None,
)
def test_the_levels_of_every_mode(image, levels):
    assert np.asarray(to_rgb(image)).tolist() == [[[level] * 3 for level in levels]]


@pytest.mark.parametrize("name", ["brightness", "jpeg_compressibility", "shapes_coloured_area", "shapes_clip"])
@pytest.mark.parametrize("mode", ["I;16", "L", "RGBA", "CMYK"])
def test_rewards_scale_every_mode(name, mode):
    gray = np.tile(np.arange(32, dtype=np.uint16) * 2114, (32, 1))
    image = Image.fromarray(gray) if mode == "I;16" else to_rgb(Image.fromarray(gray)).convert(mode)
    reward = resolve_reward(name)
    assert image.mode == mode and reward(["a"], [image]) == reward(["a"], [to_rgb(image)])
