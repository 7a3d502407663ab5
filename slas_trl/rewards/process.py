"""A reward in a process of its own: beside the training rather than in turns with it, and crashing by itself."""

import os
import queue
import re
import secrets
import subprocess
import sys
import threading
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from PIL.Image import Image

from .base import ModelReward, Reward, RewardUnavailableError, require, unwrapped
from .http import check_patience
from .remote_reward import RemoteReward
from .resolve import masked, resolve_reward, reward_name
from .wire import TOKEN_VARIABLE


_COMMAND = (sys.executable, "-P", "-m", "slas_trl.cli.main", "serve-reward")
_OPTIONS = (
    *("--port", "0", "--no_warm_up", "--until_stdin_closes", "--max_batch_size", "1000000"),
    *("--max_image_pixels", "100000000", "--max_request_bytes", "10000000000"),
)


@dataclass(frozen=True)
class ProcessReward(Reward):
    """
    Runs `slas-trl serve-reward` at a free port of this machine, from the first call until this process ends, and asks
    it as [`~slas_trl.rewards.RemoteReward`] does, one batch at a time. If the process dies or does not answer in time,
    it is started again, and the batch tried once more. Rewards with a model run on this thread's GPU.

    Args:
        reward (`str`):
            A reward by name, with its options. Other users can see it, so keys belong in the environment.
        timeout (`float`, *optional*, defaults to `600`): Seconds for a start, and for a call.

    Raises:
        `RewardUnavailableError`: when the process died or was late twice on a batch.
        `ValueError`: when it cannot be started, or the reward fails, with its message.
    """

    default_name = "process"
    sees_videos = True  # the reward there is given what it sees
    reward: str = field(repr=False)
    timeout: float = 600.0
    _server: "_Server" = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if not isinstance(self.reward, str):
            raise TypeError(f"A process of its own needs a reward by name, but got {masked(repr(self.reward))}.")
        check_patience(masked(self.reward), self.timeout)
        require("uvicorn", "serve")
        inner = resolve_reward(self.reward)  # refuses a wrong name here and now
        name, text = self.name or reward_name(inner), self.reward
        if isinstance(inner, ModelReward) and inner.device is None and torch.cuda.is_initialized():
            text += f"{',' if '=' in text else ':'}device=cuda:{torch.cuda.current_device()}"
        known = {key: getattr(unwrapped(inner), key, None) for key in ("measures", "blind_to")}
        for key, value in {**known, "name": name, "_server": _Server(text, self.timeout, name)}.items():
            object.__setattr__(self, key, value)

    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> Any:
        return self._server.score(prompts, images, columns)

    def __reduce__(self):  # a copy has a process of its own
        return partial(type(self), name=self.name), (self.reward, self.timeout)


class _Server:
    """The process, from its parent's side."""

    def __init__(self, reward: str, timeout: float, name: str):
        self.reward, self.timeout, self.name = reward, timeout, name
        self.lock, self.printed = threading.Lock(), deque[str](maxlen=20)
        self.remote: RemoteReward | None = None
        self.end: Any = None

    def score(self, prompts: list[str], images: list[Image], columns: dict[str, Any], again: bool = True) -> Any:
        with self.lock:
            self.remote = self.remote or self._start()
            try:
                return self.remote(prompts, images, **columns)
            except RewardUnavailableError as error:
                self.remote = self.end()
                if not again:
                    what = f"The process of {self.name} failed twice on the same {len(images)} images: {error}"
                    raise RewardUnavailableError(f"{what} It printed: {''.join(self.printed)}") from None
        return self.score(prompts, images, columns, again=False)

    def _start(self) -> RemoteReward:
        token, address = secrets.token_hex(), queue.SimpleQueue()
        path = os.pathsep.join(entry for entry in sys.path if isinstance(entry, str))  # the same modules as here
        child = subprocess.Popen(
            [*_COMMAND, self.reward, *_OPTIONS],
            env={**os.environ, TOKEN_VARIABLE: token, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.end = weakref.finalize(self, _stop, child, os.getpid())
        threading.Thread(target=_listen, args=(child.stdout, address, self.printed), daemon=True).start()
        with suppress(queue.Empty):
            if url := address.get(timeout=self.timeout):
                return RemoteReward(url, token, self.timeout, 0, name=self.name)
        self.end()
        raise ValueError(f"The process of {self.name} cannot be started. It printed: {''.join(self.printed)}")


def _listen(output: Any, address: queue.SimpleQueue, printed: deque[str]) -> None:
    """Pass on what the process prints, and the address that it serves at, or `None` if it ends."""
    for line in output:
        if found := re.match(r"Serving .* at (http://127\.0\.0\.1:\d+) ", line):
            address.put(found[1])
        else:
            printed.append(line)
            sys.stderr.write(line)
    address.put(None)


def _stop(child: subprocess.Popen, owner: int) -> None:
    if owner == os.getpid():  # rather than in a fork, whose parent goes on with it
        child.kill()
        child.wait()
