"""`examples/shapes_pictures.py`: pictures that show what their captions say."""

import numpy as np

from examples.shapes_pictures import draw, misdescribe, sample_pictures
from slas_trl.shapes import world


def test_pictures():
    captions, pictures = sample_pictures(60, np.random.default_rng(0))
    assert len(captions) == 60 and pictures.shape == (60, 32, 32, 3)
    assert pictures.dtype == np.float32 and 0 <= pictures.min() < pictures.max() <= 1
    assert {world.parse_caption(text).category for text in captions} == set(world.CATEGORIES)
    gray = pictures.max(-1) - pictures.min(-1) < 0.1
    assert (gray.mean((1, 2)) > 0.3).all()  # things on a ground


def test_drawing_is_reproducible():
    made, again, other = (sample_pictures(20, np.random.default_rng(seed), "test", wrong=0.5) for seed in (1, 1, 2))
    assert again[0] == made[0] != other[0]
    np.testing.assert_array_equal(again[1], made[1])
    first, second = draw([world.parse_caption("a circle")] * 2, np.random.default_rng(3))
    assert not np.array_equal(first, second)  # the caption leaves place, size, color and ground open
    assert set(made[0]) <= {caption.text for caption in world.captions_of("test")}


def test_wrong_captions_differ_in_one_respect():
    rng = np.random.default_rng(0)
    for caption in world.captions_of("train")[::20]:
        wrong = misdescribe(caption, rng)
        before = [caption.count, caption.relation, caption.ground, *vars(caption.things[0]).values()]
        after = [wrong.count, wrong.relation, wrong.ground, *vars(wrong.things[0]).values()]
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        assert wrong.things[1:] == caption.things[1:]
