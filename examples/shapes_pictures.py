"""Pictures of the shapes world that show what their captions say, drawn a whole batch at a time for pretraining."""

from dataclasses import replace
from functools import cache

import numpy as np

from slas_trl.shapes.world import (
    CATEGORIES,
    COLORS,
    GROUNDS,
    RELATIONS,
    RESOLUTION,
    SHAPES,
    SIZES,
    Caption,
    captions_of,
    coverage,
)


MAX_THINGS = 4
GAP = 2.0  # pixels of background between any two things
SMALL_DIAMETER = (8.0, 10.0)  # pixels
LARGE_DIAMETER = (12.5, 14.0)  # pixels
# Largest diameter of a thing of unspecified size, by the number of things in the picture (pixels).
_MAX_DIAMETER = {1: 15.0, 2: 13.0, 3: 10.5, 4: 9.0}


def misdescribe(caption: Caption, rng: np.random.Generator) -> Caption:
    """`caption` with one demand changed for another: the noise of captions from the web."""
    first, *rest = caption.things

    def other(options, current):
        return options[rng.choice([i for i, option in enumerate(options) if option != current])]

    changes = [replace(caption, things=(replace(first, shape=other(SHAPES, first.shape)), *rest))]
    if first.color:
        changes.append(replace(caption, things=(replace(first, color=other(COLORS, first.color)), *rest)))
    if first.size:
        changes.append(replace(caption, things=(replace(first, size=other(SIZES, first.size)), *rest)))
    if caption.relation:
        changes.append(replace(caption, relation=other(RELATIONS, caption.relation)))
    if caption.count > 1:
        changes.append(replace(caption, count=other((2, 3, 4), caption.count)))
    if caption.ground:
        changes.append(replace(caption, ground=other(GROUNDS, caption.ground)))
    return changes[rng.integers(len(changes))]


def draw(captions: list[Caption], rng: np.random.Generator) -> np.ndarray:
    """
    One picture for each caption, with everything that the caption leaves open drawn at random.

    Returns:
        `np.ndarray`: `(N, 32, 32, 3)`, float32 in [0, 1].
    """
    n = len(captions)
    number = np.array([c.count if len(c.things) == 1 else 2 for c in captions])
    shape = np.zeros((n, MAX_THINGS), dtype=np.int64)
    color = rng.integers(len(COLORS), size=(n, MAX_THINGS))
    low = np.full((n, MAX_THINGS), SMALL_DIAMETER[0])
    high = np.repeat(np.array([_MAX_DIAMETER[k] for k in number.tolist()])[:, None], MAX_THINGS, axis=1)
    for i, caption in enumerate(captions):
        things = caption.things * caption.count
        for j, thing in enumerate(things):
            shape[i, j] = SHAPES.index(thing.shape)
            if thing.color:
                color[i, j] = COLORS.index(thing.color)
            if thing.size:
                low[i, j], high[i, j] = SMALL_DIAMETER if thing.size == "small" else LARGE_DIAMETER
    diameter = rng.uniform(low, high)
    center = _place(captions, number, diameter, rng)

    # Gray gradient: a level by the ground, and a slope in a random direction.
    level = np.array([{"dark": 0.22, "light": 0.78, None: 0.5}[c.ground] for c in captions])
    spread = np.array([0.45 if c.ground is None else 0.14 for c in captions])
    level = level + spread * rng.uniform(-1, 1, size=n)
    angle, slope = rng.uniform(0, 2 * np.pi, size=n), rng.uniform(0, 0.12, size=n)
    axis = (np.arange(RESOLUTION) + 0.5).astype(np.float32)
    unit = axis / RESOLUTION - 0.5
    ramp = np.cos(angle)[:, None, None] * unit[None, None, :] + np.sin(angle)[:, None, None] * unit[None, :, None]
    picture = np.clip(level[:, None, None] + 2 * slope[:, None, None] * ramp, 0, 1)[..., None].repeat(3, axis=-1)
    picture = picture.astype(np.float32)

    hue = (60.0 * color + rng.uniform(-8, 8, size=color.shape)) % 360
    rgb = _hue_to_rgb(hue) * rng.uniform(0.8, 1.0, size=color.shape)[..., None]
    for j in range(MAX_THINGS):
        rows = np.flatnonzero(number > j)
        if not len(rows):
            break
        x = axis[None, None, :] - center[rows, j, 0, None, None]
        y = axis[None, :, None] - center[rows, j, 1, None, None]
        alpha = coverage(shape[rows, j], x, y, diameter[rows, j] / 2)[..., None]
        picture[rows] = picture[rows] * (1 - alpha) + rgb[rows, j, None, None, :].astype(np.float32) * alpha
    return picture


