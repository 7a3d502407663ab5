"""GenEval (https://huggingface.co/papers/2310.11513): what it asks of the objects that were detected in a picture."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np


COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

_KEYS = ("class", "count", "color", "position")  # of an entry of include; exclude has the first two
_MARGIN = 0.1  # of the sizes of both objects: their centers may differ by so much before one is beside the other

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
    """One entry of `include`: `count` objects, of a color, and where as seen from those of the entry `target`."""

    name: str
    count: int = 1
    color: str | None = None
    relation: str | None = None
    target: int = 0


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


def read_specification(row: Any) -> Specification | None:
    """A row of GenEval's metadata, or its JSON; `None` is a gap. Raises `ValueError` for what cannot be checked."""
    row = json.loads(row) if isinstance(row, str) and row.strip() else row
    if not row or not (row.get("include") or row.get("exclude")):
        return None
    include = tuple(_demand(entry, index, row) for index, entry in enumerate(row.get("include") or ()))
    exclude = tuple(_counted(entry, row, _KEYS[:2]) for entry in row.get("exclude") or ())
    tag = row.get("tag")
    # Only its tag tells which of GenEval's pictures need more confident detections; these all have something excluded.
    return Specification(include, exclude, counting=tag == "counting" if tag else bool(exclude))


def _demand(entry: Any, index: int, row: Any) -> Demand:
    (name, count), color = _counted(entry, row, _KEYS), entry.get("color")
    if color is not None and color not in COLORS:
        raise ValueError(f"The color {color!r} of {row!r} is not one of {', '.join(COLORS)}.")
    if entry.get("position") is None:
        return Demand(name, count, color)
    relation, target = entry["position"]
    if relation not in RELATIONS or not 0 <= int(target) < index:
        expected = f"one of {', '.join(RELATIONS)} and the index of an earlier entry of include"
        raise ValueError(f"The position {entry['position']!r} of {row!r} must be a pair of {expected}.")
    return Demand(name, count, color, relation, int(target))


def _counted(entry: Any, row: Any, keys: Sequence[str]) -> tuple[str, int]:
    """Class and count of an entry, which has no other keys: an unknown one would be a demand that all fulfill."""
    given = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, Mapping) else {}
    name, count = given.get("class"), given.get("count", 1)
    if not isinstance(name, str) or given.keys() - set(keys) or count != int(count) or count < 1:
        expected = f"Expected a class, a count from 1 on, and no keys but {', '.join(keys)}"
        raise ValueError(f"{expected}, but got {entry!r} in {row!r}.")
    return canonical(name), int(count)


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
    The share of the demands that the objects of a picture meet, and GenEval's verdict.

    For GenEval the `count` most confident objects of each entry of `include` must all have the color, and be on that
    side of all those of the other entry, which must be right itself; and there must be fewer objects than each entry
    of `exclude` has. The share is the mean over what is asked for, as in
    [Flow-GRPO](https://huggingface.co/papers/2505.05470): `max(0, 1 - |n - count| / count)` of `n` objects; the share
    of objects with the color; 1 or 0 for a position, and for an entry of `exclude` whose class is not included.

    Args:
        colors_of (`Callable`): The colors of objects of one class.
        threshold, counting_threshold (`float`, *optional*):
            Detections up to this confidence do not count; and up to the other one, if numbers are asked for.
    """
    limit = counting_threshold if wanted.counting else threshold
    found: dict[str, list[Detection]] = {}
    for one in sorted(detections, key=lambda detection: -detection.score):
        of_class = found.setdefault(canonical(one.label), [])
        if one.score > limit and len(of_class) < 16:
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
