"""The part of the trainer that draws and judges: pictures of prompts, their scores, and `evaluate`."""

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from datasets import Dataset

from ..advantages import weighted_sum
from ..policy import call_pipeline
from . import sampling
from .calls import PipelineCalls, as_pictures
from .collectives import gathered, raise_together, reshard
from .metrics import half_widths, reward_metrics, reward_times
from .prompts import check_prompts
from .resumable import ResumableTrainer
from .scoring import RewardScorer, Scores, Scoring, other_components


class EvaluatingTrainer(ResumableTrainer):
    """Samples from the pipeline as its users will, and calls the rewards. The subclass sets the attributes below."""

    calls: PipelineCalls
    scorer: RewardScorer
    eval_scorer: RewardScorer  # those of `scorer`, and then the ones that are held out

    @property
    def trained_weights(self) -> list[float]:
        """Of the rewards of `scorer`."""
        return self.args.reward_weights or [1.0] * len(self.scorer.names)

    @property
    def weight_of(self) -> dict[str, float]:
        """Weights by name of all rewards that are scored in evaluation: 0 for those that are never trained on."""
        own = zip(self.scorer.names, self.trained_weights, strict=True)
        return dict.fromkeys(self.eval_scorer.names, 0.0) | dict(own)

    def _start_scoring(self, scorer: RewardScorer) -> Scoring:
        return Scoring(scorer, self.args.concurrent_rewards)

    def _add_images(self, scoring: Scoring, dataset: Dataset, indices: Sequence[int], images: list[Any]) -> None:
        rows = self.calls.rows(dataset, list(indices))
        columns = {key: [row[key] for row in rows] for key in dataset.column_names if key != "prompt"}
        scoring.add([row["prompt"] for row in rows], images, columns)

    def _gather_scores(self, scoring: Scoring, usable: torch.Tensor | None = None) -> Scores:
        """Scores of all processes, in the order of their ranks; NaN where an image is not `usable`."""
        scores, errors = scoring.result()
        self._raise_reward_errors(errors)
        if usable is not None:
            for values in (scores.rewards, *scores.components.values()):
                values[~usable] = torch.nan
        parts = gathered((scores.rewards, scores.components))
        names: list[str] = []
        for i, name in enumerate(scoring.scorer.names):
            told = [
                [key for key in components if key.startswith(f"{name}/")]
                for rewards, components in parts
                if not rewards[:, i].isnan().all()  # without a score it may be without components
            ]
            if any(set(keys) != set(told[0]) for keys in told):  # all processes see it
                self._raise_reward_errors({name: other_components(name, told)})
            names += told[0] if told else []
        components = {
            key: torch.cat([own.get(key, torch.full_like(rewards[:, 0], torch.nan)) for rewards, own in parts])
            for key in names
        }
        return Scores(torch.cat([rewards for rewards, _ in parts]), components, scores.seconds)

    def _raise_reward_errors(self, errors: dict[str, Exception]) -> None:
        save = (lambda: self._save_unfinished("A reward failed")) if self.is_in_train else None
        raise_together(next(iter(errors.values()), None), save)

    def _check_evaluation(self, dataset: Dataset) -> None:
        check_prompts(dataset, "eval_dataset")
        self.calls.check(dataset, like=self.train_dataset)
        self.eval_scorer.check(dataset)

    def _check_best_metric(self) -> None:
        """Raises `ValueError` for a `metric_for_best_model` that no evaluation will have."""
        metric, data = self.args.metric_for_best_model, self.eval_dataset
        prefixes = [f"eval_{name}_" for name in data] if isinstance(data, dict) else ["eval_"]
        rewards = [f"{prefix}rewards/{name}/" for prefix in prefixes for name in self.eval_scorer.names]
        known = [f"{prefix}{name}" for prefix in prefixes for name in ("reward", "reward_std")]
        known += [f"{prefix}mean" for prefix in rewards]
        asked = f"eval_{(metric or '').removeprefix('eval_')}"
        if data is not None and metric and asked not in known:
            raise ValueError(f"metric_for_best_model must be one of {', '.join(known)}, but it is {metric!r}.")

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
            `dict[str, float]`: `eval_reward`, `eval_reward_std` (between images) of the rewards that are trained on;
            `eval_rewards/{name}/mean`, `/half_width` (of the mean's 95% interval, from the differences between
            prompts), `/std`, `/nan_share` and `/time` of these and of the held-out ones.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("There are no prompts to evaluate on; pass eval_dataset to the trainer or to evaluate().")
        if isinstance(dataset, dict):
            metrics = {}
            for name, data in dataset.items():
                metrics |= self.evaluate(cast(Dataset, data), ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        self._check_evaluation(dataset)  # type: ignore[arg-type]
        start = time.perf_counter()
        scores = self._sample_and_score(dataset)  # type: ignore[arg-type]
        weights = torch.tensor(self.trained_weights, dtype=torch.float64)
        rewards = scores.rewards[:, : len(weights)].masked_fill(weights == 0, torch.nan)
        by_prompt = rewards.T.reshape(len(weights), len(dataset), -1)  # type: ignore[arg-type]
        total = weighted_sum(by_prompt, weights.view(-1, 1, 1)).flatten()
        metrics = {"reward": total.nanmean().item(), "reward_std": total[~total.isnan()].std(correction=0).item()}
        metrics |= reward_metrics(self.eval_scorer.names, scores) | reward_times(self.eval_scorer.names, scores)
        metrics |= half_widths(self.eval_scorer.names, scores.rewards, len(dataset))  # type: ignore[arg-type]
        metrics |= {"runtime": time.perf_counter() - start, "samples": len(rewards)}
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _sample_and_score(self, dataset: Dataset) -> Scores:
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
        with self._start_scoring(self.eval_scorer) as scoring:
            self.draw(dataset, indices, seeds, size, lambda rows, made: self._add_images(scoring, dataset, rows, made))
            scores = self._gather_scores(scoring)
        components = {name: values[: len(jobs)] for name, values in scores.components.items()}
        return Scores(scores.rewards[: len(jobs)], components, scores.seconds)

    @torch.no_grad()
    def draw(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        generators: list[torch.Generator],
        size: int,
        on_chunk: Callable[[list[int], list[Any]], None] = lambda rows, images: None,
    ) -> list[Any]:
        """
        Pictures of the rows at `indices`, one each, see [`as_pictures`], by the pipeline's own scheduler, at most
        `size` in a call, after which `on_chunk` gets its rows and pictures; by the weights as they are once saved and
        loaded. Every process of a sharded model has to call it with as many.
        """
        modes = {name: self.pipe.components[name].training for name in self.denoiser_names}
        for name in modes:
            self.pipe.components[name].eval()
        self._place_frozen_components(self.accelerator.device)
        images = []
        with self.as_published():
            for chunk in self.calls.chunks(dataset, indices, size):
                rows = [indices[i] for i in chunk]
                call = self.calls.call(dataset, rows, [generators[i] for i in chunk])
                output, problems = call_pipeline(self.pipe, call)
                made = as_pictures(output[0], problems, call["prompt"])
                on_chunk(rows, made)
                images += made
        reshard(cast(torch.nn.Module, self.model))
        if self.is_in_train:
            self._place_frozen_components("cpu")
        for name, mode in modes.items():
            self.pipe.components[name].train(mode)
        return images
