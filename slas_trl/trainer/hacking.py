"""The callback that sees the trained reward rise while one that is held out falls."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging


logger = logging.get_logger(__name__)


class RewardHackingCallback(TrainerCallback):
    """
    Warns, or ends training, when in some evaluations in a row the trained reward (`eval_reward`) rose and the mean of
    a held-out one fell: what reward hacking looks like. It goes by the Trainer's history of logs, so that a resumed
    run sees what the uninterrupted one does.

    Args:
        held_out (`Sequence[str]`): Names of the rewards that are not trained on.
        patience (`int`, *optional*, defaults to `3`): Evaluations in a row; the first is compared with one before.
        action (`str`, *optional*, defaults to `"warn"`): Or `"stop"`, which ends training after this evaluation.
    """

    def __init__(self, held_out: Sequence[str], patience: int = 3, action: str = "warn"):
        self.held_out, self.patience, self.action = list(held_out), patience, action

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        for key in metrics or {}:
            if match := re.fullmatch(r"(eval(?:_.+)?)_reward", key):
                self._judge(match[1], state, control)

    def _judge(self, prefix: str, state: Any, control: Any) -> None:
        evaluations = {log.get("step"): log for log in state.log_history if f"{prefix}_reward" in log}  # one a step
        history = list(evaluations.values())[-self.patience - 1 :]
        if len(history) <= self.patience or not _moves(history, f"{prefix}_reward", 1):
            return
        for name in self.held_out:
            key = f"{prefix}_rewards/{name}/mean"
            if not _moves(history, key, -1):
                continue
            first, last = history[0], history[-1]
            logger.warning(
                f"The trained reward rose in {self.patience} evaluations in a row ({first[f'{prefix}_reward']:.4g} to "
                f"{last[f'{prefix}_reward']:.4g}), while the held-out {name!r} fell ({first[key]:.4g} to "
                f"{last[key]:.4g}): likely reward hacking. Look at the samples; an earlier checkpoint may be the "
                "better one."
            )
            if self.action == "stop" and not control.should_training_stop:
                logger.warning(f"Training ends at step {state.global_step} (hacking_action is 'stop').")
                control.should_training_stop = True


def _moves(history: Sequence[Mapping[str, float]], key: str, sign: int) -> bool:
    """Whether a metric goes one way at every step; NaN goes none."""
    values = [log.get(key, float("nan")) for log in history]
    return all(sign * (after - before) > 0 for before, after in zip(values, values[1:], strict=False))
