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


def test_every_sentence_is_understood():
    for text, caption in world.all_captions().items():
        assert world.parse_caption(text) == caption
        assert caption.text == text


def test_parts_of_a_sentence():
    things = (world.Thing("circle", "red"), world.Thing("square", "blue"))
    caption = world.Caption("color_attr", things, ground="dark")
    assert world.parse_caption("A red circle and a blue square on a dark background.") == caption
    assert world.parse_caption("three crosses") == world.Caption("counting", (world.Thing("cross"),), count=3)
    caption = world.parse_caption("a circle above a triangle on a light background")
    assert (caption.category, caption.relation, caption.ground) == ("position", "above", "light")


@pytest.mark.parametrize("text", ["", "a dog", "a red hexagon", "five circles", "a circle left of a circle"])
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="shapes_prompts"):
        world.parse_caption(text)
