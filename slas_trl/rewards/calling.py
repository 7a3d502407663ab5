"""Calling a reward where no trainer does: in a server's thread, or in a process of its own."""

import asyncio
import inspect
import math
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from slas_trl.rewards.by_name import RewardFunc


def call_reward(reward: RewardFunc, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]) -> Any:
    """
    What the reward returns, once it is there: a list of scores, or a dictionary of them, as plain Python objects.
    """
    result = reward(prompts=prompts, images=images, completions=images, **columns)
    if inspect.isawaitable(result):

        async def awaited() -> Any:
            return await result

        result = asyncio.run(awaited())
    if isinstance(result, dict):
        return {name: _plain(values) for name, values in result.items()}
    return _plain(result)


def _plain(values: Any) -> Any:
    """Without tensors, which could be on a GPU."""
    if isinstance(values, (torch.Tensor, np.ndarray)):
        return values.tolist()
    if isinstance(values, (list, tuple)):
        return [value.item() if isinstance(value, (torch.Tensor, np.generic)) else value for value in values]
    return values


def numbers(values: Any, count: int) -> list[float | None]:
    """
    Scores as finite floats, where NaN is no score.

    Raises:
        `TypeError`, `ValueError`: for what are no scores.
    """
    if not isinstance(values, list):
        raise TypeError(f"The reward returned a {type(values).__name__}; expected a list of {count} numbers.")
    if len(values) != count:
        raise ValueError(f"The reward returned {len(values)} values for {count} images; expected one for each.")
    scores: list[float | None] = []
    for value in values:
        if value is not None and not isinstance(value, Real):
            raise TypeError(f"The reward returned {value!r} ({type(value).__name__}); expected a number, or None.")
        score = None if value is None or math.isnan(value) else float(value)
        if score is not None and math.isinf(score):
            raise ValueError(f"The reward returned {score}; expected a finite number.")
        scores.append(score)
    return scores
