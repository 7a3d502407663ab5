"""A reward in a process of its own: beside the training rather than in turns with it, and crashing by itself."""

import contextlib
import itertools
import json
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL.Image import Image

from slas_trl.rewards.base import Reward, RewardUnavailableError, check_pairs
from slas_trl.rewards.by_name import masked, resolve_reward, reward_name
from slas_trl.rewards.calling import call_reward
from slas_trl.rewards.exiting import CHECK_SECONDS, program_ends
from slas_trl.rewards.wire import columns_of


# Raised here as what they were there; any other is a RuntimeError with its name.
_KINDS = {
    kind.__name__: kind
    for kind in (ValueError, TypeError, ImportError, FileNotFoundError, OSError, RuntimeError, RewardUnavailableError)
}

# The child finds modules where its parent does. Not multiprocessing, which would run the user's script again.
_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from slas_trl.rewards.process import run; run(int(sys.argv[2]))"
)
_HEADER = struct.Struct(">QQ")  # of a message: the number of the request, and the length of what follows


@dataclass(frozen=True)
class ProcessReward(Reward):
    """
    Calls a reward in a process of its own, which is started at the first call, and ends with this one. It is given one
    batch at a time; calls from several threads wait for each other. What it prints goes to stderr.

    If the process dies (out of memory, a crash of native code) or does not answer in time, it is started again, and
    the batch tried once more. "cuda" is there what it is in the thread that calls it first.

    Args:
        reward (`str`): A reward by name, with its options: "ocr", "hpsv2:device=cuda:1", "my_rewards.py:sharpness".
        timeout (`float`, *optional*, defaults to `600`):
            Seconds for one call; the first one also starts the process, and loads or downloads the model.

    Raises:
        `RewardUnavailableError`: when the process died twice on a batch, or was late twice.
    """

    default_name: ClassVar[str] = "process"
    reward: str = field(repr=False)
    timeout: float = 600.0
    _worker: "_Worker" = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if not isinstance(self.reward, str):
            raise TypeError(
                f"A process of its own needs a reward by name, since a function cannot be sent there, but got "
                f"{masked(repr(self.reward))}. Use package.module:function or file.py:function."
            )
        if not self.timeout > 0:
            raise ValueError(f"timeout of {masked(self.reward)!r} must be above 0 seconds, but it is {self.timeout}.")
        inner = reward_name(resolve_reward(self.reward))  # refuses a wrong name here and now
        object.__setattr__(self, "name", self.name or inner)
        object.__setattr__(self, "_worker", _Worker(self.reward, self.timeout))

    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> Any:
        check_pairs(prompts, images)
        return self._worker.call(list(prompts), list(images), columns_of(columns, len(images)))

    def __reduce__(self):
        return _made, (self.reward, self.timeout, self.name)  # a copy has a process of its own


def _made(reward: str, timeout: float, name: str | None) -> ProcessReward:
    return ProcessReward(reward, timeout, name=name)


class _Worker:
    """The process, from its parent's side."""

    def __init__(self, reward: str, timeout: float):
        self.reward, self.shown, self.timeout = reward, masked(reward), timeout
        self.lock = threading.Lock()
        self.numbers = itertools.count()
        self.process: subprocess.Popen | None = None
        self.connection: socket.socket | None = None
        self.owner = 0  # the id of the process that started it
        self.finalizer: weakref.finalize | None = None

    def call(self, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]) -> Any:
        request = _packed(prompts, images, columns)
        with self.lock:
            for attempt in range(2):
                try:
                    kind, answer, trace = self._exchange(request)
                    break
                except (OSError, EOFError, pickle.UnpicklingError) as error:
                    late = isinstance(error, TimeoutError)
                    ended = self._end(at_once=late)
                    if attempt:
                        what = f"did not answer within {self.timeout:g} s (its timeout)" if late else "ended"
                        how = "and was ended" if late else f"{ended} ({type(error).__name__})"
                        raise RewardUnavailableError(
                            f"The process of the reward {self.shown!r} {what} twice on the same {len(images)} "
                            f"images, {how}. Look above for what it said; try fewer images at a time, or the reward "
                            "in this process."
                        ) from error
                except BaseException:  # Ctrl-C: an answer on its way must not become that to the next request
                    self._end(at_once=True)
                    raise
        if kind is None:
            return answer
        error = _KINDS[kind](answer) if kind in _KINDS else RuntimeError(f"{kind}: {answer}")
        error.add_note(f"In the process of the reward {self.shown!r}:\n{trace}")
        raise error

    def _exchange(self, request: bytes) -> tuple[str | None, Any, str]:
        end = time.monotonic() + self.timeout
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            self._start()
        process, connection = self.process, self.connection
        assert process is not None and connection is not None

        def waiting() -> None:
            if program_ends():
                raise RewardUnavailableError(f"The reward {self.shown!r} is not waited for, since the program ends.")
            if time.monotonic() > end:
                raise TimeoutError(f"no answer in {self.timeout:g} s")
            if process.poll() is not None:  # and somebody that it started holds the connection
                raise EOFError("the process is gone")

        number = next(self.numbers)
        _send(connection, number, request, waiting)
        answered, message = _receive(connection, waiting)
        if answered != number:
            raise EOFError(f"an answer to request {answered} rather than {number}")
        return pickle.loads(message)

    def _start(self) -> None:
        self._end(at_once=True)
        path = json.dumps([entry for entry in sys.path if isinstance(entry, str)])
        # A connection of their own, so that nothing that is printed can get into the answers.
        self.connection, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", _COMMAND, path, str(theirs.fileno())]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2, pass_fds=[theirs.fileno()])
        self.owner = os.getpid()
        self.finalizer = weakref.finalize(self, _stop, self.process, self.connection, self.owner)
        self.connection.settimeout(CHECK_SECONDS)
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        _send(self.connection, 0, pickle.dumps((self.reward, gpu)))

    def _end(self, at_once: bool) -> str:
        """Makes sure that it is gone, and says how it went."""
        process, self.process = self.process, None
        if self.finalizer is None or process is None:
            return "it could not be started"
        if not at_once:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        self.finalizer()
        status = process.returncode or 0
        return f"by signal {-status}" if status < 0 else f"with status {status}"


