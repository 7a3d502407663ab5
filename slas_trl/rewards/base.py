"""
What rewards have in common: a name, options that are fixed when they are made, and models that are loaded at the first
call and shared.
"""

import functools
import importlib
import textwrap
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import hf_hub_download
from PIL.Image import Image
from safetensors.torch import load_file


Function = TypeVar("Function", bound=Callable)
Item = TypeVar("Item")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Reward(ABC):
    """
    A reward with options. It is called like a function, and a copy with other options is
    `dataclasses.replace(reward, option=value)`, or "reward:option=value" by name.

    Args:
        name (`str`, *optional*): The name in the logs; by default that of the reward.
    """

    default_name: ClassVar[str]
    name: str | None = None

    @property
    def __name__(self) -> str:
        return self.name or self.default_name

    @abstractmethod
    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> Any:
        """Scores of these images, see [`~slas_trl.rewards`]."""


@dataclass(frozen=True, kw_only=True)
class ModelReward(Reward):
    """
    A reward with a model, which is loaded at the first call, and shared by rewards with the same one.

    Args:
        device (`str`, *optional*): Where the model runs; by default the current GPU, or the CPU where there is none.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Of weights and activations. Features are compared in float32 in any case, but bfloat16 makes them coarse:
            look at the spread within a group first.
        batch_size (`int`, *optional*, defaults to `16`): Images at a time.
    """

    device: str | None = None
    dtype: str = "float32"
    batch_size: int = 16

    def __post_init__(self):
        try:
            torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise ValueError(
                f"device of {self.__name__} must be one of PyTorch's, such as cpu, cuda or cuda:1, but it is "
                f"{self.device!r}."
            ) from error
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype of {self.__name__} must be float32, bfloat16 or float16, but it is {self.dtype!r}."
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size of {self.__name__} must be at least 1, but it is {self.batch_size}.")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def torch_device(self) -> torch.device:
        """With its number, since "cuda" means another one in each process."""
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        return device


class RewardUnavailableError(RuntimeError):
    """A reward cannot score anything at the moment, whatever the image: its server or its process is gone."""


def check_pairs(prompts: Sequence[str], images: Sequence[Image]) -> None:
    """Raises `ValueError` for numbers of prompts and images that differ."""
    if len(prompts) != len(images):
        raise ValueError(
            f"Each image needs its prompt, but there are {len(prompts)} prompts and {len(images)} images."
        )


def in_batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Successive slices of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def load_once(function: Function) -> Function:
    """
    `functools.cache` for what loads a model: threads that ask for the same one at once get one, loaded once. A keyword
    argument `needed_by` is for messages, and does not make it another one.
    """
    lock, loaded = threading.Lock(), {}

    @functools.wraps(function)
    def locked(*args: Any, **kwargs: Any) -> Any:
        key = args, tuple(sorted(item for item in kwargs.items() if item[0] != "needed_by"))
        with lock:
            if key not in loaded:
                loaded[key] = function(*args, **kwargs)
            return loaded[key]

    return locked  # type: ignore[return-value]


def require(module: str, extra: str, needed_by: str) -> ModuleType:
    """
    Import an optional package.

    Raises:
        `ImportError`: when it is missing, with the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{needed_by} needs the package {module.split('.')[0]} ({error}). Install it with: "
            f'pip install "slas-trl[{extra}]"'
        ) from error


def hub_file(repo_id: str, filename: str, needed_by: str, option: str | None = None) -> Path:
    """
    A file of a repository on the Hub, from the cache or downloaded; or the same file in a local folder `repo_id`.

    Args:
        repo_id (`str`): Repository, or a folder.
        filename (`str`): Its path in there.
        needed_by (`str`): The reward's name, for the message.
        option (`str`, *optional*): The option of the reward that takes a path instead.

    Raises:
        `FileNotFoundError`: when it cannot be had, with where it is and where to put it.
    """
    if Path(repo_id).is_dir():
        if (path := Path(repo_id) / filename).is_file():
            return path
        raise FileNotFoundError(f"{needed_by} needs the file {filename}, which is not in the folder {repo_id}.")
    try:
        return Path(hf_hub_download(repo_id, filename))
    except Exception as error:  # offline, no such repository, gated, a full disk
        raise FileNotFoundError(missing_checkpoint(needed_by, repo_id, error, filename, option)) from error


def missing_checkpoint(
    needed_by: str, repo_id: str, error: Exception, filename: str | None = None, option: str | None = None
) -> str:
    """Says which file of which repository is missing, and where to put it."""
    what = f"the file {filename} of" if filename else "the files of"
    if is_path(repo_id):
        return f"{needed_by} needs {what} {repo_id}, which is no file or folder that can be used: {brief(error)}"
    download = f"hf download {repo_id}" + (f" {filename}" if filename else "")
    by_path = f', or give its path ("{needed_by}:{option}=PATH")' if option else ""
    return (
        f"{needed_by} needs {what} https://huggingface.co/{repo_id}, which could not be fetched: "
        f"{brief(error)} Where there is a network, run `{download}`, and copy the folder "
        f"models--{repo_id.replace('/', '--')} of its cache into that of this machine (HF_HUB_CACHE, by default "
        f"~/.cache/huggingface/hub){by_path}."
    )


def is_path(repo_id: str) -> bool:
    """Whether it means something on the disk, there or not, rather than "owner/name" on the Hub."""
    return Path(repo_id).exists() or repo_id.count("/") > 1 or repo_id.startswith((".", "/", "~"))


def brief(error: Exception) -> str:
    """Its message on one line, and not too long."""
    return textwrap.shorten(str(error), 300, placeholder=" …")


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """
    Tensors of a safetensors file, or of one of PyTorch's, of which nothing else is unpickled.

    Raises:
        `ValueError`: for a file that holds more than tensors, or something else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's errors are of many kinds
        raise ValueError(
            f"{path} cannot be loaded as weights ({brief(error)}). Expected tensors alone, in "
            "PyTorch's format or safetensors; other objects are not loaded, since that can run any code. If the file "
            "is cut off, download it again."
        ) from error


def pretrained(loader: Any, repo_id: str, needed_by: str, option: str, **kwargs: Any) -> Any:
    """
    `loader.from_pretrained` of a repository on the Hub or a local folder.

    Raises:
        `FileNotFoundError`: when it cannot be had, with where it is and where to put it.
    """
    try:
        return loader.from_pretrained(repo_id, **kwargs)
    except OSError as error:
        raise FileNotFoundError(missing_checkpoint(needed_by, repo_id, error, option=option)) from error


def fetch_all(*fetches: Callable[[], Any]) -> list[Any]:
    """What each of them returns. Several missing files are told of at once, rather than one after each download."""
    found, missing = [], []
    for fetch in fetches:
        try:
            found.append(fetch())
        except FileNotFoundError as error:
            missing.append(error)
    if missing:
        raise FileNotFoundError("\n".join(map(str, missing))) from missing[0]
    return found
