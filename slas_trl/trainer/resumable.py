"""
The part of the trainer that outlives it: weights on disk, checkpoints between two updates of a rollout, Ctrl-C.
"""

import hashlib
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import save_fsdp_optimizer
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import logging

from ..policy import PipelineReplayer, Rollout
from . import checkpoints, lora
from .callbacks import EMACallback
from .collectives import gathered, shard_on_cpus
from .gamma import GammaControl
from .scoring import RewardScorer
from .slas_config import SLASConfig


logger = logging.get_logger(__name__)

# Hyperparameters in the groups of an optimizer, beside which it may keep states there. The rate is the scheduler's.
GIVEN = {"initial_lr", "weight_decay", "betas", "eps", "momentum", "dampening", "nesterov", "alpha"}


@dataclass
class Buffer:
    """One rollout of this process, and the advantages `(B,)` of each of its chunks."""

    chunks: list[Rollout]
    advantages: list[torch.Tensor]
    steps: list[int]  # trained timesteps, in the order of training


class ResumableTrainer(Trainer):
    """
    Saves and restores what [`SLASTrainer`] needs beside the Trainer's own: the adapter in diffusers' format, the
    moving average, the state of γ, and the rollout under way. The subclass sets the attributes below, and defines
    `_calls`.
    """

    args: SLASConfig
    train_dataset: Dataset
    pipe: Any  # a DiffusionPipeline; every class has a __call__ of its own
    replayer: PipelineReplayer
    denoiser_names: list[str]
    scorer: RewardScorer
    has_adapter: bool
    _ema: EMACallback | None
    _gamma: GammaControl
    _writing: Path | None = None  # where the checkpoint under way is written

    @property
    def _output_dir(self) -> Path:
        return self.args.run_dir

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if shard_on_cpus(self.accelerator):
            self.is_fsdp_enabled = True

    def _reset_progress(self) -> None:
        self._micro_step = 0  # since the start of the run, on this process
        self._buffer: Buffer | None = None
        self._saved_rollout: Path | None = None  # of a checkpoint between two updates of one rollout
        self._checked = False  # the pre-flight check
        self._interrupted = 0  # by which signal
        self._own_checkpoints: set[Path] = set()  # not those that an earlier run left in the folder

    @property
    def _layout(self) -> dict[str, Any]:
        """What must not change when a run is resumed: the settings, the adapter's shape and the prompts."""
        adapter = None
        if self.has_adapter:
            config = self.pipe.components[self.denoiser_names[0]].peft_config[lora.ADAPTER_NAME]
            adapter = [config.r, config.lora_alpha, sorted(config.target_modules), config.use_rslora]
        prompts = hashlib.sha256("\n".join(self.train_dataset["prompt"]).encode()).hexdigest()
        return {**self.args.layout, "adapter": adapter, "prompts": prompts, "rewards": self.scorer.names}

    @property
    def _settings(self) -> dict[str, Any]:
        """What may change, and is said then."""
        names = (f"options of {name}, or where it is from (checksum)" for name in self.scorer.names)
        return self.args.settings | dict(zip(names, self.scorer.options, strict=True))

    def _calls(self, indices: list[int], rollout_index: int) -> list[dict[str, Any]]:
        """The arguments of the pipeline call of each chunk of a rollout."""
        raise TypeError(f"{type(self).__name__} does not define _calls().")

    def _place_frozen_components(self, device: torch.device | str) -> None:
        """Put text encoders, VAE and the like where they are needed, or out of the way, if that is asked for."""
        if not self.args.offload_frozen_components:
            return
        for name, component in self.pipe.components.items():
            if isinstance(component, torch.nn.Module) and name not in self.denoiser_names:
                component.to(device)
        clear_device_cache()

    def _averaged_weights(self) -> AbstractContextManager[None]:
        """The moving average in place of the weights, if there is one."""
        return nullcontext() if self._ema is None else self._ema.averaged()

    @contextmanager
    def as_published(self) -> Iterator[None]:
        """
        The pipeline as a reader of what is saved has it: with weights averaged, and rounded, and without the mixed
        precision of training. It stays where the parts of the pipeline are of different types, which may need it, and
        where weights are sharded.
        """
        denoisers = [self.pipe.components[name] for name in self.denoiser_names]
        modules = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        one_type = len({lora.base_dtype(module) for module in modules} - {None}) == 1
        wrapped = {
            denoiser: denoiser.forward
            for denoiser in denoisers
            if one_type and "_original_forward" in vars(denoiser) and not isinstance(denoiser, FSDPModule)
        }
        for denoiser in wrapped:
            denoiser.forward = denoiser._original_forward
        try:
            with self._averaged_weights(), lora.as_loaded(denoisers):
                yield
        finally:
            for denoiser, forward in wrapped.items():
                denoiser.forward = forward

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Write the trained weights into `output_dir`, `args.output_dir` by default: the adapter, which
        `pipe.load_lora_weights` reads, or the denoiser's folder. Every process has to call it; the main one writes.
        """
        folder = Path(output_dir) if output_dir else self._output_dir
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._averaged_weights():
                lora.save_weights(self.pipe, self.denoiser_names, folder, self.has_adapter, self.args.should_save)
        except checkpoints.WRITE_ERRORS as error:
            if self._writing is not None:
                raise
            raise checkpoints.lost(f"The weights in {str(folder)!r}", self._output_dir, error) from error

    def _load_weights(self, folder: str | Path) -> None:
        lora.load_weights(self.pipe, self.denoiser_names, folder, self.has_adapter)

    def _load_best_model(self) -> None:
        logger.info(f"Loading the best weights, from {self.state.best_model_checkpoint} ({self.state.best_metric}).")
        assert self.state.best_model_checkpoint is not None  # the caller has looked
        self._load_weights(self.state.best_model_checkpoint)
        if self._ema is not None:
            self._ema.adopt()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writing or self._output_dir)

    def _save_checkpoint(self, model: torch.nn.Module | None, trial: Any) -> None:
        """The Trainer's, in a temporary folder: it has its name when it is whole, before any process goes on."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        writing = folder.with_name(checkpoints.WRITING + folder.name)
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
                    self.state.save_to_json(str(written / checkpoints.TRAINER_STATE_FILE))
            self.accelerator.wait_for_everyone()  # the files of all processes are listed
            if self.args.should_save:
                done, midway = self._progress
                settings = {"layout": self._layout, "settings": self._settings}
                checkpoints.write_state(written, micro_step=done, midway=midway, **settings)
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

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Without the model's weights, which the Trainer adds under FSDP: `save_model` has written what is trained."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            scheduler = cast(torch.optim.lr_scheduler.LRScheduler, self.lr_scheduler)  # training has begun
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

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
        if isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [own["initial_lr"] for own in given]
            now = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            scheduler._last_lr = [base * factor(scheduler.last_epoch) for base, factor in now]
        for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate
        then = json.loads((Path(checkpoint) / checkpoints.STATE_FILE).read_text())["settings"]["learning_rate"]
        if then != self.args.learning_rate and not isinstance(scheduler, LambdaLR):
            kind, now = type(scheduler).__name__, self.args.learning_rate
            raise ValueError(f"learning_rate {then} cannot become {now}: with a {kind} it is the checkpoint's.")

    def _save_rng_state(self, output_dir: str) -> None:
        """The last of the Trainer's own files but one, and ours."""
        super()._save_rng_state(output_dir)
        folder, rank, midway = Path(output_dir), self.accelerator.process_index, self._progress[1]
        if midway and self._buffer is not None:
            buffer = self._buffer
            checkpoints.save_rollouts(
                folder / checkpoints.rollout_file(rank),
                buffer.chunks,
                advantages=buffer.advantages,
                steps=buffer.steps,
            )
        elif midway and self._saved_rollout is not None:  # resumed, and interrupted before it was needed
            shutil.copy(self._saved_rollout, folder / checkpoints.rollout_file(rank))
        if self._ema is not None:
            self._ema.save(folder, self.args.should_save)
        self._gamma.save(folder, self.args.should_save)

    @property
    def _progress(self) -> tuple[int, bool]:
        """Micro-steps of the updates made, for one under way starts over; and whether that is within a rollout."""
        done = self.state.global_step * self.args.micro_steps_per_update
        return done, done % self.args.micro_steps_per_rollout != 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        state = json.loads((folder / checkpoints.STATE_FILE).read_text())  # `train` has looked whether it is whole
        if changed := _differences(state["layout"], self._layout):
            raise ValueError(f"The checkpoint {str(folder)!r} was made with other settings: {changed}.")
        if changed := _differences(state["settings"], self._settings):
            update = state["micro_step"] // self.args.micro_steps_per_update
            logger.warning(
                f"After update {update} (rewards: after its rollout), training goes on with other settings: {changed}."
            )
        self._load_weights(folder)
        if self._ema is not None:
            self._ema.load(folder)
        self._gamma.load(folder)
        self._micro_step = state["micro_step"]
        if state["midway"]:
            self._saved_rollout = folder / checkpoints.rollout_file(self.accelerator.process_index)

    def _load_rollout(self, indices: list[int], rollout_index: int) -> Buffer:
        """The rollout that was under way when the checkpoint was written."""
        assert self._saved_rollout is not None  # only a resumed run starts within a rollout
        calls, device = self._calls(indices, rollout_index), self.accelerator.device
        self._place_frozen_components(device)
        chunks, saved = checkpoints.load_rollouts(self._saved_rollout, self.replayer, calls, device)
        self._place_frozen_components("cpu")
        return Buffer(chunks, saved["advantages"], saved["steps"])

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """
        Train. `resume_from_checkpoint` is a checkpoint folder, or `True` for the newest whole one in
        `args.output_dir`; the resumed run is the uninterrupted one to the last bit. Ctrl-C, SIGTERM and SIGHUP save a
        checkpoint at the last finished update.
        """
        if self.args.should_save:
            checkpoints.tidy(self._output_dir)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            folder = checkpoints.last_whole_checkpoint(self._output_dir)
            if folder is None:
                raise ValueError(f"There is no whole checkpoint in {str(self._output_dir)!r} to resume from.")
            resume_from_checkpoint = str(folder)
        elif resume_from_checkpoint:
            checkpoints.read_state(Path(resume_from_checkpoint))
        self._reset_progress()
        if resume_from_checkpoint:
            self._own_checkpoints.add(Path(resume_from_checkpoint).resolve())
            if self.args.should_save:
                checkpoints.rotate_after_kill(
                    self._output_dir, Path(resume_from_checkpoint), self.args.save_total_limit
                )
        with checkpoints.on_interrupt(self._note_interrupt):
            output = super().train(resume_from_checkpoint or None, *args, **kwargs)
            self._stop_if_interrupted()  # within the last update
            return output

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing for a run that was at its end when it was resumed: the Trainer would make one update more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _note_interrupt(self, number: int) -> None:
        self._interrupted, again = number, " Press again to stop at once." if number == signal.SIGINT else ""
        logger.warning(f"Interrupted: saving a checkpoint as soon as the step under way is done.{again}")

    def _stop_if_interrupted(self) -> None:
        """Several processes agree on it, at the start of an update."""
        agreed = self.accelerator.num_processes == 1 or self._micro_step % self.args.micro_steps_per_update == 0
        if agreed and (number := max(gathered(self._interrupted))):
            # Here and not where it is caught: a second Ctrl-C comes in the middle of anything.
            self._save_unfinished("Interrupted")
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def _save_unfinished(self, why: str) -> None:
        """Keep what has been learned so far, and say how to go on."""
        step, folder = self.state.global_step, self._output_dir / f"checkpoint-{self.state.global_step}"
        if step == 0:
            logger.warning(f"{why} before the first update; there is nothing to save.")
            return
        if folder.resolve() not in self._own_checkpoints:
            self._save_checkpoint(self.model, None)
        logger.warning(
            f"{why} after update {step}; the checkpoint is {str(folder)!r}. Resume with "
            f"train(resume_from_checkpoint={str(folder)!r}), or --resume_from_checkpoint {folder} on the command line."
        )


def _differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What an older checkpoint does not know, it had the default of."""
    return ", ".join(f"{name} {then[name]} -> {now[name]}" for name in now if then.get(name, now[name]) != now[name])
