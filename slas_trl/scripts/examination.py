"""The start of a training run, taken apart for `slas-trl doctor`: one rollout and one micro-step, and no update."""

import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset

from slas_trl.advantages import Advantages
from slas_trl.policy import RatioReport, Rollout, measure_ratio
from slas_trl.policy.doctor import counting_activations
from slas_trl.trainer import SLASTrainer
from slas_trl.trainer.scoring import RewardScorer, Scores, Scoring


@dataclass
class Findings:
    """What is wrong: `refusals` keep training from starting, `warnings` do not."""

    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def refuse(self, error: Exception, stage: str = "") -> None:
        """Note an error, which in a foreign pipeline or reward may be of any kind."""
        if os.environ.get("SLAS_TRL_DEBUG") == "1":
            traceback.print_exception(error)
        plain = isinstance(error, (ValueError, TypeError, OSError, ImportError))  # which `slas-trl` tells as they are
        kind = "" if plain else f"{type(error).__name__}: "
        message = f"{stage}{': ' if stage else ''}{kind}{error}"
        if isinstance(error, torch.OutOfMemoryError):
            message += (
                " Lower per_device_train_batch_size, set activation_checkpointing, or train an adapter (use_peft)."
            )
        self.refusals.append(message)


class ExaminedTrainer(SLASTrainer):
    """
    Does what `train` does first, with the trainer's own methods, keeps what comes of it, and goes on where `train`
    would stop, to find what else is wrong.

    Attributes:
        rollout (`Rollout` or `None`): the first chunk; `None` if it could not be sampled.
        images (`list[PIL.Image.Image]`): of all chunks.
        rewards, held_out (`torch.Tensor` or `None`): `(N, K)` each, NaN for no score.
        failed (`set[str]`): rewards that raised.
        trained_steps (`list[int]`): those of this rollout.
        ratio (`RatioReport` or `None`): of the trained steps.
        activations (`int`): bytes that autograd keeps of one micro-step.
        seconds, peaks (`dict`): time, and on CUDA peak memory, of "sampling", "scoring" and "micro-step".
    """

    def examine(self, indices: list[int], findings: Findings) -> None:
        """Sample and score these prompts, and compute one micro-step with its gradients."""
        self.findings = findings
        self.rollout: Rollout | None = None
        self.images: list[Any] = []
        self._to_score: list[tuple[Sequence[int], list[Any]]] = []
        self.rewards: torch.Tensor | None = None
        self.held_out: torch.Tensor | None = None
        self.failed: set[str] = set()
        self.trained_steps: list[int] = []
        self.ratio: RatioReport | None = None
        self.activations = 0
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

        model = cast(torch.nn.Module, self.model)
        try:
            self.create_optimizer()
        except Exception as error:
            findings.refuse(error, "No optimizer can be made")
        self.model_wrapped = self.accelerator.prepare(model)  # autocast and compilation come with it
        model.train()
        self._start()
        try:
            inputs = self._prepare_inputs(indices)
        except Exception as error:
            findings.refuse(error, "The first rollout failed")
            return
        if not self.trained_steps:
            return
        try:
            self._replay(model, inputs)
        except Exception as error:
            findings.refuse(error, "The first micro-step failed")

    def _replay(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        rollout = inputs["rollout"]
        self.ratio = measure_ratio(self.replayer, rollout, tuple(sorted(self.trained_steps)))
        if (problem := self.ratio.problem(self.args.epsilon)) is not None:
            self.findings.refusals.append(problem)
        modules = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        self._start()
        with counting_activations(*modules, rollout.state(), [a.result for a in rollout.memo]) as activations:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
            self.activations = sum(activations.values())
        self.accelerator.backward(loss)
        self._stop("micro-step")
        model.zero_grad()

    def _start(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def _stop(self, what: str) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
            self.peaks[what] = torch.cuda.max_memory_allocated()
        self.seconds[what] = time.perf_counter() - self._started
        self._start()

    # What the trainer calls on the way, in this order

    def _choose_steps(self, rollout: Rollout, rng: np.random.Generator) -> list[int]:
        self._stop("sampling")
        self.rollout = rollout
        try:
            self.trained_steps = super()._choose_steps(rollout, rng)
        except ValueError as error:
            self.findings.refuse(error)
            return [0]  # so that the rewards are examined all the same
        return self.trained_steps

    def _start_scoring(self, scorer: RewardScorer) -> Scoring:
        return super()._start_scoring(self.eval_scorer)  # the held-out ones too: not hours later

    def _add_images(self, scoring: Scoring, dataset: Dataset, indices: Sequence[int], images: list[Any]) -> None:
        self.images += images
        self._to_score.append((indices, images))  # after sampling, to tell the times apart

    def _gather_scores(self, scoring: Scoring, usable: torch.Tensor | None = None) -> Scores:
        for indices, images in self._to_score:
            super()._add_images(scoring, self.train_dataset, indices, images)
        scores, trained = super()._gather_scores(scoring), len(self.scorer.names)
        self.rewards, self.held_out = scores.rewards[:, :trained], scores.rewards[:, trained:]
        self._stop("scoring")
        return replace(scores, rewards=self.rewards)

    def _raise_reward_errors(self, errors: dict[str, Exception]) -> None:
        for error in errors.values():  # a failing one does not hide the others
            self.findings.refuse(error)
        self.failed |= errors.keys()

    def _log_rollout(self, scores: Scores, result: Advantages) -> None:
        pass

    def _check_before_training(self, chunks: list[Rollout], steps: list[int], rewards: torch.Tensor) -> None:
        self._checked = True  # the report says more of the same
