"""
What GenEval (https://huggingface.co/papers/2310.11513) asks of a picture, and whether the objects that were detected
in it fulfil that: which objects, how many, of which color, and where. Nothing here looks at pixels.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np


COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

_KEYS = ("class", "count", "color", "position")  # of an entry of include; the first two of one of exclude
_MARGIN = 0.1  # of the sizes of both objects: their centers may differ by so much before one is beside the other
_MAX_OBJECTS = 16  # of a class; weaker detections are dropped

# What GenEval, COCO, VOC and Open Images call the same things; the first is GenEval's name.
_SYNONYMS = (
    *(("airplane", "aeroplane"), ("bicycle", "bike"), ("cell phone", "cellphone", "mobile phone"), ("couch", "sofa")),
    *(("computer keyboard", "keyboard"), ("computer mouse", "mouse"), ("dining table", "diningtable")),
    *(("donut", "doughnut"), ("hair drier", "hair dryer"), ("motorcycle", "motorbike")),
    *(("potted plant", "pottedplant"), ("tv", "television", "tv monitor", "tvmonitor")),
    ("tv remote", "remote", "remote control"),
)
_NAMES = {other: names[0] for names in _SYNONYMS for other in names}


@dataclass(frozen=True)
class Demand:
    """One entry of `include`: `count` objects, of a color, and somewhere relative to those of an earlier entry."""

    name: str
    count: int = 1
    color: str | None = None
    relation: str | None = None
    target: int = 0  # the index of that entry


@dataclass(frozen=True)
class Specification:
    """All that is asked of a picture. `exclude` is of pairs (name, number that is too many)."""

    include: tuple[Demand, ...]
    exclude: tuple[tuple[str, int], ...] = ()
    counting: bool = False

    @property
    def names(self) -> set[str]:
        return {demand.name for demand in self.include} | {name for name, _ in self.exclude}


@dataclass(frozen=True)
class Detection:
    """An object: its class, confidence, box (left, top, right, bottom) in pixels, and mask `(H, W)` if it has one."""

    label: str
    score: float
    box: tuple[float, ...]
    mask: np.ndarray | None = field(default=None, compare=False, repr=False)


def canonical(name: str) -> str:
    """GenEval's name of a class, by which classes of different data sets are compared."""
    plain = " ".join(name.lower().replace("_", " ").replace("-", " ").split())
    return _NAMES.get(plain, plain)


def read_specification(row: Mapping[str, Any] | str | None) -> Specification | None:
    """
    A row of GenEval's metadata, or its JSON; `None` in it is a gap of a table. Raises `ValueError` for what cannot be
    checked.
    """
    row = json.loads(row) if isinstance(row, str) and row.strip() else row
    if not row:
        return None
    if not isinstance(row, Mapping):
        raise ValueError(f'Expected a row of GenEval\'s metadata, with its "include", but got {row!r}.')
    if not (row.get("include") or row.get("exclude")):
        return None
    include = tuple(_demand(entry, index, row) for index, entry in enumerate(row.get("include") or ()))
    exclude = tuple(
        (canonical(_name(entry, row, _KEYS[:2])), _count(entry, row)) for entry in row.get("exclude") or ()
    )
    tag = row.get("tag")
    # Only its tag tells which of GenEval's pictures need more confident detections; these all have something excluded.
    return Specification(include, exclude, counting=tag == "counting" if tag else bool(exclude))


def _demand(entry: Mapping[str, Any], index: int, row: Any) -> Demand:
    name, count, color = canonical(_name(entry, row)), _count(entry, row), entry.get("color")
    if color is not None and color not in COLORS:
        raise ValueError(f"The color {color!r} of {row!r} is not one of {', '.join(COLORS)}.")
    if entry.get("position") is None:
        return Demand(name, count, color)
    relation, target = None, -1
    with suppress(TypeError, ValueError, LookupError):
        relation, target = entry["position"][0], int(entry["position"][1])
    if relation not in RELATIONS or not 0 <= target < index:
        expected = f"one of {', '.join(RELATIONS)} and the index of an earlier entry of include"
        raise ValueError(f"The position {entry['position']!r} of {row!r} must be a pair of {expected}.")
    return Demand(name, count, color, relation, target)


