"""`SLASTrainer` and its configuration."""

from .slas_config import SLASConfig
from .slas_trainer import SLASTrainer


__all__ = ["SLASConfig", "SLASTrainer"]
