"""Calling reward functions, and saying clearly what is wrong with what they return."""

import inspect
import math
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from PIL.Image import Image

from ..rewards.base import Reward, RewardUnavailableError
from ..rewards.by_name import RewardFunc, resolve_reward, reward_name
from ..rewards.calling import call_reward, numbers


@dataclass(frozen=True)
class Scores:
    """
    What N images got from K rewards.

    Args:
        rewards (`torch.Tensor`): `(N, K)`, float64; NaN where there is no score.
        components (`dict[str, torch.Tensor]`):
            `(N,)` each, of the rewards that return a dictionary, by "{reward}/{component}".
        seconds (`list[float]`): That each reward took, on this process.
    """

    rewards: torch.Tensor
    components: dict[str, torch.Tensor]
    seconds: list[float]


class RewardScorer:
    """
    Scores images with every reward function.

    Args:
        reward_funcs: callable, string, or a list of them; see [`~slas_trl.rewards.by_name.resolve_reward`].

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
                f"Two rewards have the name {twice[0]!r}, under which both would be logged. Rename one of them; "
                f'those of slas_trl.rewards have an option for it, as in "{twice[0]}:name=another".'
            )
        if slashed := [name for name in self.names if "/" in name]:
            raise ValueError(f"The reward's name {slashed[0]!r} has a slash, which parts it from its components.")

    @property
    def options(self) -> list[int]:
        """A checksum of each reward's options, which may hold what is not to be written down."""
        given = (f.keywords if isinstance(f, partial) else f for f in self.functions)
        given = (repr(one) if isinstance(one, dict | Reward) else one.__module__ for one in given)
        return [zlib.crc32(text.encode()) for text in given]

    def check(self, data: Dataset) -> None:
        """Raises `TypeError` for a reward that cannot be called with prompts, images and the columns of `data`."""
        given = dict.fromkeys(("prompts", "images", "completions", *data.column_names))
        given.pop("prompt")
        for name, function in zip(self.names, self.functions, strict=True):
            if isinstance(function, type):
                raise TypeError(
                    f"Reward {name!r} is a class; pass an instance of it, which is called like a function."
                )
            try:
                inspect.signature(function).bind(**given)
            except ValueError:  # written in C
                continue
            except TypeError as error:
                raise TypeError(
                    f"Reward {name!r} cannot be called with {', '.join(given)} ({error}). Define it as "
                    "reward(prompts, images, **columns)."
                ) from error

    def score(self, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]) -> torch.Tensor:
        """
        Rewards `(N, K)`, float64, NaN where a reward returned `None` or NaN.

        Raises:
            `ValueError`, `TypeError`: when a reward raises, or returns the wrong number or kind of values; the message
                names the reward, and the prompt.
        """
        with Scoring(self) as scoring:
            scoring.add(prompts, images, columns)
            scores, errors = scoring.result()
        for error in errors.values():
            raise error
        return scores.rewards


