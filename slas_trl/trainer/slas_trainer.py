"""
`SLASTrainer`: GRPO-style fine-tuning of any diffusers pipeline with Super-Linear Advantage Shaping.

The loop is transformers' Trainer's. Its model is the denoiser, and one of its micro-steps is one chunk of sampled
trajectories at one timestep. The mathematics is in `advantages.py`, `objective.py`, `schedulers/` and `policy/`.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo
from peft import PeftConfig
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from ..advantages import Advantages, compute_advantages
from ..images import still
from ..loading import load_pipeline
from ..objective import clip_indicators, clipped_surrogate_loss, gaussian_kl, importance_ratio
from ..policy import PipelineReplayer, Rollout, check_pipeline, measure_ratio
from ..rewards.base import RewardFunc
from ..schedulers import stochastic_scheduler
from ..seeds import generators
from . import checkpoints, sampling
from .base_trainer import BaseTrainer, Buffer
from .calibration import CalibrationCallback, rollout_record
from .callbacks import (
    DenoiserTensorBoardCallback,
    MetricsFileCallback,
    PromptOrderCallback,
    RewardHackingCallback,
    RLProgressCallback,
)
from .distributed import average_gradients, check_sharding, gathered, raise_together, reshard
from .evaluator import Evaluator
from .gamma import GammaControl
from .metrics import MetricMeans, advantage_problem, reward_times, rollout_metrics, warn_of_resolution
from .pipeline_inputs import Batch, PipelineInputs, as_pictures
from .prompts import check_prompts, load_prompts
from .publisher import Publisher
from .scoring import RewardScorer, Scores, Scoring
from .slas_config import SLASConfig
from .trained_model import TrainedModel


logger = logging.get_logger(__name__)

UNSCORED_ROLLOUTS = 5  # in a row, which end the training


class SLASTrainer(BaseTrainer):
    """
    Trainer for Super-Linear Advantage Shaping (SLAS), and with `scale_rewards="group", gamma=0` for GRPO.

    Args:
        model ([`~diffusers.DiffusionPipeline`] or `str`):
            A text-to-image pipeline, or a path or Hub id, loaded with `args.model_init_kwargs`.
        reward_funcs (`Callable`, `str` or a list of them):
            `reward(prompts, images, **columns) -> list[float | None]`, sync or async; or names of rewards.
        args ([`SLASConfig`], *optional*): the configuration.
        train_dataset (`Dataset`, *optional*):
            Has a column "prompt"; the others reach the rewards. By default `args.prompt_dataset`.
        eval_dataset (`Dataset`, *optional*): prompts for [`~SLASTrainer.evaluate`].
        callbacks (`list[TrainerCallback]`, *optional*): further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`): optimizer and learning-rate scheduler.
        peft_config (`LoraConfig`, *optional*):
            Trains a new adapter. Without it, the one that the pipeline carries is trained on, or else all weights.
        eval_reward_funcs (`Callable`, `str` or a list of them, *optional*):
            Held-out rewards: scored and logged in evaluation, never trained on.

    Raises:
        `ValueError`, `TypeError`: when something does not fit.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: DiffusionPipeline | str,
        reward_funcs: RewardFunc | str | Sequence[RewardFunc | str],
        args: SLASConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        eval_reward_funcs: RewardFunc | str | Sequence[RewardFunc | str] | None = None,
    ):
        args = SLASConfig() if args is None else args
        checkpoints.try_writing(args.run_dir)
        self.scorer = self.eval_scorer = RewardScorer(reward_funcs)
        if eval_reward_funcs:
            self.eval_scorer = RewardScorer([*self.scorer.functions, *RewardScorer(eval_reward_funcs).functions])
        if eval_reward_funcs and eval_dataset is None:
            raise ValueError("eval_reward_funcs are scored on the prompts of eval_dataset; pass one.")
        if args.reward_weights is not None and len(args.reward_weights) != len(self.scorer.names):
            given = f"reward_weights has {len(args.reward_weights)} entries for {len(self.scorer.names)} rewards"
            raise ValueError(f"{given} ({', '.join(self.scorer.names)}); give one for each.")
        pipe = load_pipeline(model, cast(dict, args.model_init_kwargs or {})) if isinstance(model, str) else model
        check_pipeline(pipe)
        self.pipe, self.inputs = pipe, PipelineInputs(pipe, args)
        self.publisher = Publisher(self)
        if train_dataset is None:
            data, self.publisher.dataset_name = load_prompts(args.prompt_dataset), args.prompt_dataset
        else:
            data = check_prompts(train_dataset, "train_dataset")
        self.inputs.check(data)
        self.scorer.check(data)
        self._sampler = sampling.prompt_sampler(args, len(data))
        trained = TrainedModel(pipe, args, peft_config)
        args.activation_checkpointing = args.gradient_checkpointing = False  # the Trainer knows transformers' models
        noise: dict[str, Any] = {name: getattr(args, name) for name in ("noise_schedule", "noise_level", "eta")}
        self.replayer = PipelineReplayer(pipe, stochastic_scheduler(pipe, **noise))
        self.replayer.scheduler.noisy_final_step = args.train_final_step  # noise that no step explains is not scored
        own = [PromptOrderCallback(self._sampler), MetricsFileCallback(), self.publisher]
        given = {"train_dataset": data, "eval_dataset": eval_dataset, "callbacks": [*own, *(callbacks or [])]}
        super().__init__(trained, args=args, data_collator=list, **given, optimizers=optimizers)
        self.evaluator = Evaluator(
            trained, self.inputs, self.eval_scorer, self.trained_weights, args, self.accelerator, self._before_error
        )
        for prompts in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            if prompts is not None:
                self.evaluator.check(prompts, like=data)
        self._check_best_metric()
        check_sharding(self.accelerator, self.is_fsdp_enabled, len(trained.names))
        set_seed(args.seed, device_specific=True)
        trained.to(self.accelerator, self.is_fsdp_enabled)
        self.gamma = GammaControl(
            args, self.replayer, trained.module, self.accelerator, lambda *figure: self._metrics.add(*figure)
        )
        self.parts.append(self.gamma)
        self._add_callbacks()
        self.reset_progress()

    def _before_error(self) -> None:
        if self.is_in_train:
            self.save_unfinished("A reward failed")

    def _check_best_metric(self) -> None:
        """Raises `ValueError` for a `metric_for_best_model` that no evaluation will have."""
        metric, data = self.args.metric_for_best_model, self.eval_dataset
        prefixes = [f"eval_{name}_" for name in data] if isinstance(data, dict) else ["eval_"]
        of_rewards = [f"rewards/{name}/mean" for name in self.eval_scorer.names]
        known = [prefix + name for prefix in prefixes for name in ("reward", "reward_std", *of_rewards)]
        if data is not None and metric and f"eval_{metric.removeprefix('eval_')}" not in known:
            raise ValueError(f"metric_for_best_model must be one of {', '.join(known)}, but it is {metric!r}.")

    def _add_callbacks(self) -> None:
        args = self.args
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(RLProgressCallback)
        if "tensorboard" in cast(list, args.report_to):
            self.remove_callback(TensorBoardCallback)
            self.add_callback(DenoiserTensorBoardCallback)
        if self.trained.average is not None:
            self.add_callback(self.trained.average)
        if held_out := [name for name, weight in self.weight_of.items() if not weight]:
            self.add_callback(RewardHackingCallback(held_out, args.hacking_patience, args.hacking_action))
        self.add_callback(self.gamma)
        self.calibration = CalibrationCallback(self.callback_handler) if args.log_completions else None
        if self.calibration is not None:
            self.callback_handler.callbacks.insert(0, self.calibration)  # before the trackers, to draw while they run

    @property
    def trained_weights(self) -> list[float]:
        """Weights of the rewards of `scorer`."""
        return self.args.reward_weights or [1.0] * len(self.scorer.names)

    @property
    def weight_of(self) -> dict[str, float]:
        """Weights by name of all rewards that are scored in evaluation: 0 for those that are never trained on."""
        own = zip(self.scorer.names, self.trained_weights, strict=True)
        return dict.fromkeys(self.eval_scorer.names, 0.0) | dict(own)

    @property
    def resume_signature(self) -> dict[str, Any]:
        return {**super().resume_signature, "rewards": self.scorer.names}

    @property
    def resume_settings(self) -> dict[str, Any]:
        names = (f"options of {name}, or where it is from (checksum)" for name in self.scorer.names)
        return {**super().resume_settings, **dict(zip(names, self.scorer.options, strict=True))}

    def reset_progress(self) -> None:
        super().reset_progress()
        self.gamma.reset()
        self._metrics = MetricMeans()
        self._has_checked = False  # the first rollout
        self._has_warned = False  # of advantages from which nothing is learned
        self._unusable: list[str] = []  # images with NaN or infinity in the update under way
        self._skipped = self._unscored = 0  # updates that were skipped, and rollouts without a score, in a row

    # Sampling

    def get_train_dataloader(self) -> DataLoader:
        """Each batch is what this process samples in one rollout, as indices; it comes once for each micro-step."""
        rows: Any = range(len(self.train_dataset))
        loader = DataLoader(rows, batch_size=self.args.images_per_rollout, sampler=self._sampler, collate_fn=list)
        return self.accelerator.prepare(loader)

    def batches(self, indices: list[int], rollout_index: int) -> list[Batch]:
        """The pipeline's inputs for each chunk. Seeds follow from the place in the whole rollout alone."""
        args, first = self.args, self.accelerator.process_index * len(indices)
        group = args.num_generations if args.init_same_noise else 1
        keys = [(args.seed, sampling.INITIAL_NOISE, rollout_index, (first + i) // group) for i in range(len(indices))]
        sources, size = generators(keys), args.per_device_train_batch_size
        batches, error = [], None
        try:
            batches = list(self.inputs.batches(self.train_dataset, indices, sources, size))
        except ValueError as raised:  # an image that cannot be read, on this process alone
            error = raised
        raise_together(error, lambda: self.save_unfinished("The data set failed"))
        return batches

    def sample_rollout(self, indices: list[int], rollout_index: int) -> Buffer:
        args = self.args
        rng = np.random.default_rng([args.seed, sampling.TIMESTEPS, rollout_index])
        with Scoring(self.scorer, args.concurrent_rewards) as scoring:
            chunks, images = self._sample(self.batches(indices, rollout_index), rollout_index, rng, scoring)
            steps = sampling.trained_steps(args, chunks[0], rng)
            usable = torch.cat([chunk.log_probs[:, steps].isfinite().all(1) for chunk in chunks]).cpu()
            scores = scoring.gather(usable, self.evaluator.before_error)
        x = compute_advantages(scores.rewards, args.num_generations, args, gamma=0.0).scaled
        gamma = self.gamma.choose(x, chunks, steps, self.state.global_step)
        result = compute_advantages(scores.rewards, args.num_generations, args, gamma=gamma)
        self.gamma.note_rollout(result.scaled)
        if not self._has_checked:
            self._check_before_training(chunks, steps, scores.rewards)
        self._log_rollout(scores, result, chunks, images if rollout_index % 10 == 0 else [])
        first = self.accelerator.process_index * len(indices)
        mine = result.advantages[first : first + len(indices)].to(self.accelerator.device)
        return Buffer(chunks, list(mine.split(args.per_device_train_batch_size)), steps)

    def _sample(
        self, batches: list[Batch], rollout_index: int, rng: np.random.Generator, scoring: Scoring
    ) -> tuple[list[Rollout], list[Any]]:
        """The chunks of a rollout, whose images are handed to the rewards as they come, and the images."""
        args, sizes = self.args, [len(batch.rows) for batch in batches]
        first = self.accelerator.process_index * sum(sizes)
        keys = [(args.seed, sampling.STEP_NOISE, rollout_index, first + i) for i in range(sum(sizes))]
        noise = iter(generators(keys))
        what = f"rollout, {sum(sizes) * args.num_inference_steps} denoiser passes"
        bar = tqdm(desc=what, total=sum(sizes), unit="image", leave=False, disable=args.disable_tqdm or first > 0)
        chunks, images = [], []
        self._metrics.start(self.state.global_step)
        self.trained.place_frozen(self.accelerator.device)
        self.replayer.scheduler.window = sampling.window_of(args, rollout_index, rng)
        for batch, size in zip(batches, sizes, strict=True):
            if self.accelerator.num_processes == 1:
                self.stop_if_interrupted()
                if scoring.failed:  # why sample the rest?
                    scoring.gather(before_error=self.evaluator.before_error)
            rollout = self.replayer.sample(noise_generator=[next(noise) for _ in range(size)], **batch.call)
            made = as_pictures(rollout.images, rollout.problems, batch.call["prompt"])
            scoring.add(batch.prompts, made, batch.columns)
            rollout.images = None  # the replay does not need them
            chunks.append(rollout)
            images += made
            bar.update(size)
        bar.close()
        self.replayer.scheduler.window = None
        reshard(cast(torch.nn.Module, self.model_wrapped))
        self.trained.place_frozen("cpu")
        return chunks, images

    def _check_before_training(self, chunks: list[Rollout], steps: list[int], rewards: torch.Tensor) -> None:
        """Once for each call of `train`: the ratio is 1 before any update, and the reward can show a difference."""
        self._has_checked = True
        trained = [i for i, weight in enumerate(self.trained_weights) if weight]
        names = [self.scorer.names[i] for i in trained]
        finite = [chunk.log_probs[:, steps].isfinite().all(1).any().item() for chunk in chunks]
        chunk = chunks[finite.index(True) if any(finite) else 0]
        # With gradients, as in training. But DDP would wait for the backward pass, and so would FSDP, whose `no_sync`
        # moreover ends the one that this is within.
        with torch.no_grad() if self.is_fsdp_enabled else self.accelerator.no_sync(self.model_wrapped):
            report = measure_ratio(self.replayer, chunk, tuple(sorted(steps)))
        reshard(cast(torch.nn.Module, self.model_wrapped))
        problem = report.problem(self.args.epsilon)
        if not any(finite):
            problem = "The denoiser's predictions are NaN or infinite before any update. Does it overflow in float16?"
        elif problem is None and rewards[:, trained].isnan().all():
            reasons = filter(None, (problem for chunk in chunks for problem in chunk.problems))
            reason = next(reasons, f"{', '.join(names)} returned only None or NaN")
            problem = f"No image of the first rollout got a score: {reason}."
        raise_together(None if problem is None else ValueError(problem))
        warn_of_resolution(names, rewards[:, trained], self.args.num_generations)

    # Loss

    def compute_loss(self, model, inputs: Any, return_outputs=False, num_items_in_batch=None):
        args, rollout, step, advantages = self.args, inputs["rollout"], inputs["step"], inputs["advantages"]
        self._metrics.start(self.state.global_step)
        reference = self.replayer.reference(rollout, step, **self.trained.reference) if args.beta else None
        policy = self.replayer.replay(rollout, step)
        self.gamma.note_micro_step(rollout, step, policy)
        ratio = importance_ratio(policy.log_prob, rollout.log_probs[:, step])
        loss = clipped_surrogate_loss(ratio, advantages, args.epsilon, args.epsilon_high)
        if reference is not None:
            kl = gaussian_kl(policy.mean, reference.mean, policy.std)
            loss = loss + args.beta * kl
            self._metrics.add("kl", kl.detach().mean().item())
        for i in (~(loss.isfinite() & ratio.isfinite())).nonzero().flatten().tolist():
            self._unusable.append(f"{_prompt_of(rollout, i)!r} (image {i} of its chunk, step {step})")
        clipped = clip_indicators(ratio, advantages, args.epsilon, args.epsilon_high)
        for name, indicator in zip(("low_mean", "high_mean", "region_mean"), clipped, strict=True):
            self._metrics.add(f"clip_ratio/{name}", indicator.float().mean().item())
        self._metrics.add("ratio/mean", ratio.detach().mean().item())
        self._metrics.add("ratio/max_deviation", (ratio.detach() - 1).abs().max().item())
        return loss.mean()

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        alone = self.accelerator.num_processes == 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.accelerator.sync_gradients and not alone:
            average_gradients(model.parameters())
        return loss.nan_to_num(posinf=0.0, neginf=0.0)  # the Trainer sums it up for the logs, in which NaN would stay

    # Updates that are skipped

    def note_gradient_norm(self, norm: Any) -> None:
        self.gamma.note_gradient(norm)
        has_bad_loss = any(gathered(bool(self._unusable)))
        usable = not has_bad_loss and (norm is None or math.isfinite(norm))
        self._metrics.add("update_skipped", float(not usable))
        if usable:
            self._skipped = 0
        elif self.accelerator.scaler is None or has_bad_loss:  # float16 finds its scale by infinite gradients
            self._skip_update()
        self._unusable = []

    def _skip_update(self) -> None:
        """Drop the gradients; AdamW passes over parameters without one, and decays them neither."""
        cast(torch.optim.Optimizer, self.optimizer).zero_grad()
        images = [image for part in gathered(self._unusable) for image in part]
        what = f"NaN or infinity, first for {images[0]}" if images else "a gradient that is NaN or infinite"
        number, self._skipped = self.state.global_step + 1, self._skipped + 1
        is_last = number >= self.state.max_steps  # whoever sees "done" takes the weights for good ones
        if self._skipped > self.args.max_skipped_updates or is_last or self.is_deepspeed_enabled:
            self.save_unfinished("The run has diverged")
            raise ValueError(
                f"Update {number} of {self.state.max_steps} had {what}, after {self._skipped - 1} that were skipped "
                "(max_skipped_updates). Resume from an earlier checkpoint with a lower learning_rate or max_grad_norm."
            )
        logger.warning(f"Update {number} is skipped: it had {what}.")

    # Evaluation and logs

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
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("There are no prompts to evaluate on; pass eval_dataset.")
        if isinstance(dataset, dict):
            parts = [self.evaluate(data, ignore_keys, f"{metric_key_prefix}_{name}") for name, data in dataset.items()]
            return {key: value for metrics in parts for key, value in metrics.items()}
        self.evaluator.check(dataset, like=self.train_dataset)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in self.evaluator.evaluate(dataset).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Publishing

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the model card into `args.output_dir`. `dataset_name` is a Hub id or file, `tags` are further ones."""
        if self.is_world_process_zero():
            self.publisher.write_result(model_name, dataset_name, tags)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, if it is not there. Raises `ValueError` when the Hub refuses the token or the name."""
        self.publisher.create_repository(token, private)

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
        repository by the name of `args.output_dir`). Collective: every rank must call this.

        Returns `CommitInfo` on the main process (its `Future`, unless `blocking`) and `None` on the others. `token`,
        `revision` and `private` are by default those of `args`; a branch or repository that is not there is made.
        `kwargs` are those of [`~SLASTrainer.create_model_card`].

        Raises:
            [`~slas_trl.publishing.repository.PushError`]: when nothing was pushed: why, and how to push it later.
        """
        return self.publisher.push(commit_message or "End of training", blocking, token, revision, private, **kwargs)

    def save_unfinished(self, why: str) -> None:
        super().save_unfinished(why)
        if self.calibration is not None:
            self.calibration.draw(self.args, self.state)

    def _log_rollout(self, scores: Scores, result: Advantages, chunks: list[Rollout], images: list[Any]) -> None:
        metrics = rollout_metrics(self.scorer.names, scores, result, self.gamma.state.gamma)
        self._metrics.add_rollout(metrics | reward_times(self.scorer.names, scores), len(scores.rewards))
        if self.calibration is not None and self.is_world_process_zero():
            record = rollout_record(self.args.scale_rewards, self.weight_of, result, metrics)
            self.calibration.append(self.args, {"step": self.state.global_step + 1, **record})
            prompts = [_prompt_of(chunk, i) for chunk in chunks for i in range(len(chunk))]
            # The first eight in the trackers, but those without a score.
            shown = {i: still(image) for i, image in enumerate(images[:8]) if image is not None}
            pictures = {f"samples/{i}": image for i, image in shown.items()}
            self.calibration.show(self.args, pictures, [prompts[i] for i in shown], self.state.global_step, "prompt")
        self._unscored = self._unscored + 1 if result.rewards.isnan().all() else 0
        if not self._unscored:
            if not self._has_warned and (problem := advantage_problem(result, self.args.min_group_std)):
                logger.warning(problem)
                self._has_warned = True
            return
        what = f"No image of the rollout after update {self.state.global_step} got a score"
        logger.warning(f"{what}: nothing to learn.")
        if self._unscored == UNSCORED_ROLLOUTS:
            self.save_unfinished("No image had a score")
            raise ValueError(f"{what}, the {UNSCORED_ROLLOUTS}th in a row. The warnings above say why.")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training log
            logs.update(self._metrics.flush(self.state.global_step))
        super().log(logs, start_time)


def _prompt_of(rollout: Rollout, i: int) -> str:
    prompt = rollout.call["prompt"]
    return prompt if isinstance(prompt, str) else prompt[i]