def _name(entry: Any, row: Any, known: Sequence[str] = _KEYS) -> str:
    name = entry.get("class") if isinstance(entry, Mapping) else None
    # An unknown key would be a demand that each picture fulfills. In tables, a key of one row is None in the others.
    unknown = [key for key, value in entry.items() if key not in known and value is not None] if name else []
    if not isinstance(name, str) or not name.strip() or unknown:
        raise ValueError(f"{entry!r} of {row!r} has no class or unknown keys {unknown}; known are {', '.join(known)}.")
    return name


def _count(entry: Mapping[str, Any], row: Any) -> int:
    count = 1 if entry.get("count") is None else entry["count"]
    if count != int(count) or count < 1:
        raise ValueError(f"The count of {entry!r} of {row!r} must be a whole number from 1 on.")
    return int(count)


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where `box` is as seen from `other`: none, one or two of `RELATIONS`."""
    a, b = np.array(box, float).reshape(2, 2), np.array(other, float).reshape(2, 2)  # corners
    offset = a.mean(0) - b.mean(0)
    slack = _MARGIN * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0]))
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - slack, 0)
    if np.abs(beyond).max() < 1e-3:
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {relation for relation, true in zip(RELATIONS, holds, strict=True) if true}


def judge(
    wanted: Specification,
    detections: Sequence[Detection],
    colors_of: Callable[[Sequence[Detection]], Sequence[str]],
    threshold: float = 0.3,
    counting_threshold: float = 0.9,
) -> tuple[float, bool]:
    """
    How far the objects of a picture are those that were asked for.

    Args:
        wanted (`Specification`): what was asked for.
        detections (`Sequence[Detection]`): what was found, in any order.
        colors_of (`Callable`): the colors of objects of one class, one of `COLORS` for each.
        threshold (`float`, *optional*, defaults to `0.3`): detections up to this confidence do not count...
        counting_threshold (`float`, *optional*, defaults to `0.9`): ... nor up to this one, if numbers are asked for.

    Returns:
        `(float, bool)`: the share of the demands that are met, and GenEval's verdict.

        For GenEval the `count` most confident objects of each entry of `include` must all have the color, and be on
        that side of all those of the other entry, which must be right itself; and there must be fewer objects than
        each entry of `exclude` has.

        The share is the mean over what is asked for, as in [Flow-GRPO](https://huggingface.co/papers/2505.05470):
        `max(0, 1 - |n - count| / count)` of `n` objects, so that too many are as bad as too few; the share of objects
        with the color; 1 or 0 for a position, and for an entry of `exclude` whose class is not included.
    """
    limit = counting_threshold if wanted.counting else threshold
    found: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda detection: -detection.score):
        of_class = found.setdefault(canonical(one.label), [])
        if one.score > limit and len(of_class) < _MAX_OBJECTS:
            of_class.append(one)

    shares: list[float] = []
    right = True
    groups: list[list[Detection] | None] = []  # the objects of each entry, if they are right
    for demand in wanted.include:
        objects = found.get(demand.name, [])
        shares.append(max(0.0, 1 - abs(len(objects) - demand.count) / demand.count))
        group = objects[: demand.count]
        good = len(group) == demand.count
        if demand.color:
            of_color = list(colors_of(group)).count(demand.color) if good else 0
            shares.append(of_color / demand.count)
            good = good and of_color == demand.count
        if demand.relation:
            pairs = [(one.box, other.box) for one in group for other in groups[demand.target] or ()]
            good = good and bool(pairs) and all(demand.relation in relations(*pair) for pair in pairs)
            shares.append(float(good))
        groups.append(group if good else None)
        right = right and good

    included = {demand.name for demand in wanted.include}
    for name, too_many in wanted.exclude:
        few = len(found.get(name, [])) < too_many
        if name not in included:
            shares.append(float(few))
        right = right and few
    return fmean(shares), right
