"""
The shapes world: captions in GenEval's six categories, and what its pictures are made of.

A picture is 32x32 RGB: one to four flat shapes on a gray gradient. A caption is one of about 1,700 sentences of a
small grammar. `examples/shapes_pictures.py` draws pictures that show what captions say.
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
SIZE_THRESHOLD = 11.25  # pixels; where the verifier parts small from large


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
    The demands of a sentence on a picture. `things` has one entry, or two when the sentence names two; `count` is the
    number of the first thing. `relation` says where the first thing is, seen from the second.
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
    """The demands of a prompt. Raises `ValueError` when `text` is not one of the sentences of [`all_captions`]."""
    caption = all_captions().get(" ".join(text.lower().split()).rstrip("."))
    if caption is None:
        raise ValueError(f"{text!r} is not of the shapes world: use prompts of `slas_trl.shapes.shapes_prompts`.")
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
    for category in CATEGORIES:
        captions = [caption for caption in captions_of("train") if caption.category == category]
        order = np.concatenate([rng.permutation(len(captions)) for _ in range(-(-number // len(captions)))])
        chosen += [captions[i] for i in order[:number]]
    return chosen


def coverage(shape: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """
    How much of each pixel a shape covers, from its signed distance: `shape` and `radius` are `(N,)`, `x` and `y` are
    pixel centers relative to the shape's center, broadcastable to `(N, H, W)`; returns float32 `(N, H, W)` in [0, 1].
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
