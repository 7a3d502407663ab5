"""
Scores of prompts on disk: one line for each prompt, after a first line that says how they were made. They are written
as they come, so that whoever is killed goes on from there.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset

from slas_trl.advantages import compute_advantages
from slas_trl.trainer.calls import is_picture_column


FORMATS = (".jsonl", ".json", ".parquet", ".txt")  # of the lists that are written


def fingerprint(data: Dataset) -> str:
    """Of the prompts, in their order."""
    return hashlib.sha256("\n".join(data["prompt"]).encode()).hexdigest()


def spread(scores: torch.Tensor) -> dict[str, float | None]:
    """Mean, std as training takes it, and share of distinct values of one prompt's scores `(G,)`; NaN is no score."""
    scored = scores[~scores.isnan()]
    std = compute_advantages(scores, len(scores)).group_std.item()
    return {
        "mean": scored.mean().item() if len(scored) else None,
        "std": None if math.isnan(std) else std,
        "distinct": len(scored.float().unique()) / len(scored) if len(scored) else None,
    }


class ScoreFile:
    """
    The scores of the prompts of a data set.

    Args:
        path (`str` or `Path`): A `.jsonl` file, which need not be there.
        header (`Mapping[str, Any]`): What the scores depend on.

    Raises:
        `ValueError`: when the file is of other prompts or settings, or is none of ours.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]):
        self.path = Path(path)
        if not self.path.is_file() or not self.path.stat().st_size:
            self._append([header])
        found, self.lines = read_scores(self.path)
        now = json.loads(json.dumps(header))
        if changed := {k: (found.get(k), now.get(k)) for k in found | now if found.get(k) != now.get(k)}:
            raise ValueError(
                f"{self.path} holds scores that were made with other settings (then, now): {changed}. Name another "
                "--output, or delete it."
            )
        self._drop_half_a_line()  # not before it is known to be one of ours

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add those that are not there."""
        new = [dict(line) for line in lines if line["row"] not in self.lines]
        self._append(new)
        self.lines |= {line["row"]: line for line in new}

    def _append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _drop_half_a_line(self) -> None:
        """Of a run that was killed while it wrote: what comes next would be glued to it."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)


def read_scores(path: str | Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """
    Header and, by row, lines of a file of scores.

    Raises:
        `FileNotFoundError`, `ValueError`: when there is none, or it is something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there are no scores {path}. Make them with slas-trl prompts score --output {path}.")
    records = []
    for text in Path(path).read_text(encoding="utf-8").split("\n"):  # some prompts hold other ends of lines
        try:
            records.append(json.loads(text))
        except json.JSONDecodeError:
            break  # half a line
    if not records or not isinstance(records[0], dict) or "fingerprint" not in records[0]:
        raise ValueError(f"{path} does not begin as scores of slas-trl prompts score do. Name another file.")
    return records[0], {record["row"]: record for record in records[1:]}


@dataclass(frozen=True)
class Selection:
    """Which prompts to keep. `None` asks for nothing; a prompt without the number that is asked for is dropped."""

    min_std: float | None = None
    min_distinct: float | None = None
    min_mean: float | None = None
    max_mean: float | None = None
    keep_top: float | None = None  # share of those that are left after the others, widest std first

    def rows(self, scores: Mapping[int, Mapping[str, float | None]]) -> tuple[list[int], dict[str, int]]:
        """Rows to keep, in order, and how many each condition dropped, those before it aside."""
        conditions = {
            f"std below {self.min_std}": (self.min_std, "std", 1),
            f"distinct share below {self.min_distinct}": (self.min_distinct, "distinct", 1),
            f"mean below {self.min_mean}": (self.min_mean, "mean", 1),
            f"mean above {self.max_mean}": (self.max_mean, "mean", -1),
        }
        kept, dropped = sorted(scores), {}
        for name, (bound, key, sign) in conditions.items():
            if bound is not None:
                left = [row for row in kept if sign * _number(scores[row][key]) >= sign * bound]
                kept, dropped[name] = left, len(kept) - len(left)
        if self.keep_top is not None:
            widest = sorted(kept, key=lambda row: -_number(scores[row]["std"], -math.inf))
            left = sorted(widest[: math.ceil(self.keep_top * len(kept) - 1e-9)])
            kept, dropped[f"not among the widest {self.keep_top:.0%}"] = left, len(kept) - len(left)
        return kept, dropped


def _number(value: float | None, nothing: float = math.nan) -> float:
    return nothing if value is None else value


def write_prompts(data: Dataset, rows: Sequence[int], path: Path) -> None:
    """
    Write rows with all their columns, so that `load_prompts` reads them. Paths of images become relative to the file.

    Raises:
        `ValueError`: when the format cannot hold the columns.
    """
    kept = data.select(rows)
    pictures = [column for column in data.column_names if is_picture_column(data, column)]
    inside = [column for column in pictures if _has_images(data.features[column])]
    paths = [column for column in pictures if column not in inside]
    if path.suffix == ".txt" and (
        data.column_names != ["prompt"] or any(re.search(r"[\r\n]", p) for p in kept["prompt"])
    ):
        raise ValueError(f"a .txt file holds prompts of one line and no columns; name {path.with_suffix('.jsonl')}.")
    if path.suffix != ".parquet" and inside:
        raise ValueError(f"the columns {inside} hold images, not paths; name {path.with_suffix('.parquet')}.")
    if paths:
        kept = kept.map(lambda row: {column: _seen_from(path.parent, row[column]) for column in paths})
    if path.suffix == ".parquet":
        kept.to_parquet(path)
    elif path.suffix == ".txt":
        path.write_text("".join(f"{prompt}\n" for prompt in kept["prompt"]), encoding="utf-8")
    else:
        kept.to_json(path, force_ascii=False)


def _has_images(feature: Any) -> bool:
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return isinstance(feature, datasets.Image)


def _seen_from(folder: Path, image: Any) -> Any:
    """The path of an image, or a list of them, relative to the folder of the file that will name it."""
    if isinstance(image, list):
        return [_seen_from(folder, item) for item in image]
    return os.path.relpath(image, folder) if isinstance(image, str) and Path(image).is_file() else image
