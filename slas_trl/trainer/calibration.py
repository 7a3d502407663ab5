"""The callback that records and shows rollouts: in `calibration.jsonl`, `calibration.png` and the trackers."""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from ..advantages import Advantages
from ..run_files import CALIBRATION, ROLLOUTS
from .callbacks import StepFileCallback


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


@dataclass(eq=False)
class CalibrationCallback(StepFileCallback):
    """Draws at checkpoints, at the end and when a run is interrupted; before the trackers, some of which end then."""

    handler: CallbackHandler
    file: ClassVar = ROLLOUTS

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
            self.show(args, {"calibration": picture}, [reading.text], state.global_step, "reading")

    def show(self, args: Any, images: Mapping[str, Image.Image], captions: list[str], step: int, what: str) -> None:
        """Pictures by name in every tracker that can show them; `what` their captions are."""
        if not images:
            return
        pairs = list(zip(images.items(), captions, strict=True))
        for callback in self.handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                for (name, image), caption in pairs:
                    callback.tb_writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
                    callback.tb_writer.add_text(f"{name}/{what}", caption, step)
        for tracker in {"trackio", "wandb"} & {*args.report_to}:
            module: Any = importlib.import_module(tracker)
            shown = {name: module.Image(image, caption=caption) for (name, image), caption in pairs}
            module.log({**shown, "train/global_step": step})
