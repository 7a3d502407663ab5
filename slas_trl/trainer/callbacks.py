"""Callbacks of [`SLASTrainer`]: progress, metrics on disk, pictures in the trackers, prompts by epoch."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL.Image import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from .collectives import copy_full_tensor, full_tensor, reshard
from .sampling import EpochRepeatSampler
from .slas_config import SLASConfig


logger = logging.get_logger(__name__)

METRICS_FILE = "metrics.jsonl"


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
        path = args.run_dir / self.file
        if self.resumed_at is not None:  # not before there is something to log: a run that fails at once leaves it
            self._forget_after(path, self.resumed_at)
            self.resumed_at = None
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    @staticmethod
    def _forget_after(path: Path, step: int) -> None:
        """Keep the lines up to this step, without what a killed run left half written."""
        if path.exists():
            kept = []
            for text in path.read_text().splitlines() if step else []:
                with suppress(json.JSONDecodeError):
                    line = json.loads(text)
                    kept += [line] if line["step"] <= step and "train_runtime" not in line else []
            shorter = path.with_name(f"_{path.name}")
            shorter.write_text("".join(json.dumps(line) + "\n" for line in kept))
            shorter.replace(path)  # in one step: whoever is killed here has lost no line


class MetricsFileCallback(StepFileCallback):
    """One line for each log in `metrics.jsonl`."""

    file = METRICS_FILE

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step >= state.max_steps:
            logger.warning(f"Nothing is trained: the run ended at update {state.global_step}. Raise max_steps.")
        path = args.run_dir / self.file
        if state.is_world_process_zero and state.global_step and not path.exists():  # resumed in another folder
            path.write_text("".join(json.dumps({"step": log["step"], **log}) + "\n" for log in state.log_history))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            self.append(args, {"step": state.global_step, **logs})


class PromptOrderCallback(TrainerCallback):
    """Tells the sampler the epoch, so that a resumed run draws the prompts of the interrupted one."""

    def __init__(self, sampler: EpochRepeatSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = int((state.epoch or 0) + 1e-6)  # a resumed run begins within an epoch


class EMACallback(TrainerCallback):
    """An exponential moving average of the trained weights, and its files. It begins when training does."""

    AVERAGE_FILE, WEIGHTS_FILE = "ema.pt", "weights_before_averaging.pt"

    def __init__(self, model: torch.nn.Module, decay: float):
        self.trained, self.decay = model, decay
        self.model: EMAModel | None = None

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Asked for anew every time: FSDP puts others in their places."""
        return [p for p in self.trained.parameters() if p.requires_grad]

    def on_train_begin(self, args, state, control, **kwargs):
        if self.model is None:  # not resumed
            self.adopt()

    def on_step_end(self, args, state, control, **kwargs):
        assert self.model is not None  # training has begun
        self.model.step(self.parameters)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average in place of the weights, once there is one."""
        if self.model is None:
            yield
            return
        reshard(self.trained)
        self.model.store(self.parameters)
        self.model.copy_to(self.parameters)
        try:
            yield
        finally:
            reshard(self.trained)
            self.model.restore(self.parameters)

    def adopt(self) -> None:
        """Start the average anew from the weights as they are."""
        # By default diffusers' first update forgets these weights.
        self.model = EMAModel(self.parameters, decay=self.decay, min_decay=self.decay, update_after_step=-1)

    def save(self, folder: Path, writes: bool) -> None:
        """Every process calls it, since weights may be sharded; the one that `writes` writes."""
        assert self.model is not None  # a checkpoint is one of training
        average = [full_tensor(p).cpu() for p in self.model.shadow_params]
        weights = [full_tensor(p.detach()).cpu() for p in self.parameters]
        if writes:
            torch.save({**self.model.state_dict(), "shadow_params": average}, folder / self.AVERAGE_FILE)
            torch.save(weights, folder / self.WEIGHTS_FILE)

    def load(self, folder: Path) -> None:
        self.adopt()
        assert self.model is not None
        saved = torch.load(folder / self.AVERAGE_FILE, map_location="cpu", weights_only=True)
        average, shadows = saved.pop("shadow_params"), self.model.shadow_params
        decay = {"decay": self.decay, "min_decay": self.decay}  # this run's
        self.model.load_state_dict({**saved, **decay, "shadow_params": shadows})
        weights = torch.load(folder / self.WEIGHTS_FILE, map_location="cpu", weights_only=True)
        for targets, sources in ((self.model.shadow_params, average), (self.parameters, weights)):
            for target, source in zip(targets, sources, strict=True):
                copy_full_tensor(target, source)


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
