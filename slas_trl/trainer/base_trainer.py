"""
What [`SLASTrainer`] changes of transformers' Trainer: files, checkpoints between two updates of a rollout, resuming to
the last bit, Ctrl-C. Every private method of the Trainer that is overridden is overridden here.
"""

import hashlib
import json
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import save_fsdp_optimizer
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import logging

from .. import run_files
from ..policy import PipelineReplayer, Rollout
from . import checkpoints
from .distributed import gathered
from .gamma import GammaControl
from .pipeline_inputs import Batch
from .publisher import Publisher
from .slas_config import SLASConfig
from .trained_model import MovingAverage, TrainedModel


logger = logging.get_logger(__name__)

# Hyperparameters in the groups of an optimizer, beside which it may keep states there. The rate is the scheduler's.
GIVEN = {"initial_lr", "weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha"}


@dataclass
class Buffer:
    """One rollout of this process in chunks, and the advantages `(B,)` of each."""

    chunks: list[Rollout]
    advantages: list[torch.Tensor]
    steps: list[int]  # trained timesteps, in the order of training

    def micro_step(self, position: int) -> dict[str, Any]:
        """One chunk at one timestep."""
        chunk, step = divmod(position, len(self.steps))
        return {"rollout": self.chunks[chunk], "advantages": self.advantages[chunk], "step": self.steps[step]}


