"""The callback that records every rollout in `calibration.jsonl` and draws `calibration.png`."""

import math
from collections.abc import Mapping
from typing import Any, cast

from PIL import Image
from transformers import TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from ..advantages import Advantages
from ..run_files import CALIBRATION, ROLLOUTS
from .callbacks import StepFileCallback, show_images


logger = logging.get_logger(__name__)


def rollout_record(
    scale_rewards: str, weights: Mapping[str, float], result: Advantages, metrics: Mapping[str, float]
) -> dict[str, Any]:
    """
    A line of `calibration.jsonl`: `metrics` from `rollout_metrics`, std and Σ|A| of each group, and the `weights` of
    all rewards by name, 0 for those that are held out. `None` is no number.
    """
    rewards = result.rewards[~result.rewards.isnan()]
    numbers = {**metrics, "reward_std_of_images": rewards.std(correction=0).item() if len(rewards) else math.nan}
    groups = {"group_std": result.group_std, "group_abs_advantage": result.group_abs_advantages}
    return {
        "scale_rewards": scale_rewards,
        "weights": weights,
        **{key: _short(value) for key, value in numbers.items()},
        **{key: [_short(value) for value in values.tolist()] for key, values in groups.items()},
    }


def _short(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")


class CalibrationCallback(StepFileCallback):
    """
    Draws at every checkpoint, at the end of training, and when a run is interrupted. Its place is before the trackers,
    some of which end with training.
    """

    file = ROLLOUTS

    def __init__(self, handler: CallbackHandler):
        self.handler = handler

    def on_save(self, args, state, control, **kwargs):
        if not control.should_training_stop:  # at the end there may be more to draw
            self.draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.draw(args, state)

    def draw(self, args: Any, state: TrainerState) -> None:
        """Write the picture, and show it in the trackers. A run does not fail because of it."""
        if not state.is_world_process_zero or not (args.run_dir / ROLLOUTS).is_file():
            return
        from ..reports.calibration_panel import plot_calibration  # matplotlib, not before it is needed

        try:
            reading = plot_calibration(args.run_dir / ROLLOUTS)
        except (OSError, ValueError) as error:
            logger.warning(f"The calibration panel could not be drawn, and training goes on: {error}")
            return
        with Image.open(args.run_dir / CALIBRATION) as picture:
            trackers, callbacks, step = cast(list, args.report_to), self.handler.callbacks, state.global_step
            show_images(trackers, callbacks, {"calibration": picture}, [reading.text], step, caption_is="reading")
