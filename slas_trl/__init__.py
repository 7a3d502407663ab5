"""Super-Linear Advantage Shaping: reinforcement learning for diffusers pipelines, the TRL way."""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from slas_trl.advantages import slas_advantages
    from slas_trl.trainer import SLASConfig, SLASTrainer

__version__ = "0.1.0.dev0"
__all__ = ["SLASConfig", "SLASTrainer", "__version__", "slas_advantages"]

_HOMES = {
    "SLASConfig": "slas_trl.trainer",
    "SLASTrainer": "slas_trl.trainer",
    "slas_advantages": "slas_trl.advantages",
}


def __getattr__(name: str) -> object:
    # Importing torch and diffusers takes seconds: it waits until something that needs them is asked for.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