class Scoring:
    """
    The scores of images that come in chunks. Each reward has a thread, in which it scores one chunk after the other,
    while other rewards score theirs, and the next chunk is made. A context manager: leaving it drops what has not
    begun.

    Args:
        scorer ([`RewardScorer`]): The rewards.
        concurrent (`bool`, *optional*, defaults to `True`):
            `False` waits for every reward at every chunk. The calls are the same, and so are the scores.
    """

    def __init__(self, scorer: RewardScorer, concurrent: bool = True):
        self.scorer, self.concurrent = scorer, concurrent
        # Which GPU is "cuda" is a matter of the thread: the same in theirs as in this one.
        gpu = (torch.cuda.current_device(),) if torch.cuda.is_initialized() else ()
        self._threads = [ThreadPoolExecutor(1, initializer=_use_gpu, initargs=gpu) for _ in scorer.names]
        self._chunks: list[list[Future[_ChunkScores]]] = [[] for _ in scorer.names]
        self._sizes: list[int] = []
        self._images, self._shown = 0, []  # how many came, and the places of those that can be judged

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, *exception: object) -> None:
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)

    def add(self, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]) -> None:
        """Have these images scored, N of each; `None`, a picture that shows nothing, has no score."""
        shown = [i for i, image in enumerate(images) if image is not None]
        self._shown += [self._images + i for i in shown]
        self._images += len(images)
        if not shown:
            return
        prompts, images = [prompts[i] for i in shown], [images[i] for i in shown]
        columns = {key: [values[i] for i in shown] for key, values in columns.items()}
        self._sizes.append(len(images))
        names, functions = self.scorer.names, self.scorer.functions
        for name, function, thread, chunks in zip(names, functions, self._threads, self._chunks, strict=True):
            # Each has its own: one that changes an image in place does not change what others see, or what is logged.
            own = list(prompts), deepcopy(images), deepcopy(columns)
            chunks.append(thread.submit(_score_chunk, chunks[-1] if chunks else None, name, function, *own))
            if not self.concurrent:
                wait(chunks)

    @property
    def failed(self) -> bool:
        """Whether it is known that a reward cannot score what it was given."""
        return any(chunk.done() and chunk.exception() is not None for chunks in self._chunks for chunk in chunks)

    def result(self) -> tuple[Scores, dict[str, Exception]]:
        """Wait for the scores; and the first error of each reward that raised one, whose scores are NaN."""
        columns, components, seconds, errors = [], {}, [], {}
        for name, chunks in zip(self.scorer.names, self._chunks, strict=True):
            scored = []
            for chunk, size in zip(chunks, self._sizes, strict=True):
                try:
                    scored.append(chunk.result())
                except (ValueError, TypeError) as error:
                    errors.setdefault(name, error)
                    scored.append(_ChunkScores([math.nan] * size, {}, [], 0.0))
            columns.append([value for chunk in scored for value in chunk.rewards])
            seconds.append(sum(chunk.seconds for chunk in scored))
            # One in which nothing was scored may be without components: they are NaN as well.
            told = [chunk.returned for chunk in scored if chunk.returned or not chunk.is_empty]
            if any(set(parts) != set(told[0]) for parts in told):
                errors.setdefault(name, other_components(name, told))
                continue
            for part in told[0] if told else ():
                if part == "reward":
                    continue
                rows = [v for chunk in scored for v in chunk.components.get(part, [math.nan] * len(chunk.rewards))]
                components[f"{name}/{part}"] = self._placed(rows)
        return Scores(torch.stack([self._placed(column) for column in columns], 1), components, seconds), errors

    def _placed(self, scores: list[float]) -> torch.Tensor:
        """One for each image `(N,)`, NaN for those that were not shown."""
        placed = torch.full((self._images,), math.nan, dtype=torch.float64)
        placed[self._shown] = torch.tensor(scores, dtype=torch.float64)
        return placed


@dataclass(frozen=True)
class _ChunkScores:
    """Of one reward."""

    rewards: list[float]
    components: dict[str, list[float]]  # all but "reward"
    returned: list[str]  # the names of components, "reward" if it was one of them
    seconds: float

    @property
    def is_empty(self) -> bool:
        return all(map(math.isnan, self.rewards))


def _use_gpu(index: int | None = None) -> None:
    if index is not None:
        torch.cuda.set_device(index)


def other_components(name: str, found: list[list[str]]) -> ValueError:
    """For a reward that returned not always the same components, of which the trained reward may be the sum."""
    first, other = found[0], next(names for names in found if set(names) != set(found[0]))
    return ValueError(
        f"Reward {name!r} returned the components {sorted(first)} for some images, and {sorted(other)} for others; "
        "expected the same ones every time, with None for an image that has no such score."
    )


def _score_chunk(previous: "Future[_ChunkScores] | None", name: str, *call: Any) -> _ChunkScores:
    """Raises `ValueError` or `TypeError`, whatever happens, at once if the chunk before raised it."""
    if previous is not None and (error := previous.exception()) is not None:
        raise error
    try:
        return _scores_of(name, *call)
    except (ValueError, TypeError):
        raise
    except BaseException as error:  # such as SystemExit: the trainer tells the other processes, and saves
        raise ValueError(f"Reward {name!r} raised {type(error).__name__}: {error}") from error


def _scores_of(
    name: str, function: RewardFunc, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]
) -> _ChunkScores:
    start = time.perf_counter()
    result = _call(name, function, prompts, images, columns)
    returned = list(result) if isinstance(result, dict) else []
    if not isinstance(result, dict):
        rewards, components = numbers(result, prompts, f"Reward {name!r}"), {}
    elif not result:
        raise ValueError(
            f"Reward {name!r} returned an empty dictionary; expected a list of scores for each component."
        )
    else:
        components = {part: numbers(values, prompts, f"Reward '{name}/{part}'") for part, values in result.items()}
        rewards = components.pop("reward", None) or [sum(parts) for parts in zip(*components.values(), strict=True)]
    return _ChunkScores(rewards, components, returned, time.perf_counter() - start)


def _call(
    name: str, function: RewardFunc, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]
) -> Any:
    try:
        return call_reward(function, prompts, images, columns)
    except (RewardUnavailableError, ImportError, FileNotFoundError) as error:  # no image is to blame
        raise ValueError(f"Reward {name!r} cannot be used: {error}") from error
    except Exception as error:
        raise ValueError(
            f"Reward {name!r} raised {type(error).__name__}: {error} on {len(images)} images, the first of "
            f"{prompts[0]!r}. Return None for an image that cannot be scored."
        ) from error


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
