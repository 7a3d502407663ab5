"""
The exact judge of the shapes world: what a picture shows, and whether that is what its caption says.

    find     coloured pixels -> one of six hues -> connected components -> the shape whose template fits best
    verify   a caption's demands, one by one: things, colours, sizes, number, relation, ground, and nothing else

The rules are those of GenEval (https://huggingface.co/papers/2310.11513), whose detector is replaced by a segmentation
made for the flat shapes of this world. Where we depart from it: GenEval looks at the most confident detections, we ask
whether any of the things found fit; and sizes and grounds are demands that it does not have.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from slas_trl.images import to_rgb

from . import world


COLOURED = 80  # 8-bit levels of max - min channel; flat colours have 204 to 255, a pixel on an edge its share of that
MIN_AREA = 10  # pixels; smaller components are specks, which are no things
IOU_THRESHOLD = 0.70  # with the best template, below which a component has no shape
MAX_ASPECT = 1.5  # of a bounding box, beyond which no template reaches the threshold
MIN_SIDE, MAX_SIDE = 6, 20  # pixels, longer side of a box; the world's have 8 to 16, and a flooded canvas is no square
POSITION_MARGIN = 0.1  # share of the two extents that an offset must exceed before it counts; GenEval's
# A bounding box of whole pixels leaves a shape's place and radius open by about half a pixel (all in pixels).
_SHIFTS = (-1 / 3, 0.0, 1 / 3)
_RADII = (-0.4, -0.1, 0.2)
_CHUNK = 500  # pictures at a time, which bounds memory
_CONNECTED = np.zeros((3, 3, 3), dtype=bool)  # four neighbours in the plane, none in the next plane
_CONNECTED[1] = ndimage.generate_binary_structure(2, 1)


@dataclass(frozen=True, slots=True)
class Found:
    """
    A thing seen in a picture. Coordinates are in pixels of the 32x32 picture, x to the right and y down.

    Attributes:
        shape (`str` or `None`): one of `world.SHAPES`; `None` for a component that resembles none of them.
        color (`str`): one of `world.COLORS`.
        box (`tuple[int, int, int, int]`): left, top, right and bottom edge.
        center (`tuple[float, float]`): of the box.
        area (`int`): number of pixels.
    """

    shape: str | None
    color: str
    box: tuple[int, int, int, int]
    center: tuple[float, float]
    area: int

    @property
    def size(self) -> str:
        """`"small"` or `"large"`, from the longer side of the box."""
        left, top, right, bottom = self.box
        return world.SIZES[max(right - left, bottom - top) > world.SIZE_THRESHOLD]


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What [`verify`] says of one picture.

    Attributes:
        category (`str`): GenEval category of the prompt, one of `world.CATEGORIES`.
        demands (`dict[str, float]`):
            How far each demand of the prompt is met, in [0, 1], such as `{"circle": 1.0, "circle is red": 0.0,
            "nothing else": 1.0}`.
    """

    category: str
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


