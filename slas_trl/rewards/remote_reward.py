"""A reward that is served by `slas-trl serve-reward`: somewhere else, or in a process of its own."""

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL.Image import Image

from .base import ModelReward, Reward, RewardUnavailableError, check_pairs, check_positive, require, unwrapped
from .call import numbers
from .http import Endpoint, check_url
from .resolve import resolve_reward, reward_name
from .wire import TOKEN_VARIABLE, Limits, check_token, encode_picture, encode_value, in_threads


_COMMAND = (sys.executable, "-P", "-m", "slas_trl.cli.main", "serve-reward", "--no_warm_up", "--until_stdin_closes")
_LIMITS = ("--max_batch_size", "1000000", "--max_image_pixels", "100000000", "--max_request_bytes", "10000000000")


@dataclass(frozen=True)
class RemoteReward(Reward):
    """
    Asks a server that `slas-trl serve-reward` runs: scores, to the bit, and errors are those of the reward there.
    While the server is away or full, it is asked again, for about two minutes with the default of `retries`.

    Args:
        url (`str`): The server's, as it prints it: http://127.0.0.1:8000.
        token (`str`, *optional*): By default that in the environment, as `SLAS_TRL_REWARD_TOKEN`.
        timeout, retries (*optional*, default to `300`, `10`): Seconds for an attempt, and attempts after the first.
        columns (`str` or `list[str]`, *optional*):
            Columns to send, as a list or "first+second"; "" sends none. By default all: values that JSON has, images.

    Raises:
        `RewardUnavailableError`: when no attempt was answered.
        `ValueError`: when the server refuses, or the reward there fails; with the server's own message.
    """

    default_name = "remote"
    measures = "what a reward on another machine scores"
    blind_to = "what the reward on the other machine is blind to"
    sees_videos = True  # the reward there is given what it sees
    url: str
    token: str | None = field(default=None, repr=False)
    timeout: float = 300.0
    retries: int = 10
    columns: str | Sequence[str] | None = None

    def __post_init__(self):
        check_positive(self.__name__, timeout=self.timeout)
        check_url(self.url, self.__name__)
        check_token(self.token)

    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> Any:
        check_pairs(prompts, images)
        if not images:
            return []
        answers = [self._ask(chunk) for chunk in self._chunks(prompts, images, self._encoded(columns))]
        if any(scores.keys() != answers[0].keys() for scores in answers):
            raise ValueError(f"{self.__name__}: {self.url} answered with other components from one batch to another.")
        scores = {name: [score for answer in answers for score in answer[name]] for name in answers[0]}
        return scores.get(None, scores)

    def _endpoint(self, path: str) -> Endpoint:
        return Endpoint(
            url=check_url(self.url, self.__name__) + path,
            needed_by=self.__name__,
            advice="Is `slas-trl serve-reward` running there? Start it again, or raise timeout or retries.",
            secret=self.token or check_token(os.environ.get(TOKEN_VARIABLE) or None),
            timeout=self.timeout,
            retries=self.retries,
        )

    def _encoded(self, columns: dict[str, Any]) -> dict[str, list[Any]]:
        columns = {k: v for k, v in columns.items() if isinstance(v, (list, tuple)) and k != "completions"}
        names = self.columns.split("+") if isinstance(self.columns, str) else self.columns
        encoded = {}
        for name in columns if names is None else filter(None, names):
            try:
                encoded[name] = [encode_value(value) for value in columns[name]]
            except (KeyError, TypeError, ValueError) as error:
                advice = "Name those to send: columns=first+second, or columns= for none."
                raise ValueError(f"{self.__name__}: column {name!r}: {error}. {advice}") from error
        return encoded

    def _chunks(self, prompts: list[str], images: list[Image], columns: dict[str, list]) -> Iterator[dict[str, Any]]:
        """Requests of as many images as the server takes. It is asked each time: it may have been restarted."""
        limits = self._endpoint("/health").request(lambda answer: Limits(**answer["limits"]))
        pictures = in_threads(encode_picture, images)
        rows = zip(prompts, pictures, *columns.values(), strict=True)
        sizes = [len(json.dumps(row)) + 100 for row in rows]  # and what surrounds them
        start = 0
        for end in range(1, len(images) + 1):
            too_long = sum(sizes[start : end + 1]) > limits.max_request_bytes
            if too_long or end in (len(images), start + limits.max_batch_size):
                chunk = slice(start, end)
                sent = {name: values[chunk] for name, values in columns.items()}
                yield {"prompts": prompts[chunk], "images": pictures[chunk], "columns": sent}
                start = end

    def _ask(self, body: dict[str, Any]) -> dict[str | None, list[float | None]]:
        known = uuid.uuid4().hex

        def read(answer: Any) -> Any:
            if answer["id"] != known:
                raise ValueError("scores for another request.")
            scores = answer["scores"]
            parts = scores if isinstance(scores, dict) and scores else {None: scores}
            for values in parts.values():
                numbers(values, body["prompts"], "It")
            return parts

        return self._endpoint("/score").request(read, {"id": known, **body})


