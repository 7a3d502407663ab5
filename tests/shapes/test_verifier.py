from itertools import product

import numpy as np
import pytest
from PIL import Image

from examples.shapes_pictures import draw, sample_pictures
from slas_trl.shapes import world
from slas_trl.shapes.verifier import Found, find, relations, to_pixels, verify


GRAY = {"dark": 0.2, "light": 0.8}
RGB = {"red": (0.9, 0, 0), "blue": (0, 0, 0.9), "green": (0, 0.9, 0), "yellow": (0.9, 0.9, 0)}


def scene(*things: tuple[str, str, float, float, float], ground: str = "dark") -> np.ndarray:
    """A picture of things (color, shape, x, y, diameter) in pixels."""
    picture = np.full((32, 32, 3), GRAY[ground], dtype=np.float32)
    axis = np.arange(32) + 0.5
    for color, shape, x, y, diameter in things:
        kind, radius = np.array([world.SHAPES.index(shape)]), np.array([diameter / 2])
        alpha = world.coverage(kind, (axis - x)[None, None, :], (axis - y)[None, :, None], radius)[0][..., None]
        picture = picture * (1 - alpha) + np.array(RGB[color], dtype=np.float32) * alpha
    return picture


def judge(prompt: str, picture: np.ndarray):
    (verdict,) = verify([prompt], as_pil(picture[None]))
    return verdict


def find_things(pictures: np.ndarray) -> list[list[Found]]:
    return find(to_pixels(as_pil(pictures)))


def as_pil(pictures: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray((picture * 255).round().astype(np.uint8)) for picture in pictures]


RED_CIRCLE = ("red", "circle", 9, 9, 12)
BLUE_SQUARE = ("blue", "square", 24, 22, 9)


@pytest.mark.parametrize("split", world.SPLITS)
def test_ground_truth_is_perfect(split):
    prompts, pictures = sample_pictures(400, np.random.default_rng(0), split=split)
    verdicts = verify(prompts, as_pil(pictures))
    assert not [v.demands for v in verdicts if not (v.lenient and v.strict and v.graded == 1.0)]


def test_pictures_that_differ_from_their_caption_are_seen():
    prompts, pictures = sample_pictures(400, np.random.default_rng(0), wrong=1.0)
    verdicts = verify(prompts, as_pil(pictures))
    # Not none: of two things on a diagonal, GenEval's rule lets one be both left of and above the other.
    assert np.mean([verdict.strict for verdict in verdicts]) < 0.01
    assert 0.3 < np.mean([verdict.graded for verdict in verdicts]) < 0.8


def test_things():
    first, second = find_things(scene(RED_CIRCLE, BLUE_SQUARE)[None])[0]
    assert (first.shape, first.color, first.size) == ("circle", "red", "large")
    assert (second.shape, second.color, second.size) == ("square", "blue", "small")
    np.testing.assert_allclose((*first.center, *second.center, *first.box), (9, 9, 24, 22, 3, 3, 15, 15), atol=1)
    assert first.area == pytest.approx(np.pi * 6**2, rel=0.15)


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("color", world.COLORS)
def test_every_shape_and_color(shape, color):
    rng = np.random.default_rng(0)
    pictures = draw([world.parse_caption(f"a {color} {shape}")] * 40, rng)
    for things in find_things(pictures):
        assert [(thing.shape, thing.color) for thing in things] == [(shape, color)]


def test_other_forms_have_no_shape():
    ellipse = scene()
    y, x = np.mgrid[:32, :32] + 0.5
    ellipse[((x - 16) / 12) ** 2 + ((y - 16) / 5) ** 2 < 1] = RGB["red"]
    flooded = np.broadcast_to(np.array(RGB["red"], dtype=np.float32), (32, 32, 3))
    ring = scene(("red", "circle", 16, 16, 15))
    ring[((x - 16) ** 2 + (y - 16) ** 2) < 5**2] = GRAY["dark"]
    small = scene()
    small[10:14, 10:14] = RGB["red"]
    for picture in (ellipse, flooded, ring, small):
        assert [(thing.shape, thing.color) for thing in find_things(picture[None])[0]] == [(None, "red")]
    assert not judge("a square", flooded).lenient


