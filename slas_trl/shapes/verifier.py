"""
The exact judge of the shapes world: what a picture shows, and whether that is what its caption says.

    find     colored pixels -> one of six hues -> connected components -> the shape whose template fits best
    verify   a caption's demands, one by one: things, colors, sizes, number, relation, ground, and nothing else

The rules are those of GenEval (https://huggingface.co/papers/2310.11513), whose detector is replaced by a segmentation
made for the flat shapes of this world. Where we depart from it: GenEval looks at the most confident detections, we ask
whether any of the things found fit; and sizes and grounds are demands that it does not have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image
from scipy import ndimage

from ..images import to_rgb
from . import world


COLORED = 80  # 8-bit levels of max - min channel; flat colors have 204 to 255, a pixel on an edge its share of that
MIN_AREA = 10  # pixels; smaller components are specks, which are no things
IOU_THRESHOLD = 0.70  # with the best template, below which a component has no shape
MAX_ASPECT = 1.5  # of a bounding box, beyond which no template reaches the threshold
MIN_SIDE, MAX_SIDE = 6, 20  # pixels, longer side of a box; the world's have 8 to 16, and a flooded canvas is no square
POSITION_MARGIN = 0.1  # share of the two extents that an offset must exceed before it counts; GenEval's
# A bounding box of whole pixels leaves a shape's place and radius open by about half a pixel (all in pixels).
_SHIFTS = (-1 / 3, 0.0, 1 / 3)
_RADII = (-0.4, -0.1, 0.2)
_NEIGHBORS = ndimage.generate_binary_structure(2, 1)  # four of them


@dataclass(frozen=True, slots=True)
class Found:
    """A thing seen in a picture. Coordinates are in pixels of the 32x32 picture, x to the right and y down."""

    shape: str | None  # one of `world.SHAPES`; `None` for a component that resembles none of them
    color: str  # one of `world.COLORS`
    box: tuple[int, int, int, int]  # left, top, right and bottom edge
    center: tuple[float, float]  # of the box
    area: int  # number of pixels

    @property
    def size(self) -> str:
        """`"small"` or `"large"`, from the longer side of the box."""
        left, top, right, bottom = self.box
        return world.SIZES[max(right - left, bottom - top) > world.SIZE_THRESHOLD]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict of [`verify`] on one picture."""

    category: str  # GenEval category of the prompt, one of `world.CATEGORIES`
    # How far each is met, in [0, 1], such as {"circle": 1.0, "circle is red": 0.0, "nothing else": 1.0}.
    demands: dict[str, float]

    @property
    def lenient(self) -> bool:
        """GenEval's own rule: what was asked for is there, in the exact number where a number is asked for."""
        return all(met == 1 for demand, met in self.demands.items() if demand != "nothing else")

    @property
    def strict(self) -> bool:
        """`lenient`, and nothing else is there."""
        return all(met == 1 for met in self.demands.values())

    @property
    def graded(self) -> float:
        """Share of the demands that are met, in [0, 1]; 1 if and only if `strict`."""
        return sum(self.demands.values()) / len(self.demands)


