"""Calling a reward, and checking what it returns: for the trainer and the server."""

import asyncio
import inspect
import math
import os
import sys
import threading
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from ..images import still
from .base import RewardFunc, load_once, unwrapped


@torch.no_grad()
def call_reward(reward: RewardFunc, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]) -> Any:
    """The reward's result, once it is there, as plain Python objects."""
    if not getattr(unwrapped(reward), "sees_videos", True):  # rewards of users are given all frames
        images = [still(image) for image in images]
    result = reward(prompts=prompts, images=images, completions=images, **columns)
    if inspect.isawaitable(result):
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        result = in_background("async rewards", _awaited(result, device))
    if isinstance(result, Mapping):
        return {str(name): _plain(values) for name, values in result.items()}
    return _plain(result)


async def _awaited(result: Awaitable, device: int | None) -> Any:
    if device is not None:  # that of the thread which waits
        torch.cuda.set_device(device)
    try:
        return await result
    except (SystemExit, KeyboardInterrupt) as error:  # either would end the loop, and whoever waits would never know
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def in_background(loop: str, work: Coroutine) -> Any:
    """What `work` returns, in one loop for all calls: clients and locks belong to the loop of their first use."""
    future = asyncio.run_coroutine_threadsafe(work, _loop(os.getpid(), loop))
    try:
        return future.result()
    finally:
        future.cancel()  # after Ctrl-C


@load_once
def _loop(pid: int, name: str) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()

    def run() -> None:
        torch.set_grad_enabled(False)  # of this thread
        loop.run_forever()

    threading.Thread(target=run, daemon=True, name=name).start()
    return loop


def _plain(values: Any) -> Any:
    """Without tensors, which could be on a GPU."""
    if isinstance(values, (torch.Tensor, np.ndarray)):
        return values.tolist()
    if not isinstance(values, (list, tuple)):
        return values
    arrays = (torch.Tensor, np.ndarray, np.generic)
    plain = [v.item() if isinstance(v, arrays) and math.prod(v.shape) == 1 else v for v in values]
    several = isinstance(values, tuple) and any(isinstance(value, (list, Mapping, *arrays)) for value in plain)
    return values if several else plain  # a tuple of scores and something else is refused as it is


def numbers(values: Any, prompts: Sequence[str], who: str) -> list[float]:
    """
    Scores as floats, NaN for none, from what [`call_reward`] returned, or one component of it. Raises `TypeError` and
    `ValueError` for what are no scores of these prompts, by `who`.
    """
    if not isinstance(values, list):
        size = f" of {len(values)}" if isinstance(values, tuple) else ""
        raise TypeError(f"{who} returned a {type(values).__name__}{size}; expected a list of {len(prompts)} numbers.")
    if len(values) != len(prompts):
        raise ValueError(f"{who} returned {len(values)} values for {len(prompts)} images; expected one for each.")
    scores = []
    for i, value in enumerate(values):
        where = f"for image {i}, prompt {prompts[i]!r}"
        if value is not None and not isinstance(value, Real):
            raise TypeError(f"{who} returned {value!r} ({type(value).__name__}) {where}; expected a number or None.")
        magnitude: Any = 0 if value is None else abs(value)
        if magnitude > sys.float_info.max:  # infinite, or a whole number that is too large
            raise ValueError(f"{who} returned {str(value)[:20]} {where}; expected a finite number.")
        scores.append(math.nan if value is None else float(value))
    return scores
