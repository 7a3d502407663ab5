"""Rows of a data set as arguments of a pipeline: prompts, images to edit, and other columns that its call takes."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from PIL import Image
from transformers.utils import logging

from .slas_config import RESERVED, SLASConfig


logger = logging.get_logger(__name__)


def is_picture_column(dataset: Dataset, column: str) -> bool:
    """Whether a column holds images: as such, or as paths under a name that ends in "image" or "images"."""
    feature = dataset.features[column]
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    named = column.split("_")[-1] in ("image", "images")
    return isinstance(feature, datasets.Image) or (_is_text(feature) and named)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _as_picture(value: Any) -> Any:
    return [load_image(item) for item in value] if isinstance(value, list) else load_image(value)


@dataclass(frozen=True)
class Batch:
    """The inputs of one call of the pipeline, B images."""

    rows: list[dict[str, Any]]  # of the data set, one for each image, its pictures decoded
    call: dict[str, Any]  # arguments of the call

    @property
    def prompts(self) -> list[str]:
        return [row["prompt"] for row in self.rows]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The other columns, for the rewards: B values each."""
        return {name: [row[name] for row in self.rows] for name in self.rows[0] if name != "prompt"}


class PipelineInputs:
    """
    The inputs of one pipeline. Raises `ValueError` when it takes no prompt, or an argument is set that it lacks.

    A column whose name is an argument of the pipeline's call reaches it if `args.pipeline_columns` lists it or, with
    `None`, if it holds text or images. Where not only texts are among them, each call is of one row, repeated by
    `num_images_per_prompt`: pipelines differ in what a list of images means.
    """

    def __init__(self, pipe: DiffusionPipeline, args: SLASConfig):
        self.args, self.name = args, type(pipe).__name__
        self.parameters = inspect.signature(type(pipe).__call__).parameters  # type: ignore[attr-defined]
        if "prompt" not in self.parameters:
            raise ValueError(f"{self.name} takes no prompt; expected a pipeline that makes images of a text.")
        open_ended = any(p.kind is p.VAR_KEYWORD for p in self.parameters.values())
        if not open_ended and (unknown := sorted(self.arguments.keys() - self.parameters.keys())):
            takes = ", ".join(list(self.parameters)[1:])
            raise ValueError(f"{self.name} takes no {', '.join(unknown)}: set pipeline_kwargs by its names, {takes}.")

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of every call."""
        args = self.args
        chosen = {"guidance_scale": args.guidance_scale, "height": args.height, "width": args.width}
        if "output_type" in self.parameters:
            chosen["output_type"] = "pil"  # by default, some make arrays
        extra: Any = args.pipeline_kwargs or {}
        chosen = {key: value for key, value in chosen.items() if value is not None}
        return {"num_inference_steps": args.num_inference_steps, **chosen, **extra}

    def columns(self, dataset: Dataset) -> list[str]:
        """The columns of `dataset` that reach the pipeline."""
        free = [c for c in dataset.column_names if c in self.parameters and c not in RESERVED | self.arguments.keys()]
        if self.args.pipeline_columns is None:
            return [c for c in free if is_picture_column(dataset, c) or _is_text(dataset.features[c])]
        if unfit := [column for column in self.args.pipeline_columns if column not in free]:
            why = f"of {dataset.column_names} only {free} are arguments of {self.name} that nothing else sets"
            raise ValueError(f"pipeline_columns names {unfit[0]!r}, but {why}. Rename the column, or leave it out.")
        return self.args.pipeline_columns

    def one_row_each(self, dataset: Dataset) -> bool:
        """Whether a call is of one row only: where more than texts reach the pipeline."""
        columns = self.columns(dataset)
        return any(is_picture_column(dataset, c) or not _is_text(dataset.features[c]) for c in columns)

    def row(self, dataset: Dataset, i: int) -> dict[str, Any]:
        """
        A row. Images that reach the pipeline, and those of a `datasets.Image` column, are `PIL.Image.Image` in RGB.
        Raises `ValueError` when one that reaches the pipeline is missing or cannot be read.
        """
        reach, row = self.columns(dataset), dataset[i]
        if missing := [column for column in reach if row[column] is None]:
            raise ValueError(f"Row {i} has nothing in the column {missing[0]!r}, which the pipeline needs.")
        for column in filter(lambda name: is_picture_column(dataset, name), row):
            if row[column] is None or (column not in reach and _is_text(dataset.features[column])):
                continue
            try:
                row[column] = _as_picture(row[column])
            except (ValueError, OSError) as error:
                raise ValueError(f"The column {column!r} of row {i} holds no image: {error}") from error
        return row

    def pictures(self, dataset: Dataset, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The pictures, or lists of them, that the pipeline edits in the rows at `indices`, by argument."""
        columns = [column for column in self.columns(dataset) if is_picture_column(dataset, column)]
        rows = [self.row(dataset, i) for i in indices] if columns else []
        return [{column: row[column] for column in columns} for row in rows]

    def check(self, dataset: Dataset, like: Dataset | None = None) -> None:
        """Raises `ValueError` when columns do not fit, are not those of `like`, or chunks do not fit into groups."""
        size, group = self.args.per_device_train_batch_size, self.args.num_generations
        if like is not None and (lacking := sorted({*self.columns(like)} - {*self.columns(dataset)})):
            raise ValueError(f"The prompts to evaluate on lack {lacking}, columns that {self.name} is trained with.")
        if not self.one_row_each(dataset):
            if "image" in self.parameters and "image" not in self.arguments:
                logger.warning(f"{self.name} draws from texts alone. If it should edit, name the column `image`.")
            return
        if group % size:
            what = f"each call is of one prompt with its {self.columns(dataset)}"
            raise ValueError(f"per_device_train_batch_size ({size}) must divide num_generations ({group}): {what}.")
        if size > 1 and "num_images_per_prompt" not in self.parameters:
            raise ValueError(f"{self.name} has no num_images_per_prompt; set per_device_train_batch_size=1.")

    def chunks(self, dataset: Dataset, indices: Sequence[int], size: int) -> list[slice]:
        """Cut `indices` into the positions of successive calls of at most `size` images."""
        alone = self.one_row_each(dataset)
        cuts = [0]
        for i in range(1, len(indices)):
            if i - cuts[-1] == size or (alone and indices[i] != indices[i - 1]):
                cuts.append(i)
        return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(indices)], strict=True)]

    def batches(
        self, dataset: Dataset, indices: Sequence[int], generators: Sequence[torch.Generator], size: int
    ) -> Iterator[Batch]:
        """Inputs of successive calls of at most `size` images. A row is read once, if equal indices are neighbors."""
        rows: dict[int, dict[str, Any]] = {}
        for chunk in self.chunks(dataset, indices, size):
            rows = {i: rows.get(i) or self.row(dataset, i) for i in dict.fromkeys(indices[chunk])}
            own = [rows[i] for i in indices[chunk]]
            yield Batch(own, self._call(dataset, own, list(generators[chunk])))

    def _call(self, dataset: Dataset, rows: list[dict[str, Any]], generators: list[torch.Generator]) -> dict[str, Any]:
        names = ("prompt", *self.columns(dataset))
        if self.one_row_each(dataset):
            given = {name: rows[0][name] for name in names}
            repeated = {"num_images_per_prompt": len(rows)} if len(rows) > 1 else {}
            return {**given, **repeated, "generator": generators, **self.arguments}
        given = {name: [row[name] for row in rows] for name in names}
        # One negative prompt for all is a list too: some pipelines take it no other way beside a list of prompts.
        repeated = {
            name: [value] * len(rows)
            for name, value in self.arguments.items()
            if name.startswith("negative_prompt") and isinstance(value, str)
        }
        return {**given, "generator": generators, **self.arguments, **repeated}


def as_pictures(images: Any, problems: Sequence[str | None], prompts: str | Sequence[str]) -> list[Any]:
    """
    The output of a pipeline as one `PIL.Image.Image` for each sample; a video of one frame is an image, one of more
    frames a list of them. One with a problem is `None`, and named in a warning: it has no score.
    """
    for problem in dict.fromkeys(filter(None, problems)):
        prompt = prompts if isinstance(prompts, str) else prompts[problems.index(problem)]
        number = f"{problems.count(problem)} of {len(problems)} pictures"
        logger.warning(f"{number} of a chunk, the first of {prompt!r}, have no score: {problem}.")
    if isinstance(images, torch.Tensor):  # (B, [F,] C, H, W)
        images = images.detach().float().cpu().movedim(-3, -1).numpy()
    if isinstance(images, np.ndarray):  # (B, [F,] H, W, C) in [0, 1]
        pixels = (images * 255).round().clip(0, 255).astype(np.uint8)
        images = [[Image.fromarray(f) for f in s] if s.ndim == 4 else Image.fromarray(s) for s in pixels]
    made = [s[0] if isinstance(s, list) and len(s) == 1 else s for s in images]
    return [s if problem is None else None for s, problem in zip(made, problems, strict=True)]
