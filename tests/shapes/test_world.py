import numpy as np
import pytest

from slas_trl.shapes import world


def said_by(caption: world.Caption) -> tuple:
    """What a caption says, whichever of its two things it names first."""
    a, *rest = caption.things
    if not rest:
        return caption.category, a, caption.count, caption.ground
    (b,) = rest
    if caption.relation is None:
        return caption.category, frozenset([a, b]), caption.ground
    if caption.relation in ("right of", "below"):
        a, b = b, a
    horizontal = caption.relation in ("left of", "right of")
    return caption.category, a, b, horizontal, caption.ground


def test_no_meaning_is_in_both_splits():
    train, test = ({said_by(caption) for caption in world.captions_of(split)} for split in world.SPLITS)
    assert len(test) == len(world.captions_of("test"))  # a meaning is tested once
    assert not train & test
    assert train | test == {said_by(caption) for caption in world.all_captions().values()}


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_every_category_has_prompts_to_train_and_to_test(category):
    train, test = ([c for c in world.captions_of(split) if c.category == category] for split in world.SPLITS)
    assert len(test) >= 12
    assert len(train) >= len(test)


def test_unknown_split():
    with pytest.raises(ValueError, match="validation"):
        world.captions_of("validation")


def test_every_sentence_is_understood():
    for text, caption in world.all_captions().items():
        assert world.parse_caption(text) == caption
        assert caption.text == text


def test_parts_of_a_sentence():
    caption = world.parse_caption("A red circle and a blue square on a dark background.")
    assert caption.category == "color_attr"
    assert caption.things == (world.Thing("circle", "red"), world.Thing("square", "blue"))
    assert (caption.count, caption.relation, caption.ground) == (1, None, "dark")

    caption = world.parse_caption("three crosses")
    assert (caption.category, caption.things, caption.count) == ("counting", (world.Thing("cross"),), 3)

    caption = world.parse_caption("a circle above a triangle on a light background")
    assert (caption.category, caption.relation, caption.ground) == ("position", "above", "light")


@pytest.mark.parametrize("text", ["", "a dog", "a red hexagon", "five circles", "a circle left of a circle"])
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="not a prompt of the shapes world"):
        world.parse_caption(text)


def test_pictures():
    captions, pictures = world.sample_pictures(60, np.random.default_rng(0))
    assert len(captions) == 60
    assert pictures.shape == (60, 32, 32, 3)
    assert pictures.dtype == np.float32
    assert 0 <= pictures.min() < pictures.max() <= 1
    assert {world.parse_caption(text).category for text in captions} == set(world.CATEGORIES)
    grey = pictures.max(-1) - pictures.min(-1) < 0.1
    assert (grey.mean((1, 2)) > 0.3).all()  # things on a ground


def test_drawing_is_reproducible():
    captions, pictures = world.sample_pictures(20, np.random.default_rng(1), split="test", wrong=0.5)
    again = world.sample_pictures(20, np.random.default_rng(1), split="test", wrong=0.5)
    assert again[0] == captions
    np.testing.assert_array_equal(again[1], pictures)
    other = world.sample_pictures(20, np.random.default_rng(2), split="test", wrong=0.5)
    assert other[0] != captions

    one = [world.parse_caption("a circle")] * 2
    first, second = world.draw(one, np.random.default_rng(3))
    assert not np.array_equal(first, second)  # the caption leaves place, size, colour and ground open


def test_split_of_the_pictures():
    captions, _ = world.sample_pictures(50, np.random.default_rng(0), split="test")
    assert set(captions) <= {caption.text for caption in world.captions_of("test")}


def test_wrong_captions_differ_in_one_respect():
    rng = np.random.default_rng(0)
    for caption in world.captions_of("train")[::20]:
        wrong = world.misdescribe(caption, rng)
        before = [caption.count, caption.relation, caption.ground, *vars(caption.things[0]).values()]
        after = [wrong.count, wrong.relation, wrong.ground, *vars(wrong.things[0]).values()]
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        assert wrong.things[1:] == caption.things[1:]