class BaseTrainer(Trainer, ABC):
    """
    A Trainer whose micro-step is one chunk of a rollout at one timestep, and whose checkpoints hold the rollout under
    way. The subclass samples.
    """

    args: SLASConfig
    train_dataset: Dataset
    replayer: PipelineReplayer
    publisher: Publisher

    def __init__(self, trained: TrainedModel, **kwargs: Any):
        self.trained = trained
        # With a state that belongs to a checkpoint, which `save` and `load` are collective for.
        self.parts: list[MovingAverage | GammaControl] = [trained.average] if trained.average is not None else []
        self._writing: Path | None = None  # where the checkpoint under way is written
        super().__init__(model=trained.module, **kwargs)

    # Defined by the subclass

    @abstractmethod
    def batches(self, indices: list[int], rollout_index: int) -> list[Batch]:
        """The pipeline's inputs for the chunks of a rollout of these rows."""

    @abstractmethod
    def sample_rollout(self, indices: list[int], rollout_index: int) -> Buffer:
        """Sample these rows, and score what was sampled."""

    def note_gradient_norm(self, norm: Any) -> None:
        """Is called before every update with the norm of the gradient, which is the same on all processes."""

    def reset_progress(self) -> None:
        """As before training."""
        self.micro_steps_done = 0  # since the start of the run, on this process
        self.rollout: Buffer | None = None
        self.was_interrupted = 0  # by which signal
        self._saved_rollout: Path | None = None  # of a checkpoint between two updates of one rollout
        self._own_checkpoints: set[Path] = set()  # not those that an earlier run left in the folder

    @property
    def resume_signature(self) -> dict[str, Any]:
        """Equal in both runs where one is resumed: settings, the adapter's shape and the prompts."""
        config = self.trained.adapter_config
        adapter = config and [config.r, config.lora_alpha, sorted(cast(Any, config.target_modules)), config.use_rslora]
        prompts = hashlib.sha256("\n".join(self.train_dataset["prompt"]).encode()).hexdigest()
        own = {"adapter": adapter, "prompts": prompts, "continued": self.trained.continued}
        return {**self.args.resume_signature, **own}

    @property
    def resume_settings(self) -> dict[str, Any]:
        """Settings that may differ when a run is resumed; differences are logged."""
        return self.args.settings

    # Micro-steps

    def _prepare_inputs(self, inputs: list[int]) -> dict[str, Any]:  # type: ignore[override]
        self.stop_if_interrupted()
        # `Trainer.train` calls `model.train()`; undo it. The policy is the model in eval mode, and some denoisers
        # compute something else in train mode.
        self.trained.module.eval()
        self.replayer.models.update(self.trained.forward_functions(self.model_wrapped))
        rollout_index, position = divmod(self.micro_steps_done, self.args.micro_steps_per_rollout)
        if position == 0:
            self.rollout = None  # free the old rollout before the new one is sampled
            self.rollout = self.sample_rollout(inputs, rollout_index)
        elif self.rollout is None:
            self.rollout = self._load_rollout(inputs, rollout_index)
        self.micro_steps_done += 1
        return self.rollout.micro_step(position % self.args.micro_steps_per_pass)

    def _load_rollout(self, indices: list[int], rollout_index: int) -> Buffer:
        """The rollout that was under way when the checkpoint was written."""
        calls = [batch.call for batch in self.batches(indices, rollout_index)]
        self.trained.place_frozen(self.accelerator.device)
        path = cast(Path, self._saved_rollout)  # only a resumed run starts within a rollout
        chunks, saved = checkpoints.load_rollouts(path, self.replayer, calls, self.accelerator.device)
        self.trained.place_frozen("cpu")
        return Buffer(chunks, saved["advantages"], saved["steps"])

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.note_gradient_norm(norm)
        return norm

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing for a run that was at its end when it was resumed: the Trainer would make one update more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # Weights

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Write the trained weights into `output_dir`, `args.output_dir` by default: the adapter, or the denoiser's
        folder. With `args.push_to_hub` they are pushed; a push that fails is logged. Collective: every rank must call
        this.
        """
        folder = Path(output_dir) if output_dir else self.args.run_dir
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            self.trained.save(folder, self.args.should_save)
            if self._writing is None and self.args.should_save:
                self.publisher.write(folder)
        except checkpoints.WRITE_ERRORS as error:
            if self._writing is not None:
                raise
            raise checkpoints.lost(f"The weights in {str(folder)!r}", self.args.run_dir, error) from error
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save")
            except (OSError, ValueError) as error:
                logger.error(str(error))

    def _load_best_model(self) -> None:
        self.trained.load(Path(cast(str, self.state.best_model_checkpoint)))  # the caller has looked
        if self.trained.average is not None:
            self.trained.average.restart()

    # Writing checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or self.args.run_dir)

    def _save_checkpoint(self, model: torch.nn.Module | None, trial: Any) -> None:
        """The Trainer's, in a temporary folder, which is renamed when it is whole, before any process goes on."""
        folder = self.args.run_dir / f"checkpoint-{self.state.global_step}"
        writing = folder.with_name(run_files.WRITING + folder.name)
        written = writing / folder.name
        if self.args.should_save:
            checkpoints.discard(writing)
        self.accelerator.wait_for_everyone()
        try:
            self._writing = writing
            super()._save_checkpoint(model, trial)  # type: ignore[arg-type]
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(folder)
                if self.args.should_save:
                    self.state.save_to_json(str(written / run_files.TRAINER_STATE))
            self.accelerator.wait_for_everyone()  # the files of all processes are listed
            if self.args.should_save:
                done, midway = self._progress
                settings = {"layout": self.resume_signature, "settings": self.resume_settings}
                checkpoints.write_state(written, micro_step=done, midway=midway, **settings)
                self.publisher.facts().write(written)  # not part of what a training needs to go on
                checkpoints.publish(written, folder)
            self.accelerator.wait_for_everyone()
        except checkpoints.WRITE_ERRORS as error:
            if self.args.should_save:
                checkpoints.tidy(folder.parent)
            raise checkpoints.lost(f"The checkpoint {str(folder)!r}", folder.parent, error) from error
        finally:
            self._writing = None
            if self.args.should_save:
                checkpoints.discard(writing)
        self._own_checkpoints.add(folder.resolve())
        if self.args.should_save:
            checkpoints.rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._writing is None:  # an upload needs the final name
            self.publisher.push_checkpoint(Path(checkpoint_folder))

    def _finish_current_push(self) -> None:
        self.publisher.wait()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP without the model's weights, which the Trainer adds: `save_model` has written what is trained."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            scheduler = cast(LRScheduler, self.lr_scheduler)  # training has begun
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last of the Trainer's own files but one, and ours."""
        super()._save_rng_state(output_dir)
        folder, midway = Path(output_dir), self._progress[1]
        file = folder / checkpoints.rollout_file(self.accelerator.process_index)
        if midway and self.rollout is not None:
            rest = {"advantages": self.rollout.advantages, "steps": self.rollout.steps}
            checkpoints.save_rollouts(file, self.rollout.chunks, **rest)
        elif midway and self._saved_rollout is not None:  # resumed, and interrupted before it was needed
            shutil.copy(self._saved_rollout, file)
        for part in self.parts:
            part.save(folder, self.args.should_save)

    @property
    def _progress(self) -> tuple[int, bool]:
        """Micro-steps of the updates made, for one under way starts over; and whether that is within a rollout."""
        done = self.state.global_step * self.args.micro_steps_per_update
        return done, done % self.args.micro_steps_per_rollout != 0

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """
        Train. `resume_from_checkpoint` is a checkpoint folder; `True` for the newest whole one in `args.output_dir`;
        or one on the Hub, `"user/name"` or `"user/name/checkpoint-20"`. The resumed run is the uninterrupted one to
        the last bit. Ctrl-C, SIGTERM and SIGHUP save a checkpoint at the last finished update.
        """
        folder, limit = self.args.run_dir, self.args.save_total_limit
        if self.args.should_save:
            checkpoints.tidy(folder)
        self.accelerator.wait_for_everyone()
        checkpoint = checkpoints.find(folder, self.publisher.fetch(resume_from_checkpoint))
        self.reset_progress()
        if checkpoint is not None:
            self._own_checkpoints.add(checkpoint.resolve())
            if self.args.should_save:
                checkpoints.rotate_after_kill(folder, checkpoint, limit)
        with checkpoints.on_interrupt(self._note_interrupt):
            try:
                output = super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
            except BaseException:
                self.is_in_train = False
                raise
            self.stop_if_interrupted()  # within the last update
            self.trained.place_frozen(self.accelerator.device)
            return output

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        state = json.loads((folder / run_files.STATE).read_text())  # `train` has looked whether it is whole
        if changed := _differences(state["layout"], self.resume_signature):
            raise ValueError(f"The checkpoint {str(folder)!r} was made with other settings: {changed}.")
        if changed := _differences(state["settings"], self.resume_settings):
            update = state["micro_step"] // self.args.micro_steps_per_update
            logger.warning(f"After update {update}, training goes on with other settings: {changed}.")
        self.trained.load(folder)
        for part in self.parts:
            part.load(folder)
        self.micro_steps_done = state["micro_step"]
        if state["midway"]:
            self._saved_rollout = folder / checkpoints.rollout_file(self.accelerator.process_index)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.is_deepspeed_enabled:
            self._load_from_checkpoint(checkpoint)  # for which the Trainer has loaded the engine, and nothing of ours
        optimizer, scheduler = cast(torch.optim.Optimizer, self.optimizer), cast(LRScheduler, self.lr_scheduler)
        given = [{key: group[key] for key in GIVEN & group.keys()} for group in optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        # The checkpoint's hyperparameters came along, but those of this run's arguments hold.
        for group, own in zip(optimizer.param_groups, given, strict=True):
            group.update(own)
        then = json.loads((Path(checkpoint) / run_files.STATE).read_text())["settings"]["learning_rate"]
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [own["initial_lr"] for own in given]
            now = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            scheduler._last_lr = [base * factor(scheduler.last_epoch) for base, factor in now]
        elif then != self.args.learning_rate:
            raise ValueError(f"learning_rate {then} cannot change: {type(scheduler).__name__} takes the checkpoint's.")
        for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    # Ending early

    def _note_interrupt(self, number: int) -> None:
        self.was_interrupted, again = number, " Press again to stop at once." if number == signal.SIGINT else ""
        logger.warning(f"Interrupted: saving a checkpoint as soon as the step under way is done.{again}")

    def stop_if_interrupted(self) -> None:
        """End training after a signal. Several processes agree on it at the start of an update."""
        agreed = self.accelerator.num_processes == 1 or self.micro_steps_done % self.args.micro_steps_per_update == 0
        if agreed and (number := max(gathered(self.was_interrupted))):
            # Here and not in the signal's handler: a second Ctrl-C comes in the middle of anything.
            self.save_unfinished("Interrupted")
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def save_unfinished(self, why: str) -> None:
        """Save what has been learned so far, and log how to go on. Collective: every rank must call this."""
        step, folder = self.state.global_step, self.args.run_dir / f"checkpoint-{self.state.global_step}"
        if step == 0:
            logger.warning(f"{why} before the first update; there is nothing to save.")
            return
        if folder.resolve() not in self._own_checkpoints:
            self._save_checkpoint(self.model, None)
        logger.warning(f"{why} after update {step}. To go on from there: --resume_from_checkpoint {folder}")
        self._finish_current_push()


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """An older checkpoint had the default of a setting that it does not know."""
    defaults = {field.name: field.default for field in fields(SLASConfig)}
    then = {name: then.get(name, defaults.get(name, now[name])) for name in now}
    return ", ".join(f"{name} {then[name]} -> {now[name]}" for name in now if then[name] != now[name])
