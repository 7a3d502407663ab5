"""A reward in a process of its own: beside the training rather than in turns with it, and crashing by itself."""

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL.Image import Image

from slas_trl.rewards.base import Reward, RewardUnavailableError, check_pairs
from slas_trl.rewards.by_name import resolve_reward, reward_name
from slas_trl.rewards.calling import call_reward
from slas_trl.rewards.wire import columns_of


# Raised here as what they were there; any other is a RuntimeError with its name.
_KINDS = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, ImportError, FileNotFoundError, OSError, RuntimeError, RewardUnavailableError)
}

# The child finds modules where its parent does. Not multiprocessing, which would run the user's script again.
_COMMAND = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from slas_trl.rewards.process import run; run()"


@dataclass(frozen=True)
class ProcessReward(Reward):
    """
    Calls a reward in a process of its own, which is started at the first call, and ends with this one. It is given one
    batch at a time; calls from several threads wait for each other. What it prints goes to stderr.

    If the process dies (out of memory, a crash of native code), it is started again, and the batch tried once more.

    Args:
        reward (`str`): A reward by name, with its options: "ocr", "hpsv2:device=cuda:1", "my_rewards.py:sharpness".

    Raises:
        `RewardUnavailableError`: when the process died twice on a batch.
    """

    default_name: ClassVar[str] = "process"
    reward: str
    _worker: "_Worker" = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if not isinstance(self.reward, str):
            raise TypeError(
                f"A process of its own needs a reward by name, since a function cannot be sent there, but got "
                f"{self.reward!r}. Use package.module:function or file.py:function."
            )
        inner = reward_name(resolve_reward(self.reward))  # refuses a wrong name here and now
        object.__setattr__(self, "name", self.name or inner)
        object.__setattr__(self, "_worker", _Worker(self.reward))

    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> Any:
        check_pairs(prompts, images)
        return self._worker.call(list(prompts), list(images), columns_of(columns, len(images)))

    def __reduce__(self):
        return _made, (self.reward, self.name)  # a copy has a process of its own


def _made(reward: str, name: str | None) -> ProcessReward:
    return ProcessReward(reward, name=name)


class _Worker:
    """The process, from its parent's side."""

    def __init__(self, reward: str):
        self.reward = reward
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.owner = 0  # the id of the process that started it

    def call(self, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]) -> Any:
        request = _pickled(prompts, images, columns)
        with self.lock:
            for attempt in range(2):
                try:
                    kind, answer, trace = self._exchange(request)
                    break
                except (OSError, EOFError, pickle.UnpicklingError) as error:
                    ended = self._end()
                    if attempt:
                        raise RewardUnavailableError(
                            f"The process of the reward {self.reward!r} ended twice on the same {len(images)} images, "
                            f"{ended} ({type(error).__name__}). Look above for what it said; try fewer images at a "
                            "time, or the reward in this process."
                        ) from error
        if kind is None:
            return answer
        error = _KINDS[kind](answer) if kind in _KINDS else RuntimeError(f"{kind}: {answer}")
        error.add_note(f"In the process of the reward {self.reward!r}:\n{trace}")
        raise error

    def _exchange(self, request: bytes) -> tuple[str | None, Any, str]:
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
            self.process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self.owner = os.getpid()
            self._send(pickle.dumps(self.reward))
        self._send(request)
        assert self.process.stdout is not None
        return pickle.load(self.process.stdout)

    def _send(self, message: bytes) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(message)
        self.process.stdin.flush()

    def _end(self) -> str:
        """Makes sure that it is gone, and says how it went."""
        process, self.process = self.process, None
        if process is None:
            return "it could not be started"
        try:
            status = process.wait(1)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was written and never read
                pipe.close()  # type: ignore[union-attr]
        return f"by signal {-status}" if status < 0 else f"with status {status}"


def _pickled(prompts: list[str], images: list[Image], columns: dict[str, list[Any]]) -> bytes:
    try:
        return pickle.dumps((prompts, images, columns))
    except Exception as error:
        for name, values in columns.items():
            try:
                pickle.dumps(values)
            except Exception as single:
                raise TypeError(f"Column {name!r} cannot be sent to another process: {single}.") from single
        raise TypeError(f"The images cannot be sent to another process: {error}.") from error


def run() -> None:
    """What the process does: answers requests until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    requests = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that what the reward prints is no answer
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def receive() -> None:
        while True:
            try:
                received.put(pickle.load(requests))
            except (EOFError, OSError, pickle.UnpicklingError):
                os._exit(0)  # even from a long calculation
            except Exception as error:  # a class of the data set that cannot be had here
                received.put(error)

    threading.Thread(target=receive, daemon=True).start()
    reward, name = None, received.get()
    while True:
        request = received.get()
        try:
            if isinstance(request, Exception):
                raise request
            reward = reward or resolve_reward(name)
            answer = (None, call_reward(reward, *request), "")
            message = pickle.dumps(answer)
        except (Exception, SystemExit) as error:
            kind = next((kind for kind in type(error).__mro__ if kind.__name__ in _KINDS), type(error))
            text = str(error) if kind is type(error) else f"{type(error).__name__}: {error}"
            message = pickle.dumps((kind.__name__, text, traceback.format_exc()))
        answers.write(message)
        answers.flush()
