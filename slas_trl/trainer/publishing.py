"""The part of the trainer that shows its result: pictures, the model card, and the Hub."""

import copy
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub import CommitInfo
from PIL import Image
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from .. import hub
from ..images import still
from ..model_card import render
from ..rewards.blind_spots import BLIND_SPOTS, MEASURES
from ..rewards.by_name import is_ours
from ..run_facts import Evaluation, Reward, RunFacts, Sample, Scheduler, spread
from . import card_facts, checkpoints, lora
from .calls import is_picture_column
from .collectives import gathered, raise_together, wait_together
from .evaluating import EvaluatingTrainer
from .hacking import find_hacking
from .hub_checkpoints import checkpoint_files, fetch_checkpoint, names_checkpoint
from .slas_config import SLASConfig


logger = logging.get_logger(__name__)

PATIENCE = 60  # seconds between two looks at an upload
CURVES, CALIBRATION = "training.png", "calibration.png"


class PublishingTrainer(EvaluatingTrainer):
    """Writes the model card, and pushes. In training it does so in the background, and never ends a run by it."""

    dataset_name: str | None = None  # of the prompts, for the card
    continued: str | None = None  # of an adapter that training goes on with, see [`~lora.continue_adapter`]
    started_from: str | None = None  # its name, for the card
    evaluation: Evaluation | None = None  # of a report; by default the last one of the training
    draws_gallery = True  # for the card, unless `show` will be called
    _before: list[Image.Image] | None = None  # of the gallery, where they cannot be drawn after training
    _samples: list[Sample] | None = None
    _sheet: str | None = None
    _shown_at = -1  # the update after which the pictures were made
    _best_since = -1  # the update after which the best weights were loaded
    _saved_step: int | None = None  # the update of the weights in the run's folder itself

    def __init__(self, *args: Any, **kwargs: Any):
        self._uploads = hub.Uploads()
        self._unpushed: list[Path] = []  # checkpoints that should be on the Hub and are not
        self._newest: tuple[Path, RunFacts] | None = None  # checkpoint that was to be pushed, and what the card says
        super().__init__(*args, **kwargs)

    # Pictures

    def show(
        self,
        data: Dataset,
        rows: Sequence[int],
        after: Sequence[Image.Image],
        before: Sequence[Image.Image] | None,
    ) -> None:
        """
        Take these pictures of the prompts in these rows, the i-th drawn with seed i, for the gallery and the
        comparison grid of the card, as long as no update is made. Every process has to call it.
        """
        error = None
        if self.is_world_process_zero():
            from ..reporting import save_samples  # matplotlib, not before it is needed

            try:
                prompts, inputs = [data[row]["prompt"] for row in rows], self.calls.pictures(data, rows)
                self._samples, self._sheet = save_samples(self._output_dir, prompts, after, before, inputs)
            except Exception as raised:  # a full disk, or a picture that is gone: the other processes wait for a word
                error = ValueError(f"The pictures for the card could not be kept: {raised}")
        raise_together(error)
        self._shown_at = self.state.global_step

    def _draw_gallery(self) -> None:
        """Where nobody has shown any pictures. Every process has to call it."""
        if self._shown_at == self.state.global_step:
            return
        after, before = self._draw_pictures(), self._before
        if self._begins_without:
            with self.replayer.without_adapter(lora.ADAPTER_NAME):
                before = self._draw_pictures()
        self.show(self._shown_prompts, self._shown_rows, after, before)

    def _draw_pictures(self) -> list[Image.Image]:
        seeds = [torch.Generator().manual_seed(i) for i in range(len(self._shown_rows))]
        size = self.args.per_device_train_batch_size
        return [still(made) for made in self.draw(self._shown_prompts, self._shown_rows, seeds, size)]

    @property
    def _shown_prompts(self) -> Dataset:
        return self.eval_dataset if isinstance(self.eval_dataset, Dataset) else self.train_dataset

    @property
    def _shown_rows(self) -> list[int]:
        from ..reporting import GALLERY

        return spread(len(self._shown_prompts), GALLERY)

    @property
    def _begins_without(self) -> bool:
        """Whether the pipeline before training is the one without the adapter, at any time."""
        return self.has_adapter and self.continued is None

    # The card

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the model card, `README.md`, into `args.output_dir`, with what is known of the run by now.

        Args:
            model_name (`str`, *optional*): by default that of the repository, or of the folder.
            dataset_name (`str`, *optional*): of the prompts: a Hub id, or a file.
            tags (`str` or `list[str]`, *optional*): further ones, beside those of every run.
        """
        if self.is_world_process_zero():
            self._write_card(self._facts(model_name, dataset_name, tags))

    def _write_card(self, facts: RunFacts, is_new: bool = False) -> None:
        folder, files = self._output_dir, []
        if not self.is_in_train:
            with suppress(FileNotFoundError):  # nothing has been saved yet
                files = hub.describe(hub.run_files(folder, folder, facts), facts)
        location = self.hub_model_id or hub.local_name(folder)
        text = render(facts, location, self.args.hub_revision, files, on_hub=self.hub_model_id is not None)
        hub.write_card(folder, facts, text, location, self._saved_step, is_new)

    @property
    def _step(self) -> int:
        """The update of the weights: at the end of a run they may be the best ones."""
        best = self._best_since == self.state.global_step and self.state.best_global_step
        return best or self.state.global_step

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._best_since = self.state.global_step

    def _facts(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] | None = None
    ) -> RunFacts:
        args, pipe, names, data = self.args, self.pipe, self.denoiser_names, self.train_dataset
        denoiser, folder = pipe.components[names[0]], self._output_dir
        settings = card_facts.settings_of(args, self.replayer.scheduler) | {"updates": self._step}
        if self.has_adapter:
            config = denoiser.peft_config[lora.ADAPTER_NAME]
            settings |= {"lora_r": config.r, "lora_alpha": config.lora_alpha}
            settings |= {"use_rslora": True} if config.use_rslora else {}
        if self.continued is not None and args.beta:
            settings["kl_reference"] = args.kl_reference
        dataset, on_hub = card_facts.dataset_of(dataset_name or self.dataset_name)
        name = model_name or (self.hub_model_id or args.hub_model_id or folder.resolve().name).split("/")[-1]
        copies = args.num_generations_eval or args.num_generations
        ended = not self.is_in_train
        shown = ended and self._shown_at == self.state.global_step
        curves = self._draw_curves() if ended else None
        calibrated = ended and args.log_completions  # else a picture that is there is of an earlier run
        prompt = self._samples[0].prompt if shown and self._samples else data[0]["prompt"]
        call = card_facts.plain(self.calls.arguments) | card_facts.texts_of(self.calls, data, prompt)
        step = self._step if ended else None
        evaluated = card_facts.evaluation_of(self.state.log_history, self.eval_scorer.names, copies, step)
        weights = self.weight_of
        return RunFacts(
            name=name,
            base=card_facts.base_of(pipe, denoiser, cast(dict, args.model_init_kwargs or {})),
            adapter=self.has_adapter,
            denoisers={name: lora.plain_class(pipe.components[name]).__name__ for name in names},
            loads_lora=isinstance(pipe, LoraBaseMixin),
            picture_arguments=[c for c in self.calls.columns(data) if is_picture_column(data, c)],
            scheduler=self._other_scheduler,
            output=card_facts.output_of(pipe),
            call={k: v for k, v in call.items() if k != "output_type"},
            prompt=prompt,
            rewards=self._rewards_of_card(),
            settings=settings,
            meanings={f.name: f.metadata["help"].rstrip(".") for f in fields(SLASConfig) if f.name in settings},
            step=self._step,
            max_steps=self._step if ended and not self._interrupted else max(self.state.max_steps, self._step),
            dataset=dataset,
            dataset_on_hub=on_hub,
            train_prompts=len(data),
            started_from=self.started_from or ("unknown" if self.continued is not None else None),
            beside=lora.adapters_beside(denoiser),
            evaluation=self.evaluation if ended and self.evaluation is not None else evaluated,
            samples=self._samples or [] if shown else [],
            sheets=[self._sheet] if shown and self._sheet else [],
            curves=curves,
            calibration=CALIBRATION if calibrated and (folder / CALIBRATION).is_file() else None,
            reading=card_facts.reading_of(folder) if calibrated else None,
            hacking=find_hacking(
                self.state.log_history, [name for name, weight in weights.items() if not weight], args.hacking_patience
            ),
            ema_decay=args.ema_decay if args.use_ema else None,
            versions=card_facts.versions(),
            tags=[
                *([tags] if isinstance(tags, str) else tags or []),
                *(["hf_jobs"] if "JOB_ID" in os.environ else []),
            ],
        )

    @functools.cached_property
    def _other_scheduler(self) -> Scheduler | None:
        return card_facts.scheduler_of(self.pipe, cast(dict, self.args.model_init_kwargs or {}))

    def _rewards_of_card(self) -> list[Reward]:
        """What is said of ours is not said of a user's by the same name."""
        functions = dict(zip(self.eval_scorer.names, self.eval_scorer.functions, strict=True))
        ours = {name for name, function in functions.items() if is_ours(function)}
        return [
            Reward(name, weight, *((BLIND_SPOTS.get(name), MEASURES.get(name)) if name in ours else ()))
            for name, weight in self.weight_of.items()
        ]

    def _draw_curves(self) -> str | None:
        folder = self._output_dir
        if not (folder / card_facts.METRICS_FILE).is_file():
            return None
        from ..reporting import plot_training

        plot_training(folder / card_facts.METRICS_FILE, folder / CURVES)
        return CURVES

    # The Hub

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Make the repository, or see that it is there. Without a network, training goes on, and every push tries anew.

        Raises:
            `ValueError`: when the Hub refuses the token or the name, before anything is trained.
        """
        error = None
        if self.is_world_process_zero():
            args = self.args
            name, token = self._repository, token or args.hub_token
            try:
                self.hub_model_id = hub.create_repository(
                    name, args.hub_private_repo if private is None else private, token
                )
                hub.check_token(token)
            except Exception as raised:
                if hub.is_refusal(raised):
                    error = ValueError(f"push_to_hub cannot push to {name!r}: {hub.reason(raised)}.")
                else:
                    logger.warning(
                        f"{name!r} could not be looked at: {hub.reason(raised)}. Training goes on, and each push "
                        "tries again."
                    )
        raise_together(error)

    @property
    def _repository(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or self._output_dir.resolve().name

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Write the trained weights into `output_dir`, `args.output_dir` by default: the adapter, which
        `pipe.load_lora_weights` reads, or the denoiser's folder. Every process has to call it; the main one writes,
        and with `args.push_to_hub` pushes what is in `args.output_dir`. A push that fails is told, not raised.
        """
        super().save_model(output_dir, _internal_call)
        if self._writing is None and output_dir in (None, self.args.output_dir):
            self._saved_step = self._step
            if self.args.should_save:
                hub.note_saved(self._output_dir, self._step)
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save")
            except (OSError, ValueError) as error:  # of the push, or a full disk
                logger.error(str(error))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> "CommitInfo | Future[CommitInfo] | None":
        """
        Push the trained weights, the model card and its pictures, in one commit, to `args.hub_model_id` (by default a
        repository by the name of `args.output_dir`). What is there already makes no commit. Every process has to call
        it.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): of the commit.
            blocking (`bool`, *optional*, defaults to `True`): whether to wait; otherwise a `Future` is returned.
            token (`str`, *optional*): by default `args.hub_token`, or that of `hf auth login`.
            revision (`str`, *optional*): branch, by default `args.hub_revision`; made if it is not there.
            private (`bool`, *optional*): for a repository that is made, by default `args.hub_private_repo`.
            kwargs: of [`~SLASTrainer.create_model_card`].

        Returns:
            `CommitInfo` on the main process, or its `Future`; `None` on the others.

        Raises:
            [`~slas_trl.hub.PushError`]: when nothing was pushed; the message says why, and how to do it later. All of
                the result is in `args.output_dir` by then.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        self._finish_current_push()
        self._draw_gallery()
        result, error = None, None
        if self.is_world_process_zero():
            try:
                result = self._push_result(commit_message or "End of training", token, revision, private, **kwargs)
            except Exception as raised:  # the other processes wait for a word
                error = raised
        raise_together(error)
        if not blocking:
            if result is not None:
                result.add_done_callback(lambda done: done.exception() and logger.error(str(done.exception())))
            return result
        self._wait_for_uploads()
        raise_together(None if result is None else cast(Exception | None, result.exception()))
        return None if result is None else result.result()

    def _push_result(
        self, message: str, token: str | None, revision: str | None, private: bool | None, **kwargs: Any
    ) -> "Future[CommitInfo]":
        facts, folder = self._facts(**kwargs), self._output_dir
        self._write_card(facts)  # should the push fail
        push = self._push_of(hub.run_files(folder, folder, facts), message)
        push.replaces = hub.OLD_PICTURES
        push.token, push.revision = token or push.token, revision or push.revision
        push.private = push.private if private is None else private

        def note(done: "Future[CommitInfo]") -> None:
            if done.exception() is None:  # the same here and there
                text = cast(bytes, push.files[hub.CARD_FILE]).decode()
                hub.write_card(folder, facts, text, push.repo_id, self._saved_step)

        return self._start(facts, push, note)

    def _push_of(self, files: dict[str, Path | bytes], message: str) -> hub.Push:
        args = self.args
        strategy = HubStrategy(args.hub_strategy).value
        return hub.Push(
            repo_id=self._repository,
            files=files,
            message=message,
            run_dir=Path(self.args.output_dir or "."),
            strategy=strategy if strategy in hub.CHECKPOINT_STRATEGIES else "end",
            revision=args.hub_revision,
            private=args.hub_private_repo,
            token=args.hub_token,
        )

    def _start(
        self, facts: RunFacts, push: hub.Push, note: Callable[["Future[CommitInfo]"], None]
    ) -> "Future[CommitInfo]":
        """Push in the background, and call `note` when it is done; the files are kept until then."""
        place = Path(tempfile.mkdtemp(prefix=f"{checkpoints.WRITING}push-", dir=self._output_dir))
        push.files = hub.keep(push.files, place)

        def job() -> CommitInfo:
            try:
                done = hub.publish(facts, push)
                self.hub_model_id = push.repo_id
                return done
            finally:
                shutil.rmtree(place, ignore_errors=True)

        return self._uploads.start(job, note)

    def _save_checkpoint(self, model: torch.nn.Module | None, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            try:
                self._write_card(self._facts(), is_new=True)  # for `slas-trl push`, should the run not come to its end
            except (OSError, ValueError) as error:
                logger.warning(f"The model card could not be written, and training goes on: {error}")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Weights and card at the root, and the checkpoint in its folder if `hub_strategy` says so, in one commit."""
        if self._writing is not None or not self.is_world_process_zero():  # an upload needs the final name
            return
        strategy = HubStrategy(self.args.hub_strategy)
        if strategy == HubStrategy.END:
            return
        every = strategy == HubStrategy.ALL_CHECKPOINTS
        try:
            self._newest = Path(checkpoint_folder), self._facts()
        except (OSError, ValueError) as error:  # a picture of the data set that is gone, for one
            logger.warning(f"{Path(checkpoint_folder).name} was not pushed, and training goes on: {error}")
            return
        self._unpushed = [*(self._unpushed if every else []), Path(checkpoint_folder)]
        # Of several checkpoints that wait, the newest is enough, unless all are asked for.
        if self._uploads.busy and not self.args.hub_always_push and not every:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._push_checkpoint(Path(checkpoint_folder))

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Whichever is pushed, be it late, the weights at the root are the newest, and those of the card."""
        assert self._newest is not None  # a checkpoint has been saved
        newest, facts = self._newest[0], copy.deepcopy(self._newest[1])
        try:
            # The Trainer may have removed it, if another one is the best.
            files: dict[str, Path | bytes] = dict(hub.weight_files(newest, facts)) if newest.is_dir() else {}
            push = self._push_of(files, f"Training in progress, {checkpoint.name.replace('-', ' ')}")
            if push.strategy in hub.CHECKPOINT_STRATEGIES:
                every = push.strategy == hub.ALL_CHECKPOINTS
                push.files |= checkpoint_files(checkpoint, checkpoint.name if every else hub.LAST_CHECKPOINT)
                push.replaces = hub.OLD_CHECKPOINT

            def note(done: "Future[CommitInfo]") -> None:
                if error := done.exception():
                    logger.warning(f"{checkpoint.name}: {error}")
                elif checkpoint in self._unpushed:
                    self._unpushed.remove(checkpoint)

            self._start(facts, push, note)
        except (OSError, ValueError) as error:  # a full disk, for one
            logger.warning(f"{checkpoint.name} was not pushed, and training goes on: {error}")

    def _finish_current_push(self) -> None:
        """
        Wait for what is under way, and try once more what should be there by now and is not. Every process has to
        call it.
        """
        if self._uploads.busy:
            logger.info("Waiting for the push of a checkpoint to be finished.")
        self._wait_for_uploads()
        if lost := [folder.name for folder in self._unpushed if not folder.is_dir()]:
            logger.warning(f"{', '.join(lost)} could not be pushed, and save_total_limit has removed them since.")
        for checkpoint in [folder for folder in self._unpushed if folder.is_dir()]:
            self._push_checkpoint(checkpoint)
        self._wait_for_uploads()
        self._unpushed = []  # what came of them has been told

    def _wait_for_uploads(self) -> None:
        wait_together(lambda: self._uploads.wait(PATIENCE))

    def _save_unfinished(self, why: str) -> None:
        super()._save_unfinished(why)
        self._finish_current_push()

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """
        Train. `resume_from_checkpoint` is a checkpoint folder; `True` for the newest whole one in `args.output_dir`;
        or one on the Hub, `"user/name"` or `"user/name/checkpoint-20"`. The resumed run is the uninterrupted one to
        the last bit. Ctrl-C saves a checkpoint at the last finished update.
        """
        source = resume_from_checkpoint
        untrained = not source and not self.state.global_step
        if untrained and self.args.push_to_hub and self.draws_gallery and not self._begins_without:
            self._before = self._draw_pictures()
        if isinstance(source, str) and not Path(source).is_dir() and names_checkpoint(source):
            # Its whole name is known to the main process.
            own = "/".join(source.split("@")[0].split("/")[:2]) == gathered(self._repository)[0]
            revision = self.args.hub_revision if own else None
            resume_from_checkpoint = self._fetch(source, revision)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            self.is_in_train, self._interrupted = False, True
            raise

    def _fetch(self, source: str, revision: str | None) -> str:
        """One process of each machine downloads."""
        path, error = None, None
        if self.accelerator.is_local_main_process:
            try:
                path = str(fetch_checkpoint(source, self._output_dir, revision, self.args.hub_token))
            except (OSError, ValueError) as raised:
                error = raised
        raise_together(error)
        return next(found for found in gathered(path) if found is not None)
