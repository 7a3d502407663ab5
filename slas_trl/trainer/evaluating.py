"""The part of the trainer that draws and judges: pictures of prompts, their scores, and `evaluate`."""

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
from datasets import Dataset

from . import sampling
from .calls import PipelineCalls, as_pictures
from .collectives import gathered, raise_together, reshard
from .metrics import reward_metrics
from .prompts import check_prompts
from .resumable import ResumableTrainer
from .scoring import RewardScorer


class EvaluatingTrainer(ResumableTrainer):
    """Samples from the pipeline as its users will, and calls the rewards. The subclass sets the attributes below."""

    calls: PipelineCalls
    scorer: RewardScorer

    def _score(
        self, dataset: Dataset, indices: list[int], images: list[Any], usable: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rewards `(N, K)` of all processes, in the order of their ranks; NaN where an image is not `usable`."""
        rows = self.calls.rows(dataset, indices)
        columns = {key: [row[key] for row in rows] for key in dataset.column_names if key != "prompt"}
        rewards, error = None, None
        try:
            rewards = self.scorer.score([row["prompt"] for row in rows], images, columns)
        except (ValueError, TypeError) as raised:
            error = raised
        save = (lambda: self._save_unfinished("A reward failed")) if self.is_in_train else None
        raise_together(error, save)
        assert rewards is not None  # or there was an error
        if usable is not None:
            rewards[~usable] = torch.nan
        return torch.tensor([row for part in gathered(rewards.tolist()) for row in part], dtype=torch.float64)

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,  # type: ignore[override]
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Sample `num_generations_eval` images for each prompt with the pipeline's own scheduler, the same noise every
        time, and score them.

        Returns:
            `dict[str, float]`: `eval_reward`, `eval_reward_std` (between images), `eval_rewards/{name}/mean` and
            `/std`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("There are no prompts to evaluate on; pass eval_dataset to the trainer or to evaluate().")
        if isinstance(dataset, dict):
            metrics = {}
            for name, data in dataset.items():
                metrics |= self.evaluate(cast(Dataset, data), ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        check_prompts(dataset, "eval_dataset")  # type: ignore[arg-type]
        self.calls.check(dataset, like=self.train_dataset)  # type: ignore[arg-type]
        start = time.perf_counter()
        rewards = self._sample_and_score(dataset)  # type: ignore[arg-type]
        weights = torch.tensor(self.args.reward_weights or [1.0] * rewards.shape[1], dtype=torch.float64)
        total = (rewards.nan_to_num() * weights).sum(1)
        total[(rewards.isnan() | (weights == 0)).all(1)] = torch.nan
        metrics = {"reward": total.nanmean().item(), "reward_std": total[~total.isnan()].std(correction=0).item()}
        metrics |= reward_metrics(self.scorer.names, rewards)
        metrics |= {"runtime": time.perf_counter() - start, "samples": len(rewards)}
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _sample_and_score(self, dataset: Dataset) -> torch.Tensor:
        args, world = self.args, self.accelerator.num_processes
        copies = args.num_generations_eval or args.num_generations
        jobs = [(i, j) for i in range(len(dataset)) for j in range(copies)]
        size = min(args.per_device_eval_batch_size, -(-len(jobs) // world))
        if self.calls.one_row_each(dataset):  # some pipelines make one image in such a call, as training was told
            size = min(size, args.per_device_train_batch_size)
        chunks = self.calls.chunks(dataset, [i for i, _ in jobs], size)
        # Every process makes equally many calls, so that those of a sharded model meet; surplus ones are dropped.
        share = -(-len(chunks) // world)
        first = self.accelerator.process_index * share
        mine = [jobs[k] for at in range(first, first + share) for k in chunks[at % len(chunks)]]
        indices = [i for i, _ in mine]
        seeds = sampling.generators([(args.seed, sampling.EVALUATION, i, j) for i, j in mine])
        return self._score(dataset, indices, self.draw(dataset, indices, seeds, size))[: len(jobs)]

    @torch.no_grad()
    def draw(
        self, dataset: Dataset, indices: Sequence[int], generators: list[torch.Generator], size: int
    ) -> list[Any]:
        """
        Pictures of the rows at `indices`, one each, by the pipeline's own scheduler, at most `size` in a call; with
        the moving average where there is one. Every process of a sharded model has to call it with as many.
        """
        modes = {name: self.pipe.components[name].training for name in self.denoiser_names}
        for name in modes:
            self.pipe.components[name].eval()
        self._place_frozen_components(self.accelerator.device)
        images = []
        with self._averaged_weights():
            for chunk in self.calls.chunks(dataset, indices, size):
                rows = [indices[i] for i in chunk]
                images += as_pictures(self.pipe(**self.calls.call(dataset, rows, [generators[i] for i in chunk]))[0])
        reshard(cast(torch.nn.Module, self.model))
        if self.is_in_train:
            self._place_frozen_components("cpu")
        for name, mode in modes.items():
            self.pipe.components[name].train(mode)
        return images
