"""Calling reward functions on the images of a rollout or an evaluation, and naming what is wrong with their scores."""

import inspect
import math
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset

from ..rewards.base import Reward, RewardFunc, RewardUnavailableError
from ..rewards.call import call_reward, numbers
from ..rewards.resolve import resolve_reward, reward_name
from .distributed import gathered, raise_together


@dataclass(frozen=True)
class Scores:
    """Scores of N images by K rewards."""

    rewards: torch.Tensor  # (N, K), float64, NaN where there is no score
    components: dict[str, torch.Tensor]  # (N,) each, of rewards that return a dictionary, by "{reward}/{component}"
    seconds: list[float]  # that each reward took, on this process


class RewardScorer:
    """
    Scores images with every reward function; see [`~slas_trl.rewards.resolve.resolve_reward`]. Raises `ValueError`
    when two rewards have the same name.
    """

    def __init__(self, reward_funcs: RewardFunc | str | Sequence[RewardFunc | str]):
        listed: list[Any] = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not listed:
            raise ValueError("reward_funcs is empty; expected at least one reward function.")
        self.functions = [resolve_reward(reward) for reward in listed]
        self.names = [reward_name(function) for function in self.functions]
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f'Two rewards have the name {twice[0]!r}; rename one, as by "{twice[0]}:name=another".')
        if slashed := [name for name in self.names if "/" in name]:
            raise ValueError(f"The reward's name {slashed[0]!r} has a slash, which parts it from its components.")

    @property
    def options(self) -> list[int]:
        """A checksum of each reward's options, which may hold what is not to be written down."""
        texts = []
        for one in self.functions:
            given = one.keywords if isinstance(one, partial) else vars(one) if isinstance(one, Reward) else {}
            plain = {name: given[name] for name in sorted(given) if isinstance(given[name], str | int | float | None)}
            texts.append(repr(plain) if given else one.__module__)
        return [zlib.crc32(text.encode()) for text in texts]

    def check(self, data: Dataset) -> None:
        """Raises `TypeError` for a reward that cannot be called with prompts, images and the columns of `data`."""
        given = dict.fromkeys(("prompts", "images", "completions", *data.column_names))
        given.pop("prompt")
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                inspect.signature(function).bind(**given)
            except ValueError:  # written in C
                continue
            except TypeError as error:
                what = f"Reward {name!r} cannot be called with {', '.join(given)} ({error})"
                raise TypeError(f"{what}. Define it as reward(prompts, images, **columns).") from error

    def score(self, prompts: list[str], images: list[Any], columns: dict[str, list[Any]]) -> torch.Tensor:
        """
        Rewards `(N, K)`, float64, NaN where a reward returned `None` or NaN. Raises `ValueError` or `TypeError`, which
        names the reward and the prompt, when it raises or returns the wrong number or kind of values.
        """
        with Scoring(self) as scoring:
            scoring.add(prompts, images, columns)
            scores, error = scoring.result()
        if error is not None:
            raise error
        return scores.rewards