def to_pixels(pictures: Sequence[Image.Image] | np.ndarray) -> np.ndarray:
    """
    Bring pictures to what the verifier works on.

    Args:
        pictures (`Sequence[PIL.Image.Image]` or `np.ndarray`):
            Images of any mode and size, resized to 32x32; or an array `(N, 32, 32, 3)`, floating point in [0, 1].

    Returns:
        `np.ndarray`: `(N, 32, 32, 3)`, uint8. Arrays are rounded as PIL images are, so both give the same verdicts.

    Raises:
        `ValueError`: for an array of another shape, type or range.
        `TypeError`: for something that is no PIL image.
    """
    side = world.RESOLUTION
    if isinstance(pictures, np.ndarray):
        if pictures.shape[1:] != (side, side, 3) or not np.issubdtype(pictures.dtype, np.floating):
            raise ValueError(
                f"An array of pictures must have shape (N, {side}, {side}, 3) and a floating point type, but it has "
                f"shape {pictures.shape} and type {pictures.dtype}. Pass PIL images for anything else."
            )
        # Rounding errors of a decoder are fine, [-1, 1] or [0, 255] is not; NaN fails every comparison.
        if pictures.size and not (pictures.min() >= -1e-3 and pictures.max() <= 1 + 1e-3):
            raise ValueError(
                f"Pictures must lie in [0, 1], but they range from {pictures.min():.3g} to {pictures.max():.3g}. "
                "Rescale them, (x + 1) / 2 for a decoder's [-1, 1]."
            )
        return (np.clip(pictures, 0, 1) * 255).round().astype(np.uint8)
    pixels = np.empty((len(pictures), side, side, 3), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        if not isinstance(picture, Image.Image):
            raise TypeError(
                f"Picture {i} must be a PIL image, but it is a {type(picture).__name__}. Sample with "
                f"output_type='pil', or pass one array of shape (N, {side}, {side}, 3)."
            )
        if picture.size != (side, side):
            picture = to_rgb(picture).resize((side, side), Image.Resampling.BOX)
        pixels[i] = np.asarray(picture if picture.mode == "RGB" else to_rgb(picture))
    return pixels


def coloured(pixels: np.ndarray) -> np.ndarray:
    """Which of the pixels `(N, 32, 32, 3)`, uint8, are coloured rather than grey: bool `(N, 32, 32)`."""
    r, g, b = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    return np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b) >= COLOURED


def _hues(rgb: np.ndarray) -> np.ndarray:
    """Index into `world.COLORS` of the nearest hue, for coloured pixels `(K, 3)`."""
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


def _shapes(coverage: np.ndarray) -> np.ndarray:
    """Index into `world.SHAPES` of the best template, or -1, for components `(K, H, W)` that fill their boxes."""
    k, height, width = coverage.shape
    longer = max(height, width)
    if not MIN_SIDE <= longer <= MAX_SIDE or longer > MAX_ASPECT * min(height, width):
        return np.full(k, -1)
    masks, areas = _templates(height, width)
    flat = coverage.reshape(k, 1, -1)
    # IoU of soft masks: sum of minima over sum of maxima. Soft, because an 8-pixel circle and an 8-pixel square differ
    # in little more than the coverage of a few pixels at the corners.
    intersection = np.minimum(flat, masks).sum(2)
    iou = intersection / (flat.sum(2) + areas - intersection)
    iou = iou.reshape(k, len(world.SHAPES), -1).max(2)
    return np.where(iou.max(1) >= IOU_THRESHOLD, iou.argmax(1), -1)


def _find(pixels: np.ndarray) -> list[list[Found]]:
    """The things in each of the pictures `(N, 32, 32, 3)`, uint8: the largest first, without specks."""
    return [things for i in range(0, len(pixels), _CHUNK) for things in _find_chunk(pixels[i : i + _CHUNK])]


