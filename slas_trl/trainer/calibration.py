"""The callback that records every rollout in `calibration.jsonl` and draws `calibration.png`."""

import math
from typing import Any, cast

from PIL import Image
from transformers import TrainerState
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from ..advantages import Advantages
from ..calibration import CALIBRATION_FILE
from .callbacks import METRICS_FILE, StepFileCallback, show_images
from .slas_config import SLASConfig


logger = logging.get_logger(__name__)


def rollout_record(
    args: SLASConfig, names: list[str], result: Advantages, metrics: dict[str, float]
) -> dict[str, Any]:
    """
    What the panel needs of a rollout, for one line of JSON: its metrics (those of `rollout_metrics`), and std and Σ|A|
    of each group. `None` is no number.
    """
    rewards = result.rewards[~result.rewards.isnan()]
    numbers = {
        **metrics,
        "reward_std_of_images": rewards.std(correction=0).item() if len(rewards) else math.nan,
        "group_std": result.group_std.tolist(),
        "group_abs_advantage": result.group_abs_advantages.tolist(),
    }
    weights = dict(zip(names, args.reward_weights or [1.0] * len(names), strict=True))
    return {"scale_rewards": args.scale_rewards, "weights": weights} | {
        key: [_short(v) for v in value] if isinstance(value, list) else _short(value) for key, value in numbers.items()
    }


def _short(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")


class CalibrationCallback(StepFileCallback):
    """
    Draws at every checkpoint, at the end of training, and when a run is interrupted. Its place is before the trackers,
    some of which end with training.
    """

    file = CALIBRATION_FILE

    def __init__(self, handler: CallbackHandler):
        self.handler = handler

    def on_save(self, args, state, control, **kwargs):
        if not control.should_training_stop:  # at the end there may be more to draw
            self.draw(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.draw(args, state)

    def draw(self, args: Any, state: TrainerState) -> None:
        """Write the picture, and show it in the trackers. A run does not fail because of it."""
        folder = args.run_dir
        if not state.is_world_process_zero or not (folder / CALIBRATION_FILE).is_file():
            return
        from ..calibration_panel import CALIBRATION_PICTURE, plot_calibration  # matplotlib, not before it is needed

        try:
            reading = plot_calibration(folder / CALIBRATION_FILE, folder / METRICS_FILE)
        except (OSError, ValueError) as error:
            logger.warning(f"The calibration panel could not be drawn, and training goes on: {error}")
            return
        with Image.open(folder / CALIBRATION_PICTURE) as picture:
            show_images(
                cast(list, args.report_to),
                self.handler.callbacks,
                {"calibration": picture},
                [reading.text],
                state.global_step,
                caption_is="reading",
            )
