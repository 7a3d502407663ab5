"""Calling reward functions, and saying clearly what is wrong with what they return."""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from ..rewards.by_name import RewardFunc, resolve_reward, reward_name


class RewardScorer:
    """
    Scores images with every reward function.

    Args:
        reward_funcs: callable, string, or a list of them; see [`resolve_reward`].

    Raises:
        `ValueError`: when two rewards have the same name.
    """

    def __init__(self, reward_funcs: RewardFunc | str | Sequence[RewardFunc | str]):
        listed: list[Any] = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not listed:
            raise ValueError("reward_funcs is empty; expected at least one reward function.")
        self.functions = [resolve_reward(reward) for reward in listed]
        self.names = [reward_name(function) for function in self.functions]
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        if twice:
            raise ValueError(
                f"Two rewards have the name {twice[0]!r}, under which both would be logged. Rename one of them."
            )

    def score(self, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]) -> torch.Tensor:
        """
        Rewards `(N, K)`, float64, NaN where a reward returned `None` or NaN.

        Raises:
            `ValueError`, `TypeError`: when a reward raises, or returns the wrong number or kind of values; the message
                names the reward, and the prompt.
        """
        scores = [
            self._checked(name, function, self._call(name, function, prompts, images, columns), prompts)
            for name, function in zip(self.names, self.functions, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float64).T

    def _call(
        self, name: str, function: RewardFunc, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]
    ) -> Any:
        def call(rows: slice) -> Any:
            given = {key: values[rows] for key, values in columns.items()}
            result = function(prompts=prompts[rows], images=images[rows], completions=images[rows], **given)
            return _wait_for(result) if inspect.isawaitable(result) else result

        try:
            return call(slice(None))
        except Exception as error:
            # Which image was it? The ones that score by themselves are not to blame.
            for i, prompt in enumerate(prompts):
                try:
                    call(slice(i, i + 1))
                except Exception as single:
                    raise ValueError(
                        f"Reward {name!r} raised {type(single).__name__}: {single} on image {i} of {len(images)}, "
                        f"prompt {prompt!r}. Return None for an image that cannot be scored."
                    ) from single
            raise ValueError(
                f"Reward {name!r} raised {type(error).__name__}: {error} on a batch of {len(images)} images, though "
                f"each alone can be scored. The first prompt is {prompts[0]!r}."
            ) from error

    @staticmethod
    def _checked(name: str, function: RewardFunc, values: Any, prompts: list[str]) -> list[float]:
        if isinstance(values, (torch.Tensor, np.ndarray)):
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            raise TypeError(
                f"Reward {name!r} returned a {type(values).__name__}; expected a list of {len(prompts)} numbers."
            )
        if len(values) != len(prompts):
            raise ValueError(
                f"Reward {name!r} returned {len(values)} values for {len(prompts)} images; expected one for each "
                "image."
            )
        for i, value in enumerate(values):
            if value is not None and (not isinstance(value, Real) or isinstance(value, str)):
                raise TypeError(
                    f"Reward {name!r} returned {value!r} ({type(value).__name__}) for image {i}, prompt "
                    f"{prompts[i]!r}; expected a number, or None for no score."
                )
        numbers = [math.nan if value is None else float(value) for value in values]
        for i, number in enumerate(numbers):
            if math.isinf(number):
                raise ValueError(
                    f"Reward {name!r} returned {number} for image {i}, prompt {prompts[i]!r}; expected a finite "
                    "number."
                )
        return numbers


def _wait_for(result: Awaitable) -> Any:
    """In a thread of its own: in the caller's a loop may be running already, as in a notebook."""

    async def awaited() -> Any:
        return await result

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, awaited()).result()


def reward_resolution(rewards: torch.Tensor) -> float:
    """
    The finest difference that rewards `(N,)` can show: the spacing at their magnitude of the narrowest floating-point
    type that holds them all, or the smallest gap between any two if that is larger. 0 if there are not two different
    values; the gap of a reward with two values is a verdict's, and not counted.
    """
    values = torch.unique(rewards[~rewards.isnan()].double())
    if len(values) < 2:
        return 0.0
    largest = values.abs().max()
    spacing = 0.0
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        if torch.equal(values.to(dtype).double(), values):
            spacing = max(spacing, torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(largest)))
            break
    gap = values.diff().min().item() if len(values) > 2 else 0.0
    return max(spacing, gap)


def typical_group_std(rewards: torch.Tensor, num_generations: int) -> float:
    """Median std (ddof 0) of one reward `(N,)` within its groups, over the groups that have any; 0 if none has."""
    groups = rewards.double().reshape(-1, num_generations)
    centered = groups - groups.nanmean(1, keepdim=True)
    std = centered.square().nanmean(1).sqrt()
    std = std[std > 0]
    return std.median().item() if len(std) else 0.0
