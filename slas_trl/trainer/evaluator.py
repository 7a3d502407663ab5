"""Drawing pictures as users of the saved weights will, and scoring them: for `evaluate`, reports and the card."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import Accelerator
from datasets import Dataset

from ..advantages import weighted_sum
from ..policy import call_pipeline
from ..seeds import seed_for
from .distributed import reshard
from .metrics import half_widths, reward_metrics, reward_times
from .pipeline_inputs import Batch, PipelineInputs, as_pictures
from .prompts import check_prompts
from .sampling import EVALUATION
from .scoring import RewardScorer, Scores, Scoring
from .slas_config import SLASConfig
from .trained_model import TrainedModel


@dataclass(eq=False)
class Evaluator:
    """Samples with the pipeline's own scheduler, by the weights as they are once saved and loaded."""

    trained: TrainedModel
    inputs: PipelineInputs
    scorer: RewardScorer  # the trained rewards first
    weights: list[float]  # of these
    args: SLASConfig
    accelerator: Accelerator  # knows the processes, which share the work
    before_error: Callable[[], None]  # called on all ranks before a reward's error is raised

    def check(self, dataset: Dataset, like: Dataset) -> None:
        """Raises `ValueError` or `TypeError` for prompts that do not fit the pipeline, the rewards or `like`."""
        check_prompts(dataset, "eval_dataset")
        self.inputs.check(dataset, like=like)
        self.scorer.check(dataset)

    @torch.no_grad()
    def draw(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        generators: Sequence[torch.Generator],
        size: int,
        on_batch: Callable[[Batch, list[Any]], None] = lambda batch, images: None,
    ) -> list[Any]:
        """
        Pictures of the rows at `indices`, one for each with its generator and at most `size` in a call, see
        [`as_pictures`]; each [`Batch`] and its pictures are given to `on_batch`. Collective if the model is sharded:
        every rank must call this for equally many.
        """
        images = []
        place = self.trained.place_frozen(self.accelerator.device)
        with self.trained.as_published():
            for batch in self.inputs.batches(dataset, indices, generators, size):
                output, problems = call_pipeline(self.trained.pipe, batch.call)
                made = as_pictures(output[0], problems, batch.call["prompt"])
                on_batch(batch, made)
                images += made
        reshard(self.trained.module)
        self.trained.place_frozen(place)
        return images

    def score(self, dataset: Dataset, indices: Sequence[int], seeds: Sequence[int], size: int) -> Scores:
        """
        Draw one picture for each of the N rows at `indices`, with its seed, and score it. Collective: every rank must
        call this with the same arguments, and gets all N scores.
        """
        world = self.accelerator.num_processes
        size = min(size, -(-len(indices) // world))
        if self.inputs.one_row_each(dataset):  # some pipelines make one image in such a call, as training was told
            size = min(size, self.args.per_device_train_batch_size)
        chunks = self.inputs.chunks(dataset, indices, size)
        # Every process makes equally many calls, so that those of a sharded model meet; surplus ones are dropped.
        share = -(-len(chunks) // world)
        first = self.accelerator.process_index * share
        mine = [k for at in range(first, first + share) for k in range(len(indices))[chunks[at % len(chunks)]]]
        generators = [torch.Generator().manual_seed(seeds[k]) for k in mine]
        with Scoring(self.scorer, self.args.concurrent_rewards) as scoring:
            rows = [indices[k] for k in mine]
            self.draw(dataset, rows, generators, size, lambda b, images: scoring.add(b.prompts, images, b.columns))
            scores = scoring.gather(before_error=self.before_error)
        components = {name: values[: len(indices)] for name, values in scores.components.items()}
        return Scores(scores.rewards[: len(indices)], components, scores.seconds)

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """Metrics, see [`~SLASTrainer.evaluate`]. Collective: every rank must call this."""
        args, names, start = self.args, self.scorer.names, time.perf_counter()
        copies = args.num_generations_eval or args.num_generations
        jobs = [(i, j) for i in range(len(dataset)) for j in range(copies)]
        seeds = [seed_for(args.seed, EVALUATION, i, j) for i, j in jobs]
        scores = self.score(dataset, [i for i, _ in jobs], seeds, args.per_device_eval_batch_size)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        rewards = scores.rewards[:, : len(weights)].masked_fill(weights == 0, torch.nan)
        by_prompt = rewards.T.reshape(len(weights), len(dataset), copies)
        total = weighted_sum(by_prompt, weights.view(-1, 1, 1)).flatten()
        return {
            "reward": total.nanmean().item(),
            "reward_std": cast(torch.Tensor, total[~total.isnan()]).std(correction=0).item(),
            **reward_metrics(names, scores),
            **reward_times(names, scores),
            **half_widths(names, scores.rewards, len(dataset)),
            "runtime": time.perf_counter() - start,
            "samples": len(rewards),
        }