def to_pixels(pictures: Sequence[Image.Image]) -> np.ndarray:
    """
    N images of any mode and size, resized to 32x32, as the verifier works on them: `(N, 32, 32, 3)`, uint8. Raises
    `TypeError` for what is no PIL image.
    """
    side = world.RESOLUTION
    pixels = np.empty((len(pictures), side, side, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        if not isinstance(picture, Image.Image):
            raise TypeError(f"Expected PIL images, got a {type(picture).__name__}. Sample with output_type='pil'.")
        if picture.size != (side, side):
            picture = to_rgb(picture).resize((side, side), Image.Resampling.BOX)
        pixels[i] = np.asarray(picture if picture.mode == "RGB" else to_rgb(picture))
    return pixels


def colored(pixels: np.ndarray) -> np.ndarray:
    """Which of the pixels `(N, 32, 32, 3)`, uint8, are colored rather than gray: bool `(N, 32, 32)`."""
    return _chroma(pixels) >= COLORED


def _chroma(pixels: np.ndarray) -> np.ndarray:
    r, g, b = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    return np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b)


def _hues(rgb: np.ndarray) -> np.ndarray:
    """Index into `world.COLORS` of the nearest hue, for colored pixels `(K, 3)`."""
    rgb = rgb.astype(np.int16)
    high, low = rgb.max(1), rgb.min(1)
    middle = rgb.sum(1) - high - low
    # Red, green and blue are the even indices. Within 30 degrees of them the middle channel is nearer to the lowest;
    # elsewhere the hue is the complement of the lowest: no red is cyan, no green is purple, no blue is yellow.
    return np.where(2 * middle < high + low, 2 * rgb.argmax(1), (2 * rgb.argmin(1) + 3) % 6)


@lru_cache(maxsize=256)
def _templates(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Every shape as it may look in a bounding box of that size: coverage `(4 * V, height * width)`, and the area of each
    `(4 * V,)`, what lies outside of the box included; the V variants of a shape are next to each other.
    """
    pad = 2
    variants = np.array(list(product(_SHIFTS, _SHIFTS, _RADII)))
    x = np.arange(-pad, width + pad)[None, None, :] + 0.5 - width / 2 - variants[:, 0, None, None]
    y = np.arange(-pad, height + pad)[None, :, None] + 0.5 - height / 2 - variants[:, 1, None, None]
    # Not stretched to the box: an ellipse is no circle.
    radius = (height + width) / 4 + variants[:, 2]
    masks = np.concatenate([world.coverage(np.full(len(variants), i), x, y, radius) for i in range(len(world.SHAPES))])
    # The components end at pixels that are about 0.35 covered.
    masks *= masks >= 0.4
    inside = masks[:, pad:-pad, pad:-pad].reshape(len(masks), -1)
    return np.ascontiguousarray(inside), masks.sum((1, 2))


def _shape(coverage: np.ndarray) -> str | None:
    """The shape whose template fits a component `(H, W)` that fills its box best, if any does."""
    height, width = coverage.shape
    longer = max(height, width)
    if not MIN_SIDE <= longer <= MAX_SIDE or longer > MAX_ASPECT * min(height, width):
        return None
    masks, areas = _templates(height, width)
    # IoU of soft masks: sum of minima over sum of maxima. Soft, because an 8-pixel circle and an 8-pixel square differ
    # in little more than the coverage of a few pixels at the corners.
    intersection = np.minimum(coverage.reshape(1, -1), masks).sum(1)
    iou = intersection / (coverage.sum() + areas - intersection)
    best = int(iou.argmax())
    return world.SHAPES[best * len(world.SHAPES) // len(masks)] if iou[best] >= IOU_THRESHOLD else None


def find(pixels: np.ndarray) -> list[list[Found]]:
    """The things in each of the pictures `(N, 32, 32, 3)`, uint8: the largest first, without specks."""
    chroma = _chroma(pixels)
    hue = np.full(chroma.shape, -1)
    hue[chroma >= COLORED] = _hues(pixels[chroma >= COLORED])
    return [_find(*planes) for planes in zip(chroma, hue, strict=True)]


def _find(chroma: np.ndarray, hue: np.ndarray) -> list[Found]:
    """In one picture, from the chroma of its pixels and the index of their color, -1 without one, both `(32, 32)`."""
    found = []
    for color in np.flatnonzero(np.bincount(hue[hue >= 0]) >= MIN_AREA).tolist():
        labels, _ = ndimage.label(hue == color, _NEIGHBORS)  # type: ignore[misc]
        boxes, areas = ndimage.find_objects(labels), np.bincount(labels.ravel())
        for number in (1 + np.flatnonzero(areas[1:] >= MIN_AREA)).tolist():
            box = y, x = boxes[number - 1]
            component = labels[box] == number
            levels = chroma[box][component]
            # The flat color is that of the 90th percentile: a pixel's share of it is how much of the pixel is covered.
            flat = np.float32(np.sort(levels)[int(0.9 * (len(levels) - 1))])
            shape = _shape(np.where(component, np.minimum(1, chroma[box] / flat), 0))
            edges = x.start, y.start, x.stop, y.stop
            center = (x.start + x.stop) / 2, (y.start + y.stop) / 2
            found.append(Found(shape, world.COLORS[color], edges, center, len(levels)))
    return sorted(found, key=lambda thing: -thing.area)


def _grounds(pixels: np.ndarray) -> list[str | None]:
    """Ground of each picture, from the mean of its pixels that are not colored; `None` without any."""
    grays = [picture[mask] for picture, mask in zip(pixels, ~colored(pixels), strict=True)]
    return [world.GROUNDS[int(gray.mean() > 127.5)] if len(gray) else None for gray in grays]


def relations(a: Found, b: Found) -> set[str]:
    """
    Where `a` is, seen from `b`, by GenEval's rule: offsets of the centers, less a tenth of the two extents, must be
    more than half of the distance. None, one or two of `world.RELATIONS`.
    """
    dx, dy = a.center[0] - b.center[0], a.center[1] - b.center[1]
    distance = (dx * dx + dy * dy) ** 0.5
    extent_x = (a.box[2] - a.box[0]) + (b.box[2] - b.box[0])
    extent_y = (a.box[3] - a.box[1]) + (b.box[3] - b.box[1])
    held = set()
    if abs(dx) - POSITION_MARGIN * extent_x > distance / 2:
        held.add("left of" if dx < 0 else "right of")
    if abs(dy) - POSITION_MARGIN * extent_y > distance / 2:
        held.add("above" if dy < 0 else "below")
    return held


def _demands_of_thing(thing: world.Thing, found: Found | None) -> dict[str, float]:
    demands = {thing.shape: float(found is not None)}
    if thing.color:
        demands[f"{thing.shape} is {thing.color}"] = float(found is not None and found.color == thing.color)
    if thing.size:
        demands[f"{thing.shape} is {thing.size}"] = float(found is not None and found.size == thing.size)
    return demands


def _judge(caption: world.Caption, found: list[Found], ground: str | None) -> Verdict:
    # For each named thing the found ones that it may be: those of its shape, or none at all.
    choices = [[f for f in found if f.shape == thing.shape] or [None] for thing in caption.things]
    demands: dict[str, float] = {}
    for chosen in product(*choices):  # shapes differ, so no found thing can stand for two
        met: dict[str, float] = {}
        for thing, f in zip(caption.things, chosen, strict=True):
            met |= _demands_of_thing(thing, f)
        if caption.relation:
            first, second = chosen
            met[caption.relation] = float(bool(first and second and caption.relation in relations(first, second)))
        if not demands or sum(met.values()) > sum(demands.values()):
            demands = met
    there = sum(choice != [None] for choice in choices)
    if caption.count > 1:
        there = len([f for f in choices[0] if f])  # every thing of the shape is one of those that are counted
        demands["count"] = max(0.0, 1 - abs(there - caption.count) / caption.count)
    if caption.ground:
        demands[f"{caption.ground} background"] = float(ground == caption.ground)
    # An empty picture, or one of other things, shows nothing else only because it shows nothing.
    demands["nothing else"] = float(0 < there == len(found))
    return Verdict(caption.category, demands)


def verify(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Verdict]:
    """
    Judge N pictures, of any size, by what their prompts, sentences of [`world.all_captions`], demand.

    The demands: each named thing's presence, its color and its size if it has one, the number if it is not one
    (`1 - |found - n| / n`, at least 0), the relation, the ground, and that there is nothing else, which is met only
    when at least one of the things asked for is there. Found things stand for named ones so that most demands are met.
    Raises `ValueError` for a prompt of another world, and for numbers of prompts and images that differ.
    """
    if len(prompts) != len(images):
        raise ValueError(f"Expected a prompt for each image, got {len(prompts)} prompts and {len(images)} images.")
    captions, pixels = [world.parse_caption(prompt) for prompt in prompts], to_pixels(images)
    return [_judge(*each) for each in zip(captions, find(pixels), _grounds(pixels), strict=True)]
