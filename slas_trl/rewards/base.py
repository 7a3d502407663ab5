"""Common to all rewards: a name, options, and models that are loaded at the first call and shared."""

import functools
import importlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from PIL.Image import Image
from safetensors.torch import load_file


# (prompts, images, **columns) -> a score for each image, or None; or a dictionary of such lists; sync or async
RewardFunc = Callable[..., Any]
Function = TypeVar("Function", bound=Callable)
Item = TypeVar("Item")

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Reward(ABC):
    """
    A reward with options: a callable whose copy with other options is `dataclasses.replace(reward, option=value)`.

    Attributes:
        name (`str`, *optional*): The name in the logs; by default that of the reward.
        measures, blind_to (`str`):
            For the model card: what the reward measures, and what it cannot see. Any callable may have these two.
        sees_videos (`bool`): Whether it is given all frames of a video in a list, rather than the middle one.
    """

    default_name: ClassVar[str]
    measures: ClassVar[str | None] = None
    blind_to: ClassVar[str | None] = None
    sees_videos: ClassVar[bool] = False
    name: str | None = None

    @property
    def __name__(self) -> str:
        return self.name or self.default_name

    @abstractmethod
    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> Any:
        """Scores of these images, see [`~slas_trl.rewards`]."""


def describe(measures: str, blind_to: str) -> Callable[[Function], Function]:
    """The attributes of [`Reward`] for a function."""

    def add(function: Function) -> Function:
        function.__dict__.update(measures=measures, blind_to=blind_to, sees_videos=False)
        return function

    return add


def unwrapped(reward: RewardFunc) -> RewardFunc:
    """The reward itself, where its options are those of a `functools.partial`."""
    while isinstance(reward, functools.partial):
        reward = reward.func
    return reward


@dataclass(frozen=True, kw_only=True)
class ModelReward(Reward):
    """
    A reward with a model, which is loaded at the first call, and shared by rewards with the same one. The first call
    raises `FileNotFoundError` or `ImportError` for what is missing, and `ValueError` for weights of another model.

    Args:
        device (`str`, *optional*): Where the model runs; by default the current GPU, or the CPU where there is none.
        dtype (`str`, *optional*, defaults to `"float32"`): Of weights and activations. bfloat16 is coarse.
        batch_size (`int`, *optional*, defaults to `16`): Images at a time.
    """

    device: str | None = None
    dtype: str = "float32"
    batch_size: int = 16

    def __post_init__(self):
        check_positive(self.__name__, batch_size=self.batch_size)
        torch.device(self.device or "cpu")  # raises an error for what is none
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype of {self.__name__} must be one of {', '.join(DTYPES)}, but it is {self.dtype!r}.")

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> Any:
        check_pairs(prompts, images)
        return self._scores(prompts, images, columns) if images else []

    @abstractmethod
    def _scores(self, prompts: list[str], images: list[Image], columns: dict[str, Any]) -> Any:
        """Scores of at least one image."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def torch_device(self) -> torch.device:
        """With its number, since "cuda" means another one in each process."""
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


class RewardUnavailableError(RuntimeError):
    """A reward cannot score anything at the moment, whatever the image: its server or its process is gone."""


def check_positive(who: str, **options: Any) -> None:
    """Raises `ValueError` for an option of the reward `who` that is no number above 0."""
    for name, value in options.items():
        if not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"{name} of {who} must be a number above 0, but it is {value!r}.")


def check_pairs(prompts: Sequence[str], images: Sequence[Image]) -> None:
    """Raises `ValueError` for numbers of prompts and images that differ."""
    if len(prompts) != len(images):
        raise ValueError(f"Each image needs a prompt, but there are {len(prompts)} prompts and {len(images)} images.")


def in_batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def load_once(function: Function) -> Function:
    """`functools.cache` for what loads a model: threads that ask for the same one at once get one, loaded once."""
    lock, cached = threading.Lock(), functools.cache(function)

    @functools.wraps(function)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with lock:
            return cached(*args, **kwargs)

    return locked  # type: ignore[return-value]


def require(module: str, extra: str) -> ModuleType:
    """An optional package. Raises `ImportError` with the command that installs it, when it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = f'Install it with: pip install "slas-trl[{extra}]"'
        raise ImportError(f"The package {module.split('.')[0]} is needed ({error}). {install}") from error


@contextmanager
def from_hub(place: str, file: str = "") -> Iterator[None]:
    """Around the loading of a place: raises `FileNotFoundError` with the command that fetches what is not there."""
    try:
        yield
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        advice = "Check the path."
        if not Path(place).exists() and place.count("/") == 1:
            advice = f"Run `hf download {place}{file and f' {file}'}`, or give the path of a copy as an option."
        raise FileNotFoundError(f"Cannot load {place} {file}: {str(error)[:300]} {advice}") from error


def hub_file(place: str, file: str) -> Path:
    """A file of a repository on the Hub, cached or downloaded; or of a folder; or `place` if that is a file."""
    path = Path(place) / file if Path(place).is_dir() else Path(place)
    if path.is_file():
        return path
    with from_hub(place, file):
        if Path(place).is_dir():
            raise FileNotFoundError("it is not in this folder.")
        return Path(hf_hub_download(place, file))


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file or of PyTorch's. Raises `ValueError` for a file that holds anything else."""
    try:
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # pickle's errors are of many kinds
        raise ValueError(f"{path} cannot be loaded as weights, tensors alone: {str(error)[:300]}") from error


def put_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: Any, what: str) -> None:
    """Make them the model's, which may be on "meta". Raises `ValueError` for a `source` that does not fit `what`."""
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit {what}. {' '.join(str(error).split())[:500]}") from error
    model.eval().requires_grad_(False)


def load_pretrained(auto: Any, name: str, dtype: torch.dtype) -> Any:
    """A model of transformers. Raises `ValueError` for weights that its checkpoint lacks, which would be random."""
    with from_hub(name):
        model, loaded = auto.from_pretrained(name, dtype=dtype, output_loading_info=True)
    # Buffers are computed where they are missing, which is usual in older checkpoints.
    if missing := loaded["missing_keys"] & dict(model.named_parameters()).keys():
        raise ValueError(f"The weights of {name} lack some of its {type(model).__name__}, as {min(missing)}.")
    return model.eval().requires_grad_(False)
