"""The part of the trainer that shows its result: pictures, the model card, and the Hub."""

import functools
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from diffusers.loaders.lora_base import LoraBaseMixin
from huggingface_hub import CommitInfo
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from .. import hub
from ..model_card import Evaluation, Reward, RunFacts, Sample, spread
from ..rewards.blind_spots import BLIND_SPOTS, MEASURES
from . import card_facts, checkpoints, lora
from .calls import is_picture_column
from .collectives import raise_together
from .evaluating import EvaluatingTrainer
from .hacking import find_hacking
from .hub_checkpoints import checkpoint_files, fetch_checkpoint, names_checkpoint


logger = logging.get_logger(__name__)

CURVES, CALIBRATION = "training.png", "calibration.png"


class PublishingTrainer(EvaluatingTrainer):
    """Writes the model card, and pushes. In training it does so in the background, and never ends a run by it."""

    dataset_name: str | None = None  # of the prompts, for the card
    continued: str | None = None  # of an adapter that training goes on with, see [`~lora.continue_adapter`]
    started_from: str | None = None  # its name, for the card
    evaluation: Evaluation | None = None  # of a report; by default the last one of the training
    _samples: list[Sample] | None = None
    _sheet: str | None = None
    _shown_at = -1  # the update after which the pictures were made
    _unpushed: Path | None = None  # the newest checkpoint that should be on the Hub and is not

    def __init__(self, *args: Any, **kwargs: Any):
        self._uploads, self._pushes = hub.Uploads(), itertools.count()
        super().__init__(*args, **kwargs)

    # Pictures

    def show(self, prompts: Sequence[str], after: Sequence[Image.Image], before: Sequence[Image.Image] | None) -> None:
        """
        Take these pictures, the i-th drawn with seed i, for the gallery and the comparison grid of the card, as long
        as no update is made.
        """
        self._shown_at = self.state.global_step
        if self.is_world_process_zero():
            from ..reporting import save_samples  # matplotlib, not before it is needed

            self._samples, self._sheet = save_samples(self._output_dir, prompts, after, before)

    def _draw_gallery(self) -> None:
        """Where nobody has shown any pictures. Every process has to call it."""
        if self._shown_at == self.state.global_step:
            return
        from ..reporting import GALLERY

        data = self.eval_dataset if isinstance(self.eval_dataset, Dataset) else self.train_dataset
        rows = spread(len(data), GALLERY)

        def draw() -> list[Image.Image]:
            seeds = [torch.Generator().manual_seed(i) for i in range(len(rows))]
            return self.draw(data, rows, seeds, self.args.per_device_train_batch_size)

        after, before = draw(), None
        if self.has_adapter and self.continued is None:
            with self._without_adapter():
                before = draw()
        self.show([data[row]["prompt"] for row in rows], after, before)

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        modules = [m for name in self.denoiser_names for m in self.pipe.components[name].modules()]
        layers = [m for m in modules if isinstance(m, BaseTunerLayer)]
        active = [list(layer.active_adapters) for layer in layers]
        for layer, names in zip(layers, active, strict=True):
            layer._active_adapter = [name for name in names if name != lora.ADAPTER_NAME]
        try:
            yield
        finally:
            for layer, names in zip(layers, active, strict=True):
                layer._active_adapter = names

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

    def _write_card(self, facts: RunFacts) -> None:
        folder = self._output_dir
        files = []
        if not self.is_in_train:
            with suppress(FileNotFoundError):  # nothing has been saved yet
                files = hub.describe(hub.run_files(folder, folder, facts))
        hub.write_card(folder, facts, self.hub_model_id or hub.local_name(folder), self.args.hub_revision, files)

    def _facts(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] | None = None
    ) -> RunFacts:
        args, pipe, names, data = self.args, self.pipe, self.denoiser_names, self.train_dataset
        denoiser, folder = pipe.components[names[0]], self._output_dir
        settings = card_facts.settings_of(args, self.replayer.scheduler) | {"updates": self.state.global_step}
        if self.has_adapter:
            config = denoiser.peft_config[lora.ADAPTER_NAME]
            settings |= {"lora_r": config.r, "lora_alpha": config.lora_alpha}
        dataset, on_hub = card_facts.dataset_of(dataset_name or self.dataset_name)
        name = model_name or (self.hub_model_id or args.hub_model_id or folder.resolve().name).split("/")[-1]
        copies = args.num_generations_eval or args.num_generations
        ended = not self.is_in_train
        shown = ended and self._shown_at == self.state.global_step
        curves = self._draw_curves() if ended else None
        call = {k: v for k, v in self.calls.arguments.items() if isinstance(v, str | int | float | bool | None)}
        evaluated = card_facts.evaluation_of(self.state.log_history, self.eval_scorer.names, copies)
        weights = self.weight_of
        return RunFacts(
            name=name,
            base=card_facts.base_of(pipe, denoiser, cast(dict, args.model_init_kwargs or {})),
            adapter=self.has_adapter,
            denoisers={name: lora.plain_class(pipe.components[name]).__name__ for name in names},
            loads_lora=isinstance(pipe, LoraBaseMixin),
            picture_arguments=[c for c in self.calls.columns(data) if is_picture_column(data, c)],
            output=self.output_field,
            call={k: v for k, v in call.items() if k != "output_type"},
            prompt=self._samples[0].prompt if shown and self._samples else data[0]["prompt"],
            rewards=self._rewards_of_card(),
            settings=settings,
            step=self.state.global_step,
            max_steps=max(self.state.max_steps, self.state.global_step)
            if self.is_in_train
            else self.state.global_step,
            dataset=dataset,
            dataset_on_hub=on_hub,
            train_prompts=len(data),
            started_from=self.started_from or ("unknown" if self.continued is not None else None),
            beside=lora.adapters_beside(denoiser),
            evaluation=self.evaluation if ended and self.evaluation is not None else evaluated,
            samples=self._samples or [] if shown else [],
            sheets=[self._sheet] if shown and self._sheet else [],
            curves=curves,
            calibration=CALIBRATION if ended and (folder / CALIBRATION).is_file() else None,
            reading=card_facts.reading_of(folder),
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

    def _rewards_of_card(self) -> list[Reward]:
        """What is said of ours is not said of a user's by the same name."""
        functions = dict(zip(self.eval_scorer.names, self.eval_scorer.functions, strict=True))
        ours = {name for name, function in functions.items() if _is_ours(function)}
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
            except (*hub.FAILURES, ValueError) as raised:
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
        if self.args.push_to_hub and not _internal_call:
            try:
                self.push_to_hub(commit_message="Model save")
            except (hub.PushError, ValueError) as error:
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
        self._draw_gallery()
        result, error = None, None
        if self.is_world_process_zero():
            facts, folder = self._facts(**kwargs), self._output_dir
            self._write_card(facts)  # should the push fail
            self._finish_current_push()
            push = self._push_of(hub.run_files(folder, folder, facts), commit_message or "End of training")
            push.replaces = hub.OLD_PICTURES
            push.token, push.revision = token or push.token, revision or push.revision
            push.private = push.private if private is None else private
            result = self._start(facts, push)
            try:
                if blocking:
                    result = result.result()
                    self._write_card(facts)  # by now with the license of the base model
            except hub.PushError as raised:
                error = raised
        raise_together(error)
        return result

    def _push_of(self, files: dict[str, Path | bytes], message: str) -> hub.Push:
        args = self.args
        strategy = HubStrategy(args.hub_strategy).value
        return hub.Push(
            repo_id=self._repository,
            files=files,
            message=message,
            run_dir=self._output_dir,
            strategy=strategy if strategy in hub.CHECKPOINT_STRATEGIES else "end",
            revision=args.hub_revision,
            private=args.hub_private_repo,
            token=args.hub_token,
        )

    def _start(self, facts: RunFacts, push: hub.Push) -> "Future[CommitInfo]":
        """Push in the background; the files are kept until it is done."""
        place = self._output_dir / f"{checkpoints.WRITING}push-{next(self._pushes)}"
        push.files = hub.keep(push.files, place)

        def job() -> CommitInfo:
            try:
                done = hub.publish(facts, push)
                self.hub_model_id = push.repo_id
                return done
            finally:
                shutil.rmtree(place, ignore_errors=True)

        return self._uploads.start(job)

    def _save_checkpoint(self, model: torch.nn.Module | None, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            try:
                self._write_card(self._facts())  # for `slas-trl push`, should the run not come to its end
            except OSError as error:
                logger.warning(f"The model card could not be written, and training goes on: {error}")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Weights and card at the root, and the checkpoint in its folder if `hub_strategy` says so, in one commit."""
        if self._writing is not None or not self.is_world_process_zero():  # an upload needs the final name
            return
        strategy = HubStrategy(self.args.hub_strategy)
        if strategy == HubStrategy.END:
            return
        self._unpushed = Path(checkpoint_folder)
        # Of several checkpoints that wait, the newest is enough, unless all are asked for.
        if self._uploads.busy and not self.args.hub_always_push and strategy != HubStrategy.ALL_CHECKPOINTS:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self._push_checkpoint(self._unpushed)

    def _push_checkpoint(self, checkpoint: Path) -> None:
        facts = self._facts()
        files: dict[str, Path | bytes] = dict(hub.weight_files(checkpoint, facts))
        push = self._push_of(files, f"Training in progress, {checkpoint.name.replace('-', ' ')}")
        if push.strategy in hub.CHECKPOINT_STRATEGIES:
            every = push.strategy == hub.ALL_CHECKPOINTS
            push.files |= checkpoint_files(checkpoint, checkpoint.name if every else hub.LAST_CHECKPOINT)
            push.replaces = hub.OLD_CHECKPOINT

        def note(done: "Future[CommitInfo]") -> None:
            if error := done.exception():
                logger.warning(f"{checkpoint.name}: {error}")
            elif self._unpushed == checkpoint:
                self._unpushed = None

        self._start(facts, push).add_done_callback(note)

    def _finish_current_push(self) -> None:
        """Wait for what is under way, and try once more what should be there by now and is not."""
        if self._uploads.busy:
            logger.info("Waiting for the push of a checkpoint to be finished.")
        self._uploads.wait()
        if self._unpushed is not None and self._unpushed.is_dir():
            self._push_checkpoint(self._unpushed)
            self._uploads.wait()
        self._unpushed = None  # what came of it has been told

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
        if isinstance(source, str) and not Path(source).is_dir() and names_checkpoint(source):
            own = source.split("@")[0] == self.args.hub_model_id
            revision = self.args.hub_revision if own else None
            resume_from_checkpoint = str(fetch_checkpoint(source, self._output_dir, revision, self.args.hub_token))
        return super().train(resume_from_checkpoint, *args, **kwargs)


def _is_ours(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return function.__module__.startswith("slas_trl.rewards.")