def test_specks_are_no_things():
    picture = scene(RED_CIRCLE)
    picture[25:28, 25:28] = RGB["blue"]  # 9 pixels
    assert judge("a red circle", picture).strict
    picture[28, 25] = RGB["blue"]
    verdict = judge("a red circle", picture)
    assert verdict.lenient and not verdict.strict


def test_things_that_touch_are_parted_by_their_colors():
    [things] = find_things(scene(("red", "square", 10, 16, 10), ("blue", "square", 20, 16, 10))[None])
    assert {(thing.color, thing.shape) for thing in things} == {("blue", "square"), ("red", "square")}


@pytest.mark.parametrize(
    ("prompt", "picture", "lenient", "strict", "graded"),
    [
        # circle, red, dark, nothing else
        ("a red circle on a dark background", scene(RED_CIRCLE), True, True, 1),
        ("a red circle on a dark background", scene(RED_CIRCLE, ground="light"), False, False, 3 / 4),
        ("a red circle on a dark background", scene(("blue", "circle", 9, 9, 12)), False, False, 3 / 4),
        ("a red circle on a dark background", scene(("red", "square", 9, 9, 12)), False, False, 1 / 4),
        ("a red circle on a dark background", scene(RED_CIRCLE, BLUE_SQUARE), True, False, 3 / 4),
        ("a red circle on a dark background", scene(), False, False, 1 / 4),
        ("a red circle on a dark background", scene(ground="light"), False, False, 0),
        # another circle is something else, even if it is red
        ("a red circle", scene(RED_CIRCLE, ("red", "circle", 24, 22, 9)), True, False, 2 / 3),
        # square, large, nothing else
        ("a large square", scene(("red", "square", 16, 16, 13)), True, True, 1),
        ("a large square", scene(("red", "square", 16, 16, 9)), False, False, 2 / 3),
        ("a small square", scene(("red", "square", 16, 16, 9)), True, True, 1),
        # circle, square, nothing else
        ("a circle and a square", scene(RED_CIRCLE, BLUE_SQUARE), True, True, 1),
        ("a circle and a square", scene(RED_CIRCLE), False, False, 2 / 3),
        ("a circle and a square", scene(RED_CIRCLE, RED_CIRCLE[:2] + (24, 22, 9)), False, False, 1 / 3),
        ("a circle and a square", scene(), False, False, 0),
        # and the color of each
        ("a red circle and a blue square", scene(RED_CIRCLE, BLUE_SQUARE), True, True, 1),
        ("a blue circle and a red square", scene(RED_CIRCLE, BLUE_SQUARE), False, False, 3 / 5),
        # circle, square, where, nothing else
        ("a circle left of a square", scene(RED_CIRCLE, BLUE_SQUARE), True, True, 1),
        ("a circle right of a square", scene(RED_CIRCLE, BLUE_SQUARE), False, False, 3 / 4),
        ("a square right of a circle", scene(RED_CIRCLE, BLUE_SQUARE), True, True, 1),
        ("a circle below a square", scene(RED_CIRCLE, BLUE_SQUARE), False, False, 3 / 4),
        ("a circle left of a square", scene(RED_CIRCLE), False, False, 2 / 4),
    ],
)
def test_demands(prompt, picture, lenient, strict, graded):
    verdict = judge(prompt, picture)
    assert (verdict.lenient, verdict.strict) == (lenient, strict)
    assert verdict.graded == pytest.approx(graded)


def test_demands_have_names():
    verdict = judge("a red circle on a light background", scene(("blue", "circle", 9, 9, 12)))
    assert verdict.category == "colors"
    assert verdict.demands == {"circle": 1, "circle is red": 0, "light background": 0, "nothing else": 1}