def _stop(process: subprocess.Popen, connection: socket.socket, owner: int) -> None:
    connection.close()
    if owner == os.getpid():  # rather than in a fork, whose parent goes on with it
        process.kill()
        process.wait()


def _packed(prompts: list[str], images: list[Image], columns: dict[str, list[Any]]) -> bytes:
    """Each column by itself, so that both sides can name the one that cannot be sent."""

    def pickled(values: Any, what: str) -> bytes:
        try:
            return pickle.dumps(values)
        except Exception as error:
            raise TypeError(f"{what} cannot be sent to another process: {error}.") from error

    packed = {name: pickled(values, f"Column {name!r}") for name, values in columns.items()}
    return pickled((prompts, images, packed), "The images")


def _unpacked(request: bytes | bytearray) -> tuple[list[str], list[Image], dict[str, list[Any]]]:
    prompts, images, packed = pickle.loads(request)
    columns = {}
    for name, values in packed.items():
        try:
            columns[name] = pickle.loads(values)
        except Exception as error:
            raise TypeError(
                f"Column {name!r} cannot be had in another process: {error}. Its class has to be in a module that can "
                "be imported there, which a script or notebook is not."
            ) from error
    return prompts, images, columns


def _send(
    connection: socket.socket, number: int, message: bytes, waiting: Callable[[], object] = lambda: None
) -> None:
    """A message. `waiting` is called each time that nothing could be sent for a while, and may raise."""
    for part in (_HEADER.pack(number, len(message)), message):
        rest = memoryview(part)
        while rest:
            try:
                rest = rest[connection.send(rest) :]
            except TimeoutError:
                waiting()


def _receive(connection: socket.socket, waiting: Callable[[], object] = lambda: None) -> tuple[int, bytearray]:
    """
    The number of a message, and the message.

    Raises:
        `EOFError`: when the other side is gone.
    """

    def read(length: int) -> bytearray:
        data = bytearray(length)
        rest = memoryview(data)
        while rest:
            try:
                count = connection.recv_into(rest)
            except TimeoutError:
                waiting()
                continue
            if not count:
                raise EOFError("the other side is gone")
            rest = rest[count:]
        return data

    number, length = _HEADER.unpack(read(_HEADER.size))
    return number, read(length)


def run(descriptor: int) -> None:
    """What the process does: answers requests until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = socket.socket(fileno=descriptor)
    connection.set_inheritable(False)
    received: queue.SimpleQueue[tuple[int, bytearray]] = queue.SimpleQueue()

    def receive() -> None:
        while True:
            try:
                received.put(_receive(connection))
            except (EOFError, OSError):
                os._exit(0)  # even from a long calculation

    threading.Thread(target=receive, daemon=True).start()
    name, gpu = pickle.loads(received.get()[1])
    if gpu is not None:
        torch.cuda.set_device(gpu)
    reward = None
    while True:
        number, request = received.get()
        try:
            prompts, images, columns = _unpacked(request)
            reward = reward or resolve_reward(name)
            message = pickle.dumps((None, call_reward(reward, prompts, images, columns), ""))
        except BaseException as error:  # whatever a reward raises
            kind = next((kind for kind in type(error).__mro__ if kind.__name__ in _KINDS), type(error))
            text = str(error) if kind is type(error) else f"{type(error).__name__}: {error}"
            message = pickle.dumps((kind.__name__, text, traceback.format_exc()))
        _send(connection, number, message)
