"""Callbacks of [`SLASTrainer`]: progress, metrics on disk, pictures in the trackers, prompts by epoch."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL.Image import Image
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

    SHOWN = {
        "reward": "reward",
        "reward_std": "std",
        "kl": "kl",
        "clip_ratio/region_mean": "clip",
        "images_per_second": "images/s",
    }

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}  # the last of each: not every update samples a rollout

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs:
            self._shown |= {label: f"{logs[key]:.3g}" for key, label in self.SHOWN.items() if key in logs}
            self.training_bar.set_postfix(self._shown)
            evaluated = {key: f"{value:.4g}" for key, value in logs.items() if key.startswith("eval_reward")}
            if evaluated:
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


class PromptOrderCallback(TrainerCallback):
    """Tells the sampler the epoch, so that a resumed run draws the prompts of the interrupted one."""

    def __init__(self, sampler: EpochRepeatSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = int((state.epoch or 0) + 1e-6)  # a resumed run begins within an epoch


def show_images(
    report_to: list[str],
    callbacks: list[TrainerCallback],
    images: Mapping[str, Image],
    captions: list[str],
    step: int,
    caption_is: str = "prompt",
) -> None:
    """Pictures by name, with their captions, in every tracker of `report_to` that can show them."""
    pairs = list(zip(images.items(), captions, strict=True))
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            for (name, image), caption in pairs:
                callback.tb_writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
                callback.tb_writer.add_text(f"{name}/{caption_is}", caption, step)
    if "trackio" in report_to:
        import trackio

        shown: dict[str, Any] = {name: trackio.Image(image, caption=caption) for (name, image), caption in pairs}
        trackio.log({**shown, "train/global_step": step})
    if "wandb" in report_to:
        import wandb  # type: ignore[import-not-found]

        shown = {name: wandb.Image(image, caption=caption) for (name, image), caption in pairs}
        wandb.log({**shown, "train/global_step": step})