def _find_chunk(pixels: np.ndarray) -> list[list[Found]]:
    side, hues = world.RESOLUTION, len(world.COLORS)
    found: list[list[Found]] = [[] for _ in pixels]
    at = np.flatnonzero(coloured(pixels))
    rgb = pixels.reshape(-1, 3)[at]
    chroma = rgb.max(1) - rgb.min(1)
    # One plane for each hue that a picture has; labelling them together cannot connect hues or pictures.
    plane = at // side**2 * hues + _hues(rgb)
    counts = np.bincount(plane, minlength=len(pixels) * hues)
    present = np.flatnonzero(counts >= MIN_AREA)
    number = np.full(len(counts), -1)
    number[present] = np.arange(len(present))
    kept = number[plane] >= 0
    spot, chroma = number[plane[kept]] * side**2 + at[kept] % side**2, chroma[kept]
    masks = np.zeros((len(present), side, side), dtype=bool)
    masks.reshape(-1)[spot] = True
    labelled: Any = ndimage.label(masks, structure=_CONNECTED)
    labels, n = labelled

    # Area, box and flat colour of each component, from its pixels: sorted by component, then by chroma.
    component = labels.reshape(-1)[spot]
    order = np.argsort(component * 256 + chroma)
    component, spot, chroma = component[order], spot[order], chroma[order]
    area = np.bincount(component, minlength=n + 1)[1:]
    if not n:
        return found
    start = np.cumsum(area) - area
    # The flat colour is that of the 90th percentile: a pixel's share of it is how much of the pixel is covered.
    flat = chroma[start + (0.9 * (area - 1)).astype(int)]
    coverage = np.zeros(masks.shape, dtype=np.float32)
    coverage.reshape(-1)[spot] = np.minimum(1, chroma / flat[component - 1].astype(np.float32))
    y, x = spot // side % side, spot % side
    left, right = np.minimum.reduceat(x, start), np.maximum.reduceat(x, start) + 1
    top, bottom = np.minimum.reduceat(y, start), np.maximum.reduceat(y, start) + 1
    index = spot[start] // side**2  # of the component's plane

    shape = np.full(n, -1)
    things = np.flatnonzero(area >= MIN_AREA)
    box_size = (bottom - top) * (side + 1) + right - left
    by_size = things[np.argsort(box_size[things], kind="stable")]
    for group in np.split(by_size, np.flatnonzero(np.diff(box_size[by_size])) + 1):
        if not len(group):
            continue
        height, width = divmod(int(box_size[group[0]]), side + 1)
        rows = top[group][:, None, None] + np.arange(height)[None, :, None]
        columns = left[group][:, None, None] + np.arange(width)[None, None, :]
        where = index[group][:, None, None], rows, columns
        shape[group] = _shapes(coverage[where] * (labels[where] == group[:, None, None] + 1))

    names = (*world.SHAPES, None)  # -1 is the last
    picture, hue = np.divmod(present[index], hues)
    columns = (a[things].tolist() for a in (picture, shape, hue, left, top, right, bottom, area))
    for i, s, h, x0, y0, x1, y1, a in zip(*columns, strict=True):
        found[i].append(Found(names[s], world.COLORS[h], (x0, y0, x1, y1), ((x0 + x1) / 2, (y0 + y1) / 2), a))
    for things_of_picture in found:
        things_of_picture.sort(key=lambda thing: -thing.area)
    return found


def _grounds(pixels: np.ndarray) -> list[str | None]:
    """Ground of each picture, from the mean of its uncoloured pixels; `None` without any."""
    grey = ~coloured(pixels)
    number = grey.sum((1, 2))
    level = (pixels.sum(-1, dtype=np.uint16) * grey).sum((1, 2)) / (3 * 255 * np.maximum(number, 1))
    return [
        world.GROUNDS[bright] if n else None for bright, n in zip((level > 0.5).tolist(), number.tolist(), strict=True)
    ]


def relations(a: Found, b: Found) -> set[str]:
    """
    Where `a` is, seen from `b`, by GenEval's rule: offsets of the centres, less a tenth of the two extents, must be
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


def verify(prompts: Sequence[str], images: Sequence[Image.Image] | np.ndarray) -> list[Verdict]:
    """
    Judge pictures by what their prompts demand.

    The demands: each named thing's presence, its colour and its size if it has one, the number if it is not one
    (`1 - |found - n| / n`, at least 0), the relation, the ground, and that there is nothing else, which is met only
    when at least one of the things asked for is there. Found things stand for named ones so that most demands are met.

    Args:
        prompts (`Sequence[str]`): N sentences of the world, see [`world.all_captions`].
        images (`Sequence[PIL.Image.Image]` or `np.ndarray`):
            N pictures: PIL images of any size, or `(N, 32, 32, 3)`, floating point in [0, 1].

    Returns:
        `list[Verdict]`: with `lenient`, `strict`, `graded`, `category` and `demands` of each picture.

    Raises:
        `ValueError`: for a prompt that is not of this world, for numbers of prompts and images that differ, and for
            arrays of another shape or range.
    """
    if len(prompts) != len(images):
        raise ValueError(
            f"Each image needs its prompt, but there are {len(prompts)} prompts and {len(images)} images."
        )
    captions = [world.parse_caption(prompt) for prompt in prompts]
    pixels = to_pixels(images)
    return [
        _judge(caption, things, ground)
        for caption, things, ground in zip(captions, _find(pixels), _grounds(pixels), strict=True)
    ]
