"""
The shapes world: captions in GenEval's six categories, and pictures that show what they say.

A picture is 32x32 RGB: one to four flat shapes on a grey gradient. A caption is one of about 1,700 sentences of a
small grammar. Everything is drawn from an explicit `numpy.random.Generator`, a whole batch at a time.

The six categories and their rules follow GenEval (https://huggingface.co/papers/2310.11513).
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product

import numpy as np


RESOLUTION = 32  # pixels
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = ("red", "yellow", "green", "cyan", "blue", "purple")  # hues 0, 60, ..., 300 degrees, in this order
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
GROUNDS = ("dark", "light")
COUNT_WORDS = ("a", "two", "three", "four")
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("train", "test")

MAX_THINGS = 4
GAP = 2.0  # pixels of background between any two things
SMALL_DIAMETER = (8.0, 10.0)  # pixels
LARGE_DIAMETER = (12.5, 14.0)  # pixels
SIZE_THRESHOLD = 11.25  # pixels; where the verifier parts small from large
# Largest diameter of a thing of unspecified size, by the number of things in the picture (pixels).
_MAX_DIAMETER = {1: 15.0, 2: 13.0, 3: 10.5, 4: 9.0}


@dataclass(frozen=True)
class Thing:
    """One noun phrase. `None` means that the caption leaves it open."""

    shape: str
    color: str | None = None
    size: str | None = None

    def words(self, plural: bool = False) -> str:
        noun = (self.shape + ("es" if self.shape == "cross" else "s")) if plural else self.shape
        return " ".join(word for word in (self.size, self.color, noun) if word)


@dataclass(frozen=True)
class Caption:
    """
    What a sentence demands of a picture.

    `things` has one entry, or two when the sentence names two; `count` is the number of the first thing. `relation`
    says where the first thing is, seen from the second.
    """

    category: str
    things: tuple[Thing, ...]
    count: int = 1
    relation: str | None = None
    ground: str | None = None

    @property
    def text(self) -> str:
        first = f"{COUNT_WORDS[self.count - 1]} {self.things[0].words(plural=self.count > 1)}"
        if self.relation:
            first += f" {self.relation} a {self.things[1].words()}"
        elif len(self.things) == 2:
            first += f" and a {self.things[1].words()}"
        return first + (f" on a {self.ground} background" if self.ground else "")


@cache
def all_captions() -> dict[str, Caption]:
    """Every sentence of the grammar, keyed by its text."""
    pairs = list(permutations(SHAPES, 2))
    any_size = (None, *SIZES)
    bodies: list[Caption] = []
    bodies += [Caption("single_object", (Thing(s, size=z),)) for s, z in product(SHAPES, any_size)]
    bodies += [
        Caption("two_object", (Thing(a, size=y), Thing(b, size=z)))
        for (a, b), y, z in product(pairs, any_size, any_size)
    ]
    bodies += [Caption("counting", (Thing(s),), count=n) for s, n in product(SHAPES, (2, 3, 4))]
    bodies += [Caption("colors", (Thing(s, c),)) for s, c in product(SHAPES, COLORS)]
    bodies += [Caption("position", (Thing(a), Thing(b)), relation=r) for (a, b), r in product(pairs, RELATIONS)]
    bodies += [
        Caption("color_attr", (Thing(a, c), Thing(b, d))) for (a, b), (c, d) in product(pairs, permutations(COLORS, 2))
    ]
    captions = [replace(body, ground=ground) for body, ground in product(bodies, (None, *GROUNDS))]
    return {caption.text: caption for caption in captions}


def parse_caption(text: str) -> Caption:
    """
    The demands of a prompt of this world.

    Raises:
        `ValueError`: when `text` is not one of the sentences of [`all_captions`].
    """
    caption = all_captions().get(" ".join(text.lower().split()).rstrip("."))
    if caption is None:
        raise ValueError(
            f"{text!r} is not a prompt of the shapes world, so its pictures cannot be verified. Use prompts such as "
            "'a red circle and a blue square on a dark background', from `slas_trl.shapes.shapes_prompts`."
        )
    return caption


def _meaning(caption: Caption) -> tuple:
    """Equal for two sentences that say the same thing, so that they fall into the same split."""
    things, relation = caption.things, caption.relation
    if len(things) == 2 and things[0].shape > things[1].shape:
        things = things[::-1]
        opposite = ("right of", "left of", "below", "above")
        relation = opposite[RELATIONS.index(relation)] if relation else None
    return caption.category, things, caption.count, relation, caption.ground


@cache
def captions_of(split: str) -> tuple[Caption, ...]:
    """
    The captions of a split: of each category a third of the meanings, at most 24, is "test"; no two sentences of
    different splits mean the same.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, but it is {split!r}.")
    rng = np.random.default_rng(20260101)
    chosen: list[Caption] = []
    for category in CATEGORIES:
        by_meaning: dict[tuple, list[Caption]] = {}
        for caption in all_captions().values():
            if caption.category == category:
                by_meaning.setdefault(_meaning(caption), []).append(caption)
        meanings = list(by_meaning)
        held_out = set(rng.permutation(len(meanings))[: min(24, len(meanings) // 3)].tolist())
        for i, meaning in enumerate(meanings):
            if split == "train" and i not in held_out:
                chosen += by_meaning[meaning]
            elif split == "test" and i in held_out:
                chosen.append(by_meaning[meaning][0])  # one sentence for each held-out meaning
    return tuple(chosen)


def balanced_captions(number: int) -> list[Caption]:
    """`number` training captions of each category: all of them, as often as needed, or a fixed sample."""
    rng = np.random.default_rng(20260102)
    chosen: list[Caption] = []
    for captions in _by_category("train"):
        order = np.concatenate([rng.permutation(len(captions)) for _ in range(-(-number // len(captions)))])
        chosen += [captions[i] for i in order[:number]]
    return chosen


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

    # Grey gradient: a level by the ground, and a slope in a random direction.
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


def coverage(shape: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """
    How much of each pixel a shape covers, from its signed distance: `shape` and `radius` are `(N,)`, `x` and `y` are
    pixel centres relative to the shape's centre, broadcastable to `(N, H, W)`; returns float32 `(N, H, W)` in [0, 1].
    """
    r = radius[:, None, None].astype(np.float32)
    x, y = x.astype(np.float32), y.astype(np.float32)
    ax, ay = np.abs(x), np.abs(y)
    arm = 0.36 * r
    circle = np.sqrt(x * x + y * y) - r
    square = np.maximum(ax, ay) - r
    # Upright, as wide and as high as its box: the slanted side goes through (0, -r) and (r, r).
    triangle = np.maximum((2 * ax - y - r) / np.sqrt(5.0), y - r)
    cross = np.minimum(np.maximum(ax - r, ay - arm), np.maximum(ax - arm, ay - r))
    distance = np.choose(shape[:, None, None], np.broadcast_arrays(circle, square, triangle, cross))
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)


def _place(captions, number, diameter, rng) -> np.ndarray:
    """Centres `(N, 4, 2)` such that nothing overlaps or leaves the picture, and the relation holds; by rejection."""
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
    """Fully saturated colours: degrees `(...)` to RGB `(..., 3)` in [0, 1]."""
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
