"""The callback that sees the trained reward rise while one that is held out falls."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

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
