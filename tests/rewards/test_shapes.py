from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from examples.shapes_pictures import draw, sample_pictures
from slas_trl import shapes
from slas_trl.rewards import shapes_clip, shapes_coloured_area, shapes_verifier, shapes_verifier_strict
from slas_trl.rewards.resolve import resolve_reward
from slas_trl.shapes import world
from slas_trl.shapes.verifier import verify


PIXELS = ["brightness", "incompressibility", "jpeg_compressibility"]
ALL = ["shapes_verifier", "shapes_verifier_strict", "shapes_clip", "shapes_coloured_area", *PIXELS]


def as_images(drawn: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray((picture * 255).round().astype(np.uint8)) for picture in drawn]


def pictures(n: int, wrong: float = 0.0) -> tuple[list[str], list[Image.Image]]:
    prompts, drawn = sample_pictures(n, np.random.default_rng(0), split="test", wrong=wrong)
    return prompts, as_images(drawn)


@pytest.mark.parametrize("name", ALL)
def test_every_reward_is_called_alike(name):
    prompts, images = pictures(5)
    reward = resolve_reward(name)
    scores = reward(prompts=prompts, images=images)
    assert len(scores) == 5 and all(type(score) is float for score in scores)
    # The trainer passes whatever else it has, among it the images under TRL's name.
    assert reward(prompts, images, completions=images, category=["colors"] * 5, trainer_state=None) == scores
    assert reward([], []) == []


def test_verifier_rewards():
    prompts, images = pictures(60, wrong=0.5)
    verdicts = verify(prompts, images)
    assert shapes_verifier(prompts, images) == [verdict.graded for verdict in verdicts]
    strict = shapes_verifier_strict(prompts, images)
    assert strict == [float(verdict.strict) for verdict in verdicts]
    assert set(strict) == {0.0, 1.0}
    for reward in (shapes_verifier, shapes_verifier_strict):
        with pytest.raises(ValueError, match="a dog"):
            reward(["a dog"], images[:1])


def test_coloured_area():
    image = Image.new("RGB", (32, 32), (90, 90, 90))
    assert shapes_coloured_area(["a dog"], [image]) == [0.0]
    image.paste((230, 0, 0), (0, 0, 8, 32))
    assert shapes_coloured_area(["a dog"], [image]) == [0.25]
    assert shapes_coloured_area(["a dog"], [image.resize((256, 256), Image.Resampling.NEAREST)]) == [0.25]


def preferred(captions: list[world.Caption], others: list[world.Caption]) -> float:
    """How often the encoder prefers a picture's own caption to the other one; 0.5 is chance."""
    images = as_images(draw(captions, np.random.default_rng(0)))
    own = np.array(shapes_clip([caption.text for caption in captions], images))
    return float(np.mean(own > np.array(shapes_clip([caption.text for caption in others], images))))


def test_clip_is_a_cosine():
    prompts, images = pictures(300)  # more than one batch
    scores = shapes_clip(prompts, images)
    assert all(-1 - 1e-5 <= score <= 1 + 1e-5 for score in scores)
    assert np.std(scores) > 0.01
    # A score depends on its own row only.
    np.testing.assert_allclose(shapes_clip(prompts[::-1], images[::-1])[::-1], scores, atol=1e-5)
    np.testing.assert_allclose(shapes_clip(prompts[7:8], images[7:8]), scores[7:8], atol=1e-5)
    assert shapes_clip(["words it has never seen, and more of them than it can read at once"], images[:1])[0] < 1


def recolored(caption: world.Caption, *colors: str | None) -> world.Caption:
    things = zip(caption.things, colors, strict=True)
    return replace(caption, things=tuple(replace(thing, color=color) for thing, color in things))


NEXT = dict(zip(world.COLORS, (*world.COLORS[1:], world.COLORS[0]), strict=True))
OPPOSITE = dict(zip(world.RELATIONS, ("right of", "left of", "below", "above"), strict=True))


@pytest.mark.parametrize(
    ("category", "other", "low", "high"),
    [
        ("colors", lambda c: recolored(c, NEXT[c.things[0].color]), 0.9, 1.01),
        # It hardly binds: whose color it is, and who is on which side, it does not see well.
        ("color_attr", lambda c: recolored(c, *(thing.color for thing in c.things[::-1])), 0.45, 0.7),
        ("position", lambda c: replace(c, relation=OPPOSITE[c.relation]), 0.4, 0.6),
    ],
)
def test_clip_prefers_the_right_caption(category, other, low, high):
    captions = [caption for caption in world.captions_of("test") if caption.category == category] * 10
    assert low < preferred(captions, [other(caption) for caption in captions]) < high


def test_clip_comes_with_the_package(monkeypatch, tmp_path, capfd, caplog):
    """Offline and silent; and without its weights, an error."""
    from slas_trl.rewards.shapes import _encoder

    monkeypatch.setattr("socket.socket.connect", None)
    _encoder.cache_clear()
    shapes_clip(*pictures(2))
    assert not caplog.records and capfd.readouterr() == ("", "")
    _encoder.cache_clear()
    monkeypatch.setattr(shapes, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="pretrain_shapes"):
        shapes_clip(*pictures(1))
