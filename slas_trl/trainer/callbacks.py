"""Callbacks of [`SLASTrainer`]: progress, metrics on disk, prompts by epoch, reward hacking."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from ..run_files import METRICS, read_lines, write_lines
from .sampling import EpochRepeatSampler
from .slas_config import SLASConfig


logger = logging.get_logger(__name__)


class RLProgressCallback(ProgressCallback):
    """The progress bar with the figures that matter, in place of a line for each log."""

    SHOWN = {"reward": "reward", "reward_std": "std", "kl": "kl", "clip_ratio/region_mean": "clip"}
    SHOWN |= {"images_per_second": "images/s"}

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}  # the last of each: not every update samples a rollout

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs:
            self._shown |= {label: f"{logs[key]:.3g}" for key, label in self.SHOWN.items() if key in logs}
            self.training_bar.set_postfix(self._shown)
            if evaluated := {key: f"{value:.4g}" for key, value in logs.items() if key.startswith("eval_reward")}:
                self.training_bar.write(f"step {state.global_step}: {evaluated}")


class DenoiserTensorBoardCallback(TensorBoardCallback):
    """TensorBoard without the model's configuration, which for a diffusers model is a dictionary."""

    def on_train_begin(self, args, state, control, **kwargs):
        kwargs.pop("model", None)
        super().on_train_begin(args, state, control, **kwargs)


class StepFileCallback(TrainerCallback):
    """A file with a JSON object a line, each with a step; a resumed run drops the lines that it is about to repeat."""

    file: str
    resumed_at: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.resumed_at = state.global_step

    def append(self, args: SLASConfig, record: dict[str, Any]) -> None:
        path, step = args.run_dir / self.file, self.resumed_at
        if step is not None:  # not before there is something to log: a run that fails at once leaves the file
            lines = read_lines(path) if step and path.exists() else []
            write_lines(path, (line for line in lines if line["step"] <= step and "train_runtime" not in line))
            self.resumed_at = None
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class MetricsFileCallback(StepFileCallback):
    """One line for each log in `metrics.jsonl`."""

    file = METRICS

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step >= state.max_steps:
            logger.warning(f"Nothing is trained: the run ended at update {state.global_step}. Raise max_steps.")
        path = args.run_dir / self.file
        if state.is_world_process_zero and state.global_step and not path.exists():  # resumed in another folder
            write_lines(path, state.log_history)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            self.append(args, {"step": state.global_step, **logs})


@dataclass(eq=False)
class PromptOrderCallback(TrainerCallback):
    """Tells the sampler the epoch, so that a resumed run draws the prompts of the interrupted one."""

    sampler: EpochRepeatSampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = int((state.epoch or 0) + 1e-6)  # a resumed run begins within an epoch


@dataclass(eq=False)
class RewardHackingCallback(TrainerCallback):
    """
    Warns, or ends training, when in some evaluations in a row the trained reward (`eval_reward`) rose and the mean of
    a held-out one fell: what reward hacking looks like. It goes by the Trainer's history of logs, so that a resumed
    run sees what the uninterrupted one does.
    """

    held_out: Sequence[str]  # names of the rewards that are not trained on
    patience: int  # evaluations in a row; the first is compared with one before
    action: str  # "warn", or "stop"

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        for key in metrics or {}:
            if key.startswith("eval_") and key.endswith("_reward"):  # "eval_reward", or "eval_{data set}_reward"
                logs = {log["step"]: log for log in state.log_history if key in log}  # one a step
                for warning in self._warnings(list(logs.values())[-self.patience - 1 :], key):
                    logger.warning(f"{warning} Look at the samples; an earlier checkpoint may be the better one.")
                    if self.action == "stop" and not control.should_training_stop:
                        logger.warning(f"Training ends at step {state.global_step} (hacking_action is 'stop').")
                        control.should_training_stop = True

    def _warnings(self, logs: Sequence[Mapping[str, float]], trained: str) -> list[str]:
        """One for each held-out reward that fell throughout the evaluations `logs` while the trained one rose."""
        if len(logs) <= self.patience or not _moves(logs, trained, 1):
            return []
        first, last = logs[0], logs[-1]
        return [
            f"The trained reward rose in {self.patience} evaluations in a row ({first[trained]:.4g} to "
            f"{last[trained]:.4g}), while the held-out {name!r} fell ({first[key]:.4g} to {last[key]:.4g}): "
            "likely reward hacking."
            for name in self.held_out
            if _moves(logs, key := f"{trained}s/{name}/mean", -1)
        ]


def _moves(logs: Sequence[Mapping[str, float]], key: str, sign: int) -> bool:
    """Whether a metric goes one way at every step; NaN goes none."""
    return all(sign * (after - before) > 0 for before, after in pairwise(log.get(key, float("nan")) for log in logs))
