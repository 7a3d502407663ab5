"""Prompt data sets: from the embedded world, from a file, or from the Hub."""

from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError

from .calls import is_picture_column


BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def load_prompts(name_or_path: str, split: str = "train") -> Dataset:
    """
    Load prompts.

    Args:
        name_or_path (`str`):
            `"shapes"` for the embedded world; a file (.txt with one prompt per line, or .json, .jsonl, .csv, .tsv,
            .parquet with a "prompt" column); or a data set on the Hub. Paths of images in a file, in columns whose
            names end in "image" or "images", are relative to the file's folder.
        split (`str`, *optional*, defaults to `"train"`): split of the embedded world or of the Hub's data set.

    Returns:
        `Dataset`: with a column "prompt", and whatever other columns there are, for the rewards.

    Raises:
        `FileNotFoundError`: when a file is named that is not there.
        `ValueError`: when there is no prompt in it.
    """
    path = Path(name_or_path)
    if name_or_path == "shapes":
        from ..shapes import shapes_prompts

        return shapes_prompts(split)
    if path.suffix in (".txt", *BUILDERS) and not path.is_file():
        raise FileNotFoundError(f"There is no prompt file {str(path)!r}; check the path.")
    if path.suffix == ".txt":
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        data = Dataset.from_dict({"prompt": [line for line in lines if line]})
    elif path.suffix in BUILDERS:
        data = _read(path)
    else:
        data = datasets.load_dataset(name_or_path, split=split)
    if not isinstance(data, Dataset):
        raise TypeError(
            f"{name_or_path!r} is a {type(data).__name__}; expected a data set that fits in memory or on disk."
        )
    data = check_prompts(data, repr(name_or_path))
    pictures = [column for column in data.column_names if is_picture_column(data, column)]
    if path.is_file() and pictures:
        data = data.map(lambda row: {column: _beside(path, row[column]) for column in pictures})
    return data


def _beside(file: Path, image: Any) -> Any:
    """The path of an image, or a list of them, as seen from the folder of the file that names it."""
    if isinstance(image, list):
        return [_beside(file, item) for item in image]
    found = isinstance(image, str) and (file.parent / image).is_file()
    return str(file.parent / image) if found else image


def _read(path: Path) -> Dataset:
    """A file of one of the formats in `BUILDERS`."""
    builder = BUILDERS[path.suffix]
    options: dict[str, Any] = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
    if not path.stat().st_size:
        raise ValueError(f"The prompt file {str(path)!r} is empty; expected at least one prompt.")
    try:
        data = datasets.load_dataset(builder, data_files=str(path), split="train", **options)
    except (ValueError, DatasetGenerationError) as error:
        raise ValueError(
            f"The prompt file {str(path)!r} is empty, or cannot be read as {builder}: {error.__cause__ or error}"
        ) from error
    if builder == "csv" and "__index_level_0__" in data.column_names:
        # The reader takes what is too much for an index, and of "a cat, asleep" keeps "asleep".
        raise ValueError(
            f"{str(path)!r} has rows with more fields than its header; quote prompts with commas or tabs."
        )
    return data


def check_prompts(data: Dataset, name: str) -> Dataset:
    """`data` itself, if every row has a prompt to give; else a ValueError that says which does not."""
    if not isinstance(data, Dataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, but it is a {type(data).__name__}; use Dataset.from_list."
        )
    if "prompt" not in data.column_names:
        raise ValueError(
            f"{name} has no column 'prompt'; its columns are {data.column_names}. Rename the one with the text."
        )
    if taken := {"prompts", "images", "completions"} & set(data.column_names):
        raise ValueError(
            f"{name} has the column {min(taken)!r}, by which name a reward gets the rollout's. Rename it."
        )
    if not len(data):
        raise ValueError(f"{name} is empty; expected at least one prompt.")
    bad = [i for i, prompt in enumerate(data["prompt"]) if not isinstance(prompt, str) or not prompt.strip()]
    if bad:
        raise ValueError(f"{name} has rows without a prompt: {bad[:5]}{' ...' if len(bad) > 5 else ''}. Remove them.")
    return data