CORNERS = [("red", "circle", x, y, 8) for x, y in product((8, 24), (8, 24))] + [("green", "circle", 16, 16, 8)]


@pytest.mark.parametrize(("found", "count"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3), (5, 1 / 3)])
def test_counting_is_exact_and_graded(found, count):
    verdict = judge("three circles", scene(*CORNERS[:found]))
    there = float(found > 0)
    assert verdict.graded == pytest.approx((there + count + there) / 3)
    assert verdict.lenient == verdict.strict == (found == 3)
    verdict = judge("three circles", scene(*CORNERS[:3], ("blue", "square", 24, 24, 8)))
    assert verdict.lenient and not verdict.strict and verdict.graded == pytest.approx(2 / 3)


def test_the_best_of_several_things_counts():
    circles = ("blue", "circle", 24, 6, 9), ("red", "circle", 6, 24, 9)
    picture = scene(*circles, ("green", "square", 24, 24, 9))
    for color in ("blue", "red"):
        verdict = judge(f"a {color} circle and a green square", picture)
        assert verdict.lenient and not verdict.strict
    assert judge("a circle above a square", picture).lenient
    assert judge("a circle left of a square", picture).lenient
    assert not judge("a circle below a square", picture).lenient


def test_a_blank_canvas_meets_no_demand_but_its_ground():
    for caption in world.captions_of("test"):
        verdict = judge(caption.text, scene(ground="light"))
        met = [demand for demand, score in verdict.demands.items() if score]
        assert met == (["light background"] if caption.ground == "light" else [])


def thing_at(x: float, y: float, extent: int = 10) -> Found:
    box = int(x - extent / 2), int(y - extent / 2), int(x + extent / 2), int(y + extent / 2)
    return Found("circle", "red", box, (x, y), 80)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (5, 16, {"left of"}),
        (27, 16, {"right of"}),
        (16, 5, {"above"}),
        (16, 27, {"below"}),
        (5, 5, {"left of", "above"}),
        (5, 12, {"left of"}),
        (14, 16, set()),  # within a tenth of the two extents, 2 pixels
    ],
)
def test_relations(x, y, expected):
    assert relations(thing_at(x, y), thing_at(16, 16)) == expected


def test_kinds_of_images():
    rng = np.random.default_rng(0)
    prompts, pictures = sample_pictures(100, rng, wrong=0.3)
    images = as_pil(np.clip(pictures + rng.normal(0, 0.1, pictures.shape), 0, 1))
    expected = verify(prompts, images)
    assert {verdict.strict for verdict in expected} == {True, False}
    assert all(verdict.strict == (verdict.graded == 1) <= verdict.lenient for verdict in expected)
    assert verify(prompts, [image.convert("RGBA") for image in images]) == expected
    assert verify(prompts, [image.resize((64, 64), Image.Resampling.NEAREST) for image in images]) == expected


def test_sizes_of_images():
    picture = as_pil(scene(RED_CIRCLE, BLUE_SQUARE)[None])[0]
    for side in (48, 100, 512):
        large = picture.resize((side, side), Image.Resampling.BICUBIC)
        (verdict,) = verify(["a red circle and a blue square on a dark background"], [large])
        assert verdict.strict
    (verdict,) = verify(["a red circle"], [Image.new("L", (32, 32), 128)])
    assert verdict.graded == 0 and verify([], []) == []


PICTURE = as_pil(scene(RED_CIRCLE)[None])


@pytest.mark.parametrize(
    ("prompts", "pictures", "error", "named"),
    [
        (["a dog"], PICTURE, ValueError, "a dog"),
        (["a circle"] * 2, PICTURE, ValueError, "2 prompts and 1 images"),
        (["a circle"], [scene(RED_CIRCLE)], TypeError, "ndarray"),
    ],
)
def test_errors(prompts, pictures, error, named):
    with pytest.raises(error, match=named):
        verify(prompts, pictures)