class Scoring:
    """
    The scores of images that come in chunks. Each reward has a thread, in which it scores one chunk after the other,
    while other rewards score theirs, and the next chunk is made; unless `concurrent`, every chunk waits for them. All
    rewards get the same images and columns, and must not write into them. Leaving the context drops what has not
    begun.
    """

    def __init__(self, scorer: RewardScorer, concurrent: bool = True):
        self.scorer, self.concurrent = scorer, concurrent
        # The current CUDA device is per thread: these get this thread's.
        gpu = (torch.cuda.current_device(),) if torch.cuda.is_initialized() else ()
        self._threads = [ThreadPoolExecutor(1, initializer=_use_gpu, initargs=gpu) for _ in scorer.names]
        self._chunks: list[list[Future[_ChunkScores]]] = [[] for _ in scorer.names]
        self._images, self._shown = 0, []  # how many came, and the places of those that can be scored

    def __enter__(self) -> "Scoring":
        return self

    def __exit__(self, *exception: object) -> None:
        for thread in self._threads:
            thread.shutdown(wait=False, cancel_futures=True)

    def add(self, prompts: list[str], images: list[Any], columns: dict[str, list[Any]]) -> None:
        """Have these images scored, N of each; `None`, a picture that shows nothing, has no score."""
        shown = [i for i, image in enumerate(images) if image is not None]
        self._shown += [self._images + i for i in shown]
        self._images += len(images)
        if not shown:
            return
        prompts, images = [prompts[i] for i in shown], [images[i] for i in shown]
        columns = {key: [values[i] for i in shown] for key, values in columns.items()}
        names, functions = self.scorer.names, self.scorer.functions
        for name, function, thread, chunks in zip(names, functions, self._threads, self._chunks, strict=True):
            call = partial(call_reward, function, prompts, images, columns)
            chunks.append(thread.submit(_score_chunk, chunks[-1] if chunks else None, name, call, prompts))
            if not self.concurrent:
                wait(chunks)

    @property
    def failed(self) -> bool:
        """Whether it is known by now that a reward cannot score what it was given."""
        return any(chunk.done() and chunk.exception() is not None for chunks in self._chunks for chunk in chunks)

    def result(self) -> tuple[Scores, Exception | None]:
        """Wait for the scores of this process; and the first error of a reward, if one raised any."""
        rewards = torch.full((self._images, len(self.scorer.names)), math.nan, dtype=torch.float64)
        components, seconds = {}, [0.0] * len(self.scorer.names)
        try:
            for k, (name, chunks) in enumerate(zip(self.scorer.names, self._chunks, strict=True)):
                scored = [chunk.result() for chunk in chunks]
                seconds[k] = sum(chunk.seconds for chunk in scored)
                rewards[self._shown, k] = _column(value for chunk in scored for value in chunk.rewards)
                returned = [chunk.components for chunk in scored if chunk.components or not chunk.is_empty]
                for part in same_components(name, returned):
                    if part != "reward":
                        values = _column(value for chunk in scored for value in chunk.component(part))
                        components[f"{name}/{part}"] = torch.full_like(rewards[:, 0], math.nan)
                        components[f"{name}/{part}"][self._shown] = values
        except Exception as error:
            return Scores(rewards, components, seconds), error
        return Scores(rewards, components, seconds), None

    def gather(self, usable: torch.Tensor | None = None, before_error: Callable[[], None] | None = None) -> Scores:
        """
        The scores of all processes, in the order of their ranks; NaN where an image of this process is not `usable`.
        Collective: every rank must call this. An error of a reward is raised on all of them, after `before_error`.
        """
        scores, error = self.result()
        raise_together(error, before_error)
        if usable is not None:
            for values in (scores.rewards, *scores.components.values()):
                values[~usable] = math.nan
        parts = gathered((scores.rewards, scores.components))
        names: list[str] = []
        try:
            for i, name in enumerate(self.scorer.names):
                # A reward that gave no score may have given no components.
                scored = [own for rewards, own in parts if not rewards[:, i].isnan().all()]
                names += same_components(name, [[k for k in own if k.startswith(f"{name}/")] for own in scored])
        except ValueError as differing:
            raise_together(differing, before_error)
        components = {
            key: torch.cat([own.get(key, torch.full_like(rewards[:, 0], math.nan)) for rewards, own in parts])
            for key in names
        }
        return Scores(torch.cat([rewards for rewards, _ in parts]), components, scores.seconds)


@dataclass(frozen=True)
class _ChunkScores:
    """By one reward."""

    rewards: list[float]
    components: dict[str, list[float]]  # as returned, with "reward" if that is one of them
    seconds: float

    @property
    def is_empty(self) -> bool:
        return all(map(math.isnan, self.rewards))

    def component(self, name: str) -> list[float]:
        """A chunk without any score may be without components."""
        return self.components.get(name, [math.nan] * len(self.rewards))


def _column(values: Iterable[float]) -> torch.Tensor:
    return torch.tensor([*values], dtype=torch.float64)


def _use_gpu(index: int | None = None) -> None:
    if index is not None:
        torch.cuda.set_device(index)


def same_components(name: str, found: Sequence[Iterable[str]]) -> list[str]:
    """The components of a reward, whose sum the trained reward may be. Raises `ValueError` where they differ."""
    for names in found:
        if set(names) != set(found[0]):
            what = f"Reward {name!r} returned the components {sorted(found[0])} and later {sorted(names)}"
            raise ValueError(f"{what}; return the same ones every time, with None where there is no such score.")
    return list(found[0]) if found else []


def _score_chunk(
    previous: "Future[_ChunkScores] | None", name: str, call: Callable[[], Any], prompts: list[str]
) -> _ChunkScores:
    """Raises `ValueError` or `TypeError`, whatever happens; at once if the chunk before raised it."""
    if previous is not None and (error := previous.exception()) is not None:
        raise error
    start = time.perf_counter()
    try:
        result = call()
    except (RewardUnavailableError, ImportError, FileNotFoundError) as error:  # no image is to blame
        raise ValueError(f"Reward {name!r} cannot be used: {error}") from error
    except BaseException as error:  # such as SystemExit: the trainer tells the other processes, and saves
        what = f"Reward {name!r} raised {type(error).__name__}: {error} on {len(prompts)} images, as of {prompts[0]!r}"
        raise ValueError(f"{what}. Return None for an image that cannot be scored.") from error
    parts = result if isinstance(result, dict) else {"reward": result}
    if not parts:
        raise ValueError(f"Reward {name!r} returned an empty dictionary; expected lists of scores by component.")
    whose = {part: f"Reward '{name}/{part}'" if parts is result else f"Reward {name!r}" for part in parts}
    scores = {part: numbers(values, prompts, whose[part]) for part, values in parts.items()}
    rewards = scores.get("reward") or [sum(values) for values in zip(*scores.values(), strict=True)]
    return _ChunkScores(rewards, scores if parts is result else {}, time.perf_counter() - start)
