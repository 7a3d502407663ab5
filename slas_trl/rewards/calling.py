"""Calling a reward, and checking what it returns: for the trainer, a server, and a process of its own."""

import asyncio
import inspect
import math
import threading
from collections.abc import Awaitable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from slas_trl.images import still
from slas_trl.rewards.base import load_once
from slas_trl.rewards.by_name import RewardFunc, is_ours


@torch.no_grad()
def call_reward(reward: RewardFunc, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]) -> Any:
    """
    What the reward returns, once it is there: a list of scores, or a dictionary of them, as plain Python objects. Of
    a video, our own rewards see the middle frame, and others all, in a list.
    """
    if is_ours(reward) and type(reward).__name__ != "ProcessReward":  # which may call anybody's
        images = [still(image) for image in images]
    result = reward(prompts=prompts, images=images, completions=images, **columns)
    if inspect.isawaitable(result):
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        result = asyncio.run_coroutine_threadsafe(_awaited(result, device), _loop()).result()
    if isinstance(result, Mapping):
        return {str(name): _plain(values) for name, values in result.items()}
    return _plain(result)


async def _awaited(result: Awaitable, device: int | None) -> Any:
    if device is not None:  # that of the thread which waits
        torch.cuda.set_device(device)
    return await result


@load_once
def _loop() -> asyncio.AbstractEventLoop:
    """One for all calls of async rewards: their clients and locks belong to the loop that they were first used in."""
    loop = asyncio.new_event_loop()

    def run() -> None:
        torch.set_grad_enabled(False)  # of this thread
        loop.run_forever()

    threading.Thread(target=run, daemon=True, name="async rewards").start()
    return loop


def _plain(values: Any) -> Any:
    """Without tensors, which could be on a GPU."""
    if isinstance(values, (torch.Tensor, np.ndarray)):
        return values.tolist()
    if isinstance(values, (list, tuple)):
        arrays = (torch.Tensor, np.ndarray, np.generic)
        single = [isinstance(value, arrays) and math.prod(value.shape) == 1 for value in values]
        plain = [value.item() if is_one else value for value, is_one in zip(values, single, strict=True)]
        several = isinstance(values, tuple) and any(isinstance(value, (list, Mapping, *arrays)) for value in plain)
        return values if several else plain  # scores, and something else
    return values


def numbers(values: Any, prompts: Sequence[str], who: str) -> list[float]:
    """
    Scores as floats, NaN for none.

    Args:
        values: What [`call_reward`] returned, or one component of it.
        prompts (`Sequence[str]`): Of the images, for their number and for messages.
        who (`str`): "Reward 'ocr'", for messages.

    Raises:
        `TypeError`, `ValueError`: for what are no scores.
    """
    if not isinstance(values, list):
        size = f" of {len(values)}" if isinstance(values, tuple) else ""
        raise TypeError(f"{who} returned a {type(values).__name__}{size}; expected a list of {len(prompts)} numbers.")
    if len(values) != len(prompts):
        raise ValueError(
            f"{who} returned {len(values)} values for {len(prompts)} images; expected one for each image."
        )
    scores = []
    for i, value in enumerate(values):
        where = f"for image {i}, prompt {prompts[i]!r}"
        if value is not None and not isinstance(value, Real):
            raise TypeError(
                f"{who} returned {value!r} ({type(value).__name__}) {where}; expected a number, or None for no score."
            )
        scores.append(math.nan if value is None else float(value))
        if math.isinf(scores[-1]):
            raise ValueError(f"{who} returned {scores[-1]} {where}; expected a finite number.")
    return scores
