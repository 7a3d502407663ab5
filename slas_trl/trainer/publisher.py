"""The trainer's publications: facts of the run, pictures and the model card, beside the weights and on the Hub."""

import tempfile
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset
from huggingface_hub import CommitInfo, HfApi
from PIL import Image
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from .. import run_files
from ..images import still
from ..publishing import repository
from ..publishing.card import write_card
from ..publishing.facts import Evaluation, RunFacts, Sample
from ..statistics import evenly_spaced
from . import adapters
from .card_facts import gather_facts
from .checkpoints import ON_HUB, discard, fetch_checkpoint
from .distributed import gathered, raise_together, wait_together


if TYPE_CHECKING:
    from .slas_trainer import SLASTrainer

logger = logging.get_logger(__name__)

UPLOAD_POLL_SECONDS = 60
PICTURES = 6  # prompts that are drawn for the card


@dataclass(eq=False)
class Publisher(TrainerCallback):
    """
    Gathers the facts of a run, and puts them beside its weights and on the Hub. In training it pushes in the
    background, and never ends a run.
    """

    trainer: "SLASTrainer"  # which is not built yet
    dataset_name: str | None = None  # of the prompts
    started_from: str | None = None  # the adapter that training went on from
    model_name: str | None = None
    tags: list[str] = field(default_factory=list)  # further ones for the Hub
    evaluation: Evaluation | None = None  # of the result; by default the Trainer's
    samples: list[Sample] = field(default_factory=list)  # pictures of the result
    sheet: str | None = None  # all of them, and the curves, by their paths in the run's folder
    curves: str | None = None
    is_training: bool = False

    def __post_init__(self):
        self._data: Dataset | None = None  # the prompts of the pictures, and which of them
        self._rows: Sequence[int] = []
        self._before: list[Image.Image] | None = None
        self._has_shown = False  # since training began; the same on all ranks, unlike `samples`
        self._api = HfApi()  # its thread pushes one after the other
        self._upload: tuple[Future[CommitInfo], Path] | None = None  # the last one, and where its files are kept

    def on_train_begin(self, args, state, control, **kwargs):
        self.is_training, self._has_shown = True, False
        self.samples, self.sheet, self.curves, self.evaluation = [], None, None, None
        if args.push_to_hub and self._data is None and state.global_step == 0:
            self.choose_prompts(*self._default_prompts)

    def on_train_end(self, args, state, control, **kwargs):
        self.is_training = False

    # Pictures

    def choose_prompts(self, data: Dataset, rows: Sequence[int]) -> None:
        """
        The prompts whose pictures the card shows, the i-th drawn with seed i; now, if later there is no adapter to
        leave out. Collective: every rank must call this.
        """
        self._data, self._rows = data, rows
        if not self._begins_without_adapter:
            self._before = self._draw()

    def show(self) -> None:
        """Draw them by the weights as they are now. Collective: every rank must call this."""
        if self._data is None:
            self._data, self._rows = self._default_prompts
        data, rows, before, error = self._data, self._rows, self._before, None
        after = self._draw()
        if self._begins_without_adapter:
            with self.trainer.replayer.without_adapter(adapters.ADAPTER_NAME):
                before = self._draw()
        if self.trainer.is_world_process_zero():
            from ..reports.samples import save_samples  # matplotlib, not before it is needed

            try:
                prompts, inputs = data.select(rows)["prompt"], self.trainer.inputs.pictures(data, rows)
                self.samples, self.sheet = save_samples(self.trainer.args.run_dir, prompts, after, before, inputs)
            except (OSError, ValueError) as raised:
                error = ValueError(f"The pictures for the card could not be written: {raised}")
        raise_together(error)
        self._has_shown = True

    def _draw(self) -> list[Image.Image]:
        seeds, size = range(len(self._rows)), self.trainer.args.per_device_train_batch_size
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return list(map(still, self.trainer.evaluator.draw(cast(Dataset, self._data), self._rows, generators, size)))

    @property
    def _default_prompts(self) -> tuple[Dataset, list[int]]:
        trainer = self.trainer
        data = trainer.eval_dataset if isinstance(trainer.eval_dataset, Dataset) else trainer.train_dataset
        return data, evenly_spaced(len(data), PICTURES)

    @property
    def _begins_without_adapter(self) -> bool:
        """Whether the pipeline before training is, at any time, the one without the adapter."""
        return self.trainer.trained.has_adapter and self.trainer.trained.continued is None

    # Facts

    @property
    def step(self) -> int:
        """Updates that made the weights: after training they may be the best ones."""
        state, args = self.trainer.state, self.trainer.args
        is_best = args.load_best_model_at_end and state.best_model_checkpoint and not self.is_training
        return cast(int, state.best_global_step) if is_best else state.global_step

    def facts(self) -> RunFacts:
        """The facts of the run that are known by now."""
        return gather_facts(self.trainer)

    def write(self, folder: Path) -> None:
        """Put facts and card beside the weights in `folder`; a card that no run has written stays."""
        if (folder / run_files.CARD).exists() and not (folder / run_files.FACTS).exists():
            self.facts().write(folder)
        else:
            write_card(folder, self.facts())

    def write_result(self, model_name: str | None = None, dataset_name: str | None = None, tags: Any = None) -> None:
        """Write the card into the run's folder, with its curves. `tags` is one or a list."""
        folder = self.trainer.args.run_dir
        self.model_name, self.dataset_name = model_name or self.model_name, dataset_name or self.dataset_name
        self.tags = [tags] if isinstance(tags, str) else list(tags or self.tags)
        if not self.is_training and (folder / run_files.METRICS).is_file():
            from ..reports.curves import plot_training

            plot_training(folder / run_files.METRICS, folder / run_files.CURVES)
            self.curves = run_files.CURVES
        write_card(folder, self.facts())

    # The Hub

    @property
    def repo_id(self) -> str:
        return self.trainer.hub_model_id or self.trainer.args.hub_model_id or self.trainer.args.run_dir.resolve().name

    def create_repository(self, token: str | None, private: bool | None) -> None:
        """See [`~SLASTrainer.init_hf_repo`]. Collective: every rank must call this."""
        trainer, error = self.trainer, None
        if trainer.is_world_process_zero():
            token = token or trainer.args.hub_token
            private = trainer.args.hub_private_repo if private is None else private
            try:
                trainer.hub_model_id = repository.create_repository(self.repo_id, private, token)
                repository.check_token(token)
            except Exception as raised:
                error = ValueError(f"push_to_hub cannot push to {self.repo_id!r}: {repository.reason(raised)}.")
                if not repository.is_refusal(raised):
                    logger.warning(f"{error} Training goes on, and each push tries again.")
                    error = None
        raise_together(error)

    def push(
        self, message: str, blocking: bool, token: str | None, revision: str | None, private: bool | None, **names: Any
    ) -> "CommitInfo | Future[CommitInfo] | None":
        """See [`~SLASTrainer.push_to_hub`]. Collective: every rank must call this."""
        trainer, upload, error = self.trainer, None, None
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        trainer.save_model(_internal_call=True)
        self.wait()
        if self.is_training or not self._has_shown:
            self.show()
        if trainer.is_world_process_zero():
            try:
                self.write_result(**names)  # should the push fail
                facts, folder = self.facts(), trainer.args.run_dir
                push = self._push(repository.result_files(folder, facts, folder), message, repository.OLD_PICTURES)
                push.token, push.revision = token or push.token, revision or push.revision
                push.private = push.private if private is None else private
                upload = self._start(facts, push, is_result=True)
            except Exception as raised:  # the other processes wait for a word
                error = raised
        raise_together(error)
        if not blocking:
            return upload
        self.wait()
        raise_together(upload and cast(Exception | None, upload.exception()))
        return upload and upload.result()

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Start pushing weights, card and, if `hub_strategy` says so, the whole checkpoint. Not collective."""
        trainer, strategy = self.trainer, HubStrategy(self.trainer.args.hub_strategy)
        if not trainer.is_world_process_zero() or strategy == HubStrategy.END:
            return
        every = trainer.args.hub_always_push or strategy == HubStrategy.ALL_CHECKPOINTS
        if self._upload is not None and not every and self._upload[0].cancel():  # it has not begun: this one is newer
            discard(self._upload[1])
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        try:
            facts = self.facts()
            files = repository.result_files(checkpoint, facts, checkpoint)
            if strategy.value in repository.CHECKPOINT_STRATEGIES:
                files |= repository.checkpoint_files(checkpoint, strategy.value)
            message = f"Training in progress, {checkpoint.name.replace('-', ' ')}"
            self._start(facts, self._push(files, message, repository.OLD_CHECKPOINT), is_result=False)
        except OSError as error:  # a full disk, for one
            logger.warning(f"{checkpoint.name} was not pushed, and training goes on: {error}")

    def _push(self, files: repository.Files, message: str, replaces: str) -> repository.Push:
        args, strategy = self.trainer.args, HubStrategy(self.trainer.args.hub_strategy).value
        strategy = strategy if strategy in repository.CHECKPOINT_STRATEGIES else "end"
        place = args.hub_revision, args.hub_private_repo, args.hub_token
        return repository.Push(self.repo_id, files, message, Path(args.output_dir or "."), strategy, *place, replaces)

    def _start(self, facts: RunFacts, push: repository.Push, is_result: bool) -> "Future[CommitInfo]":
        """Push in the background; the files are kept until then."""
        place = Path(tempfile.mkdtemp(prefix=f"{run_files.WRITING}push-", dir=self.trainer.args.run_dir))
        push.files = repository.keep(push.files, place)

        def upload() -> CommitInfo:
            try:
                done = repository.publish(facts, push)
                self.trainer.hub_model_id = push.repo_id
                if is_result:
                    write_card(self.trainer.args.run_dir, facts)  # the same here and there
                return done
            except repository.PushError as error:
                logger.warning(f"{push.message}: {error}")
                raise
            finally:
                discard(place)

        self._upload = self._api.run_as_future(upload), place
        return self._upload[0]

    def wait(self) -> None:
        """Until nothing is being uploaded. Collective: every rank must call this."""
        wait_together(lambda: self._upload is None or not wait_for([self._upload[0]], UPLOAD_POLL_SECONDS).not_done)

    def fetch(self, source: str | bool | None) -> str | bool | None:
        """
        A checkpoint on the Hub as a folder, anything else as it is; one process of each machine downloads. Collective:
        every rank must call this.
        """
        if not isinstance(source, str) or Path(source).is_dir() or not ON_HUB.fullmatch(source):
            return source
        args, path, error = self.trainer.args, None, None
        is_own = "/".join(source.split("@")[0].split("/")[:2]) == gathered(self.repo_id)[0]
        if self.trainer.accelerator.is_local_main_process:
            try:
                revision = args.hub_revision if is_own else None
                path = str(fetch_checkpoint(source, args.run_dir, revision, args.hub_token))
            except (OSError, ValueError) as raised:
                error = raised
        raise_together(error)
        return next(found for found in gathered(path) if found is not None)
