"""Prompt data sets: from the embedded world, from a file, or from the Hub."""

import csv
import io
import json
import reprlib
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from datasets import Dataset, DatasetDict

from .pipeline_inputs import is_picture_column


SUFFIXES = (".txt", ".json", ".jsonl", ".csv", ".tsv", ".parquet")  # of files of prompts, in small or capital letters


def load_prompts(name_or_path: str, split: str = "train") -> Dataset:
    """
    Load prompts, a data set with a column "prompt"; the others are for the rewards and the pipeline.

    They are `"shapes"` for the embedded world; a file (.txt with a prompt a line; .json, .jsonl, .csv, .tsv, .parquet
    with a column "prompt") in UTF-8, whose paths of images are relative to its folder; or a Hub id. `split` is that of
    the embedded world or of the Hub's data set.

    Raises:
        `FileNotFoundError`, `ValueError`: when there is no such file, or no prompt in it.
    """
    if name_or_path == "shapes":
        from ..shapes import shapes_prompts

        return shapes_prompts(split)
    path = Path(name_or_path)
    if path.suffix.lower() in SUFFIXES and not path.is_file():
        raise FileNotFoundError(f"There is no prompt file {str(path)!r}; check the path.")
    try:
        if not name_or_path:
            raise ValueError("the name is empty")
        data = _read(path) if path.is_file() else datasets.load_dataset(name_or_path, split=split)
    except Exception as error:  # from the Hub, the cache or the file: too many kinds to name
        expected = f"Expected a data set on the Hub, or a file ({', '.join(SUFFIXES)}) in UTF-8"
        why = error.__cause__ or error
        raise ValueError(f"The prompts {name_or_path!r} cannot be read: {why}. {expected}.") from error
    data = check_prompts(data, repr(name_or_path))
    pictures = [column for column in data.column_names if is_picture_column(data, column)]
    if path.is_file() and pictures:
        data = data.map(lambda row: {column: _beside(path, row[column]) for column in pictures})
    return data


def _beside(file: Path, image: Any) -> Any:
    """The path of an image, or a list of them, relative to the folder of `file`."""
    if isinstance(image, list):
        return [_beside(file, item) for item in image]
    found = isinstance(image, str) and (file.parent / image).is_file()
    return str(file.parent / image) if found else image


def _read(path: Path) -> Any:
    """A file of one of `SUFFIXES`: all but Parquet, which may be large, without the cache of `datasets`."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=str(path), split="train")
    if suffix not in SUFFIXES:
        raise ValueError("the end of its name is of no format that is read")
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise UnicodeError("it has zero bytes, as UTF-16 has")
    lines = [line.strip() for line in text.split("\n") if line.strip()]  # a form feed or U+2028 ends none
    if suffix == ".txt" or not lines:
        return Dataset.from_dict({"prompt": lines})
    if suffix in (".json", ".jsonl"):
        rows = json.loads(text) if lines[0].startswith("[") else [json.loads(line) for line in lines]
        rows = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
        names = dict.fromkeys(chain.from_iterable(rows))
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}, on_mixed_types="use_json")
    marks: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
    # Words such as NA are text; and so is 1984, where it is to be drawn.
    marks |= {"keep_default_na": False, "na_values": [""], "converters": dict.fromkeys(("prompt", "target_text"), str)}
    frame = pd.read_csv(io.StringIO(text), low_memory=False, **marks)
    if not isinstance(frame.index, pd.RangeIndex):  # where pandas puts surplus fields
        raise ValueError("it has rows with more fields than its header; quote prompts with commas, in a .csv")
    return Dataset.from_pandas(frame, preserve_index=False)


def check_prompts(data: Dataset, name: str) -> Dataset:
    """`data` itself, if every row has a prompt. Raises `TypeError` or `ValueError` that names the row otherwise."""
    if not isinstance(data, Dataset):
        fix = "pass one of its splits" if isinstance(data, DatasetDict) else "use Dataset.from_list(list(data))"
        raise TypeError(f"{name} must be a datasets.Dataset, but it is a {type(data).__name__}; {fix}.")
    if "prompt" not in data.column_names:
        raise ValueError(f"{name} has no column 'prompt', but {data.column_names}. Rename the one with the text.")
    if taken := {"prompts", "images", "completions"} & set(data.column_names):
        raise ValueError(f"{name} has the column {min(taken)!r}, which rewards get of the rollout. Rename it.")
    if not len(data):
        raise ValueError(f"{name} is empty; expected at least one prompt.")
    bad = [i for i, prompt in enumerate(data["prompt"]) if not isinstance(prompt, str) or not prompt.strip()]
    if bad:
        first = reprlib.repr(data["prompt"][bad[0]])
        raise ValueError(f"{name} has {len(bad)} rows without a prompt: row {bad[0]} has {first}. Remove them.")
    return data