def _place(captions, number, diameter, rng) -> np.ndarray:
    """Centers `(N, 4, 2)` such that nothing overlaps or leaves the picture, and the relation holds; by rejection."""
    n = len(captions)
    used = np.arange(MAX_THINGS)[None, :] < number[:, None]
    relation = np.array([RELATIONS.index(c.relation) if c.relation else -1 for c in captions])
    center = np.zeros((n, MAX_THINGS, 2))
    todo = np.arange(n)
    for _ in range(20_000):
        half = diameter[todo][..., None] / 2
        trial = rng.uniform(half + 0.5, RESOLUTION - half - 0.5, size=(len(todo), MAX_THINGS, 2))
        delta = trial[:, :, None] - trial[:, None, :]
        need = half + half.transpose(0, 2, 1) + GAP
        pair = used[todo][:, :, None] & used[todo][:, None, :] & ~np.eye(MAX_THINGS, dtype=bool)
        good = ~((np.abs(delta).max(-1) < need) & pair).any((1, 2))
        dx, dy = delta[:, 0, 1, 0], delta[:, 0, 1, 1]
        sideways, upright = np.abs(dx) > 1.2 * np.abs(dy), np.abs(dy) > 1.2 * np.abs(dx)
        holds = np.stack([sideways & (dx < 0), sideways & (dx > 0), upright & (dy < 0), upright & (dy > 0)], axis=1)
        rel = relation[todo]
        good &= (rel < 0) | np.take_along_axis(holds, np.maximum(rel, 0)[:, None], axis=1)[:, 0]
        center[todo[good]] = trial[good]
        todo = todo[~good]
        if not len(todo):
            return center
    raise RuntimeError(f"No room for {captions[todo[0]].text!r} after 20000 tries; the sizes do not fit the picture.")


def _hue_to_rgb(hue: np.ndarray) -> np.ndarray:
    """Fully saturated colors: degrees `(...)` to RGB `(..., 3)` in [0, 1]."""
    k = (np.array([5.0, 3.0, 1.0]) + hue[..., None] / 60.0) % 6
    return 1 - np.clip(np.minimum(k, 4 - k), 0, 1)


def sample_pictures(
    n: int, rng: np.random.Generator, split: str = "train", wrong: float = 0.0
) -> tuple[list[str], np.ndarray]:
    """
    Draw `n` captioned pictures, the six categories equally often.

    Args:
        n (`int`): number of pictures.
        rng (`np.random.Generator`): source of all randomness.
        split (`str`, *optional*, defaults to `"train"`): which captions to use, `"train"` or `"test"`.
        wrong (`float`, *optional*, defaults to `0.0`): share of captions that are wrong in one respect.

    Returns:
        `tuple[list[str], np.ndarray]`: captions, and pictures `(n, 32, 32, 3)`, float32 in [0, 1].
    """
    by_category = _by_category(split)
    category = rng.integers(len(CATEGORIES), size=n)
    said = [by_category[k][rng.integers(len(by_category[k]))] for k in category.tolist()]
    noisy = rng.random(n) < wrong
    shown = [misdescribe(c, rng) if bad else c for c, bad in zip(said, noisy.tolist(), strict=True)]
    return [c.text for c in said], draw(shown, rng)


@cache
def _by_category(split: str) -> tuple[tuple[Caption, ...], ...]:
    return tuple(tuple(c for c in captions_of(split) if c.category == name) for name in CATEGORIES)
