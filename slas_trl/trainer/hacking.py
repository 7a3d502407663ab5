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
            if match := _REWARD.fullmatch(key):
                self._judge(match[1], state, control)

    def _judge(self, prefix: str, state: Any, control: Any) -> None:
        history = _evaluations(state.log_history, prefix)[-self.patience - 1 :]
        for warning in _warnings(history, prefix, self.held_out, self.patience):
            logger.warning(f"{warning} Look at the samples; an earlier checkpoint may be the better one.")
            if self.action == "stop" and not control.should_training_stop:
                logger.warning(f"Training ends at step {state.global_step} (hacking_action is 'stop').")
                control.should_training_stop = True


def find_hacking(log_history: Sequence[Mapping[str, Any]], held_out: Sequence[str], patience: int) -> list[str] | None:
    """
    What [`RewardHackingCallback`] has warned of in a run, from its logs: the last warning for each reward. `None`
    where it could not have: without held-out rewards, or with too few evaluations.
    """
    last: dict[tuple[str, str], str] = {}
    longest = 0
    for prefix in dict.fromkeys(m[1] for log in log_history for key in log if (m := _REWARD.fullmatch(key))):
        history = _evaluations(log_history, prefix)
        longest = max(longest, len(history))
        for end in range(patience + 1, len(history) + 1):
            for name in held_out:
                for warning in _warnings(history[end - patience - 1 : end], prefix, [name], patience):
                    last[prefix, name] = warning
    return list(last.values()) if held_out and longest > patience else None


_REWARD = re.compile(r"(eval(?:_.+)?)_reward")


def _evaluations(log_history: Sequence[Mapping[str, Any]], prefix: str) -> list[Mapping[str, Any]]:
    return list({log.get("step"): log for log in log_history if f"{prefix}_reward" in log}.values())  # one a step


def _warnings(history: Sequence[Mapping[str, Any]], prefix: str, held_out: Sequence[str], patience: int) -> list[str]:
    """One for each held-out reward that fell throughout `history` while the trained one rose."""
    if len(history) <= patience or not _moves(history, f"{prefix}_reward", 1):
        return []
    first, last = history[0], history[-1]
    return [
        f"The trained reward rose in {patience} evaluations in a row ({first[f'{prefix}_reward']:.4g} to "
        f"{last[f'{prefix}_reward']:.4g}), while the held-out {name!r} fell ({first[key]:.4g} to {last[key]:.4g}): "
        "likely reward hacking."
        for name in held_out
        if _moves(history, key := f"{prefix}_rewards/{name}/mean", -1)
    ]


def _moves(history: Sequence[Mapping[str, float]], key: str, sign: int) -> bool:
    """Whether a metric goes one way at every step; NaN goes none."""
    values = [log.get(key, float("nan")) for log in history]
    return all(sign * (after - before) > 0 for before, after in zip(values, values[1:], strict=False))