remote = RemoteReward


@dataclass(frozen=True)
class ProcessReward(Reward):
    """
    Runs `slas-trl serve-reward` on this machine, from the first call until this process ends, and asks it one batch at
    a time. If it dies or does not answer in time, it is started again, and the batch tried once more. Rewards with a
    model run on this thread's GPU. Its output goes to this process' standard error.

    Args:
        reward (`str`): By name, with its options. Other users can see it, so keys belong in the environment.
        timeout (`float`, *optional*, defaults to `600`): Seconds for a start, and for a call.

    Raises:
        `RewardUnavailableError`: when the process died or was late twice on a batch.
        `ValueError`: when it cannot be started, or the reward fails, with its message.
    """

    default_name = "process"
    sees_videos = True  # the reward there is given what it sees
    reward: str = field(repr=False)
    timeout: float = 600.0
    _running: "_Running" = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        require("uvicorn", "serve")
        inner = resolve_reward(self.reward)  # refuses a wrong name here and now
        known = {key: getattr(unwrapped(inner), key, None) for key in ("measures", "blind_to")}
        for key, value in {**known, "name": self.name or reward_name(inner), "_running": _Running()}.items():
            object.__setattr__(self, key, value)

    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> Any:
        running = self._running
        with running.lock:
            for again in (True, False):
                running.remote = running.remote or self._start()
                try:
                    return running.remote(prompts, images, **columns)
                except RewardUnavailableError as error:
                    running.remote = running.end()
                    if not again:
                        what = f"The process of {self.name} failed twice on the same {len(images)} images: {error}"
                        raise RewardUnavailableError(what) from None

    def __reduce__(self):  # a copy has a process of its own
        return partial(type(self), name=self.name), (self.reward, self.timeout)

    def _start(self) -> RemoteReward:
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = free.getsockname()
        name, inner, token = self.reward, resolve_reward(self.reward), secrets.token_hex()
        if isinstance(inner, ModelReward) and inner.device is None and torch.cuda.is_initialized():
            name += f"{',' if '=' in name else ':'}device=cuda:{torch.cuda.current_device()}"
        path = os.pathsep.join(entry for entry in sys.path if isinstance(entry, str))  # the same modules as here
        child = subprocess.Popen(
            [*_COMMAND, name, "--port", str(address[1]), *_LIMITS],
            env={**os.environ, TOKEN_VARIABLE: token, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=2,
        )
        self._running.end = weakref.finalize(self, _stop, child, os.getpid())
        start = time.monotonic()
        while child.poll() is None and time.monotonic() - start < self.timeout:
            with suppress(OSError), socket.create_connection(address):
                return RemoteReward(f"http://127.0.0.1:{address[1]}", token, self.timeout, 0, name=self.name)
            time.sleep(0.1)
        self._running.end()
        raise ValueError(f"The process of {self.name} cannot be started: see its error above.")


@dataclass
class _Running:
    """The process of a reward, as far as it is kept."""

    remote: RemoteReward | None = None
    end: Any = None  # kills it
    lock: Any = field(default_factory=threading.Lock)


def _stop(child: subprocess.Popen, owner: int) -> None:
    if owner == os.getpid():  # rather than in a fork, whose parent goes on with it
        child.kill()
        child.wait()
