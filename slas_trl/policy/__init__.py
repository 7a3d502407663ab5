"""Any diffusers pipeline as a stochastic policy: record one call, execute it again for the gradient of one step."""

from .checks import RatioReport, check_pipeline, find_dropout
from .pictures import call_pipeline
from .replayer import PipelineReplayer, measure_ratio
from .rollout import ReplayError, Rollout, Step, StepOutput


__all__ = [
    "PipelineReplayer",
    "RatioReport",
    "ReplayError",
    "Rollout",
    "Step",
    "StepOutput",
    "call_pipeline",
    "check_pipeline",
    "find_dropout",
    "measure_ratio",
]
