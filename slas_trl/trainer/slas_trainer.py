"""
`SLASTrainer`: GRPO-style fine-tuning of any diffusers pipeline with Super-Linear Advantage Shaping.

The loop is transformers' Trainer's. Its model is the denoiser, and one of its micro-steps is one chunk of sampled
trajectories at one timestep, so accumulation, distribution, clipping, callbacks and resuming are the Trainer's too.
The mathematics is in `advantages.py`, `objective.py`, `schedulers/` and `policy/`.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from ..advantages import Advantages, compute_advantages
from ..objective import clip_indicators, clipped_surrogate_loss, gaussian_kl, importance_ratio
from ..policy import PipelineReplayer, Rollout, check_pipeline, measure_ratio
from ..policy.doctor import denoisers_of, load_pipeline
from ..schedulers import stochastic_scheduler
from . import lora, sampling
from .callbacks import (
    DenoiserTensorBoardCallback,
    EMACallback,
    MetricsFileCallback,
    PromptOrderCallback,
    RLProgressCallback,
    show_images,
)
from .prompts import check_prompts, load_prompts
from .resumable import Buffer, ResumableTrainer
from .scoring import RewardFunc, RewardScorer, reward_resolution, typical_group_std
from .slas_config import SLASConfig


logger = logging.get_logger(__name__)


class SLASTrainer(ResumableTrainer):
    """
    Trainer for Super-Linear Advantage Shaping (SLAS), and with `scale_rewards="group", gamma=0` for GRPO.

    Args:
        model ([`~diffusers.DiffusionPipeline`] or `str`):
            A text-to-image pipeline, or a path or Hub id, loaded with `args.model_init_kwargs`.
        reward_funcs (`Callable`, `str` or a list of them):
            `reward(prompts, images, **columns) -> list[float | None]`, sync or async; or names, see
            [`~slas_trl.trainer.scoring.resolve_reward`].
        args ([`SLASConfig`], *optional*): the configuration.
        train_dataset (`Dataset`, *optional*):
            Has a column "prompt"; the others reach the rewards. By default `args.prompt_dataset`.
        eval_dataset (`Dataset`, *optional*): prompts for [`~SLASTrainer.evaluate`].
        callbacks (`list[TrainerCallback]`, *optional*): further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`): optimizer and learning-rate scheduler.
        peft_config (`LoraConfig`, *optional*): trains an adapter; without it, the whole denoiser is trained.

    Raises:
        `ValueError`, `TypeError`: when something does not fit; the message says what was expected, what came and what
        to do.
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
    ):
        args = SLASConfig() if args is None else args
        self.scorer = RewardScorer(reward_funcs)
        if args.reward_weights is not None and len(args.reward_weights) != len(self.scorer.names):
            raise ValueError(
                f"reward_weights has {len(args.reward_weights)} entries for {len(self.scorer.names)} rewards "
                f"({', '.join(self.scorer.names)}); give one for each."
            )
        pipe = load_pipeline(model, cast(dict, args.model_init_kwargs or {})) if isinstance(model, str) else model
        check_pipeline(pipe)
        data = (
            load_prompts(args.prompt_dataset)
            if train_dataset is None
            else check_prompts(train_dataset, "train_dataset")
        )
        prompts_per_rollout = args.images_per_rollout * args.world_size // args.num_generations
        if len(data) < prompts_per_rollout:
            raise ValueError(
                f"A rollout needs {prompts_per_rollout} prompts (generation_batch_size {args.generation_batch_size} / "
                f"num_generations {args.num_generations}), but there are {len(data)}. Add prompts or lower "
                "steps_per_generation."
            )

        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False)
                component.eval()
        self.denoiser_name = next(iter(denoisers_of(pipe)))
        denoiser: Any = pipe.components[self.denoiser_name]
        if lora.carries_adapter(denoiser):
            raise ValueError(
                "The denoiser carries an adapter already. Merge it first with `pipe.fuse_lora()` and "
                "`pipe.unload_lora_weights()`; the reference policy is then the merged model."
            )
        set_seed(args.seed)  # before the adapter's random weights
        self.has_adapter = peft_config is not None
        if peft_config is not None:
            lora.add_adapter(denoiser, peft_config)
        else:
            denoiser.requires_grad_(True)
        if args.activation_checkpointing:
            denoiser.enable_gradient_checkpointing()  # diffusers' name for it; the Trainer knows only transformers'
            args.activation_checkpointing = args.gradient_checkpointing = False
        self.pipe = pipe
        self.replayer = PipelineReplayer(
            pipe,
            stochastic_scheduler(pipe, noise_schedule=args.noise_schedule, noise_level=args.noise_level, eta=args.eta),
        )

        self._sampler = sampling.EpochRepeatSampler(
            range(len(data)),
            mini_repeat_count=args.num_generations,
            batch_size=prompts_per_rollout,
            repeat_count=args.micro_steps_per_rollout,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )
        super().__init__(
            model=denoiser,
            args=args,
            data_collator=list,  # type: ignore[arg-type]
            train_dataset=data,
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            callbacks=[PromptOrderCallback(self._sampler), MetricsFileCallback(), *(callbacks or [])],
            optimizers=optimizers,
        )
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(RLProgressCallback)
        if "tensorboard" in cast(list, args.report_to):
            self.remove_callback(TensorBoardCallback)
            self.add_callback(DenoiserTensorBoardCallback)
        set_seed(args.seed, device_specific=True)
        pipe.to(self.accelerator.device)
        pipe.set_progress_bar_config(disable=True)
        self._reference = None if self.has_adapter or not args.beta else copy.deepcopy(denoiser).requires_grad_(False)
        self._ema: EMACallback | None = None
        if args.use_ema:
            self._ema = EMACallback([p for p in denoiser.parameters() if p.requires_grad], args.ema_decay)
            self.add_callback(self._ema)

        self._reset_progress()

    def _reset_progress(self) -> None:
        super()._reset_progress()
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._images_sampled = 0
        self._last_log: tuple[float, int] | None = None  # when, and after which update
        self._last_images = 0.0  # when images_per_second was logged

    # Data

    def get_train_dataloader(self) -> DataLoader:
        """Each batch is what this process samples in one rollout, as indices; it comes once for each micro-step."""
        rows: Any = range(len(self.train_dataset))
        loader = DataLoader(rows, batch_size=self.args.images_per_rollout, sampler=self._sampler, collate_fn=list)
        return self.accelerator.prepare(loader)

    def _prepare_inputs(self, inputs: list[int]) -> dict[str, Any]:  # type: ignore[override]
        self._stop_if_interrupted()
        # Against the Trainer's train(): the policy is what users sample from, and some differ in train mode.
        cast(torch.nn.Module, self.model).eval()
        if self._last_log is None:
            self._last_images = time.perf_counter()
            self._last_log = self._last_images, self.state.global_step
        # In its DDP form, with several processes.
        self.replayer.models[self.denoiser_name] = cast(torch.nn.Module, self.model_wrapped)
        rollout_index, position = divmod(self._micro_step, self.args.micro_steps_per_rollout)
        if position == 0:
            self._buffer = None  # free the old rollout before the new one is sampled
            self._buffer = self._sample_rollout(inputs, rollout_index)
        elif self._buffer is None:
            self._buffer = self._load_rollout(inputs, rollout_index)
        chunk, step = divmod(position % self.args.micro_steps_per_pass, len(self._buffer.steps))
        self._micro_step += 1
        return {
            "rollout": self._buffer.chunks[chunk],
            "advantages": self._buffer.advantages[chunk],
            "step": self._buffer.steps[step],
        }

    # Sampling

    def _calls(self, indices: list[int], rollout_index: int) -> list[dict[str, Any]]:
        """The arguments of the pipeline call of each chunk. Seeds follow from the place in the whole rollout alone."""
        args, size = self.args, self.args.per_device_train_batch_size
        first = self.accelerator.process_index * len(indices)
        groups = args.num_generations if args.init_same_noise else 1
        keys = [(args.seed, sampling.INITIAL_NOISE, rollout_index, (first + i) // groups) for i in range(len(indices))]
        generators = sampling.generators(keys)
        prompts = [self.train_dataset[i]["prompt"] for i in indices]
        return [self._call(prompts[i : i + size], generators[i : i + size]) for i in range(0, len(indices), size)]

    def _call(self, prompts: list[str], generators: list[torch.Generator]) -> dict[str, Any]:
        return {"prompt": prompts, "generator": generators, **self.call_kwargs}

    @property
    def call_kwargs(self) -> dict[str, Any]:
        """Arguments of every call of the pipeline, beside prompts and generators."""
        args = self.args
        chosen = {"guidance_scale": args.guidance_scale, "height": args.height, "width": args.width}
        chosen = {key: value for key, value in chosen.items() if value is not None}
        return {"num_inference_steps": args.num_inference_steps, **chosen, **cast(dict, args.pipeline_kwargs or {})}

    def _sample_rollout(self, indices: list[int], rollout_index: int) -> Buffer:
        args, size, device = self.args, self.args.per_device_train_batch_size, self.accelerator.device
        first = self.accelerator.process_index * len(indices)
        noise = sampling.generators(
            [(args.seed, sampling.STEP_NOISE, rollout_index, first + i) for i in range(len(indices))]
        )
        rng = np.random.default_rng([args.seed, sampling.TIMESTEPS, rollout_index])
        self.replayer.scheduler.window = self._window(rng)
        chunks, images = [], []
        for i, call in enumerate(self._calls(indices, rollout_index)):
            if self.accelerator.num_processes == 1:
                self._stop_if_interrupted()
            rollout = self.replayer.sample(noise_generator=noise[i * size : (i + 1) * size], **call)
            if not rollout.log_probs[:, list(rollout.trainable_steps)].isfinite().all():
                raise ValueError(
                    f"After {self.state.global_step} updates the denoiser's predictions are not finite: the run has "
                    "diverged. Resume from an earlier checkpoint with a lower learning_rate or max_grad_norm."
                )
            images += rollout.images
            rollout.images = None  # the replay does not need them
            chunks.append(rollout)
        self.replayer.scheduler.window = None
        steps = self._choose_steps(chunks[0], rng)

        prompts = [prompt for chunk in chunks for prompt in chunk.call["prompt"]]
        rewards = self._score(self.train_dataset, indices, images)  # (N, K) of all processes
        result = compute_advantages(
            rewards,
            args.num_generations,
            scale_rewards=args.scale_rewards,
            gamma=args.gamma,
            shape_order=args.shape_order,
            batch_std_of=args.batch_std_of,
            shaping_baseline=args.shaping_baseline,
            advantage_clip=args.advantage_clip,
            reward_weights=args.reward_weights,
            multi_objective_aggregation=args.multi_objective_aggregation,
            min_group_std=args.min_group_std,
        )
        mine = result.advantages[first : first + len(indices)].to(device)
        self._log_rollout(rewards, result)
        self._images_sampled += len(rewards)
        if args.log_completions and rollout_index % 10 == 0 and self.is_world_process_zero():
            show_images(
                cast(list, args.report_to),
                self.callback_handler.callbacks,
                images[:8],
                prompts[:8],
                self.state.global_step,
            )
        if not self._checked:
            self._check_before_training(chunks[0], steps, rewards)
        return Buffer(chunks, list(mine.split(size)), steps)

    def _window(self, rng: np.random.Generator) -> range | None:
        size, start = self.args.sde_window_size, self.args.sde_window_start
        if size is None:
            return None
        if start is None:
            last = self.args.num_inference_steps - (0 if self.args.train_final_step else 1) - size
            start = int(rng.integers(min(last, self.args.num_inference_steps // 2) + 1))
        return range(start, start + size)

    def _choose_steps(self, rollout: Rollout, rng: np.random.Generator) -> list[int]:
        """The trained timesteps, in random order: the same for all chunks, so that their cut does not matter."""
        final = len(rollout.steps) - 1
        trainable = [step for step in rollout.trainable_steps if step != final or self.args.train_final_step]
        wanted = self.args.num_trained_timesteps
        if len(trainable) < wanted:
            raise ValueError(
                f"{wanted} timesteps should be trained (timestep_fraction {self.args.timestep_fraction} of "
                f"num_inference_steps {self.args.num_inference_steps}), but the pipeline took {len(rollout.steps)} "
                f"steps, of which {len(trainable)} can be trained. Lower timestep_fraction or sde_window_size, or "
                "raise the noise (noise_level, eta) if it is 0."
            )
        return rng.permutation(trainable)[:wanted].tolist()

    def _score(self, dataset: Dataset, indices: list[int], images: list[Any]) -> torch.Tensor:
        """Rewards `(N, K)` of all processes, in the order of their ranks."""
        rows = {i: dataset[i] for i in set(indices)}
        columns = {key: [rows[i][key] for i in indices] for key in dataset.column_names if key != "prompt"}
        try:
            rewards = self.scorer.score([rows[i]["prompt"] for i in indices], images, columns)
        except (ValueError, TypeError):
            if self.is_in_train and self.accelerator.num_processes == 1:
                self._save_unfinished("A reward failed")
            raise
        return torch.tensor(gather_object(rewards.tolist()), dtype=torch.float64).reshape(-1, len(self.scorer.names))

    def _check_before_training(self, rollout: Rollout, steps: list[int], rewards: torch.Tensor) -> None:
        """Once for each call of `train`: the ratio is 1 before any update, and the reward can show a difference."""
        self._checked = True
        weights = self.args.reward_weights or [1.0] * len(self.scorer.names)
        trained = [i for i, weight in enumerate(weights) if weight]
        if rewards[:, trained].isnan().all():
            names = ", ".join(self.scorer.names[i] for i in trained)
            raise ValueError(f"No image of the first rollout got a score: {names} returned only None or NaN.")
        with self.accelerator.no_sync(self.model_wrapped):
            step, deviation = measure_ratio(self.replayer, rollout, tuple(sorted(steps))).worst
        if not deviation <= min(1e-5, self.args.epsilon / 10):
            raise ValueError(
                f"Before any update the ratio of step {step} should be 1, but it is off by {deviation:.3g} (clip "
                f"range {self.args.epsilon:g}). Likely causes: dropout or another random layer in the denoiser, a "
                "kernel whose result varies between calls, or a module that behaves otherwise in train mode."
            )
        for i in trained:
            column = rewards[:, i]
            resolution, spread = reward_resolution(column), typical_group_std(column, self.args.num_generations)
            if resolution >= spread > 0:
                logger.warning(
                    f"Reward {self.scorer.names[i]!r} resolves differences of {resolution:.3g}, but within a group "
                    f"its values spread by only {spread:.3g}: much of the advantage is rounding. Score in float32, or "
                    "return finer values."
                )

    # Loss

    def compute_loss(self, model, inputs: Any, return_outputs=False, num_items_in_batch=None):
        args, rollout, step = self.args, inputs["rollout"], inputs["step"]
        reference = None
        if args.beta:
            frozen = None if self._reference is None else {self.denoiser_name: self._reference}
            reference = self.replayer.reference(rollout, step, frozen)
        policy = self.replayer.replay(rollout, step)
        ratio = importance_ratio(policy.log_prob, rollout.log_probs[:, step])
        advantages = inputs["advantages"]
        loss = clipped_surrogate_loss(ratio, advantages, args.epsilon, args.epsilon_high)
        if reference is not None:
            kl = gaussian_kl(policy.mean, reference.mean, policy.std)
            loss = loss + args.beta * kl
            self._metrics["kl"].append(kl.detach().mean().item())
        clipped = clip_indicators(ratio, advantages, args.epsilon, args.epsilon_high)
        for name, indicator in zip(("low_mean", "high_mean", "region_mean"), clipped, strict=True):
            self._metrics[f"clip_ratio/{name}"].append(indicator.float().mean().item())
        deviation = (ratio.detach() - 1).abs()
        self._metrics["ratio/mean"].append(ratio.detach().mean().item())
        self._metrics["ratio/max_deviation"].append(deviation.max().item())
        return loss.mean()

    # Logs

    def _log_rollout(self, rewards: torch.Tensor, result: Advantages) -> None:
        metrics = self._metrics
        metrics["reward"].append(result.rewards.nanmean().item())
        metrics["reward_std"].append(result.group_std.nanmean().item())
        metrics["frac_reward_zero_std"].append(result.frac_reward_zero_std)
        metrics["frac_groups_filtered"].append(result.frac_groups_filtered)
        metrics["advantages/std"].append(result.advantages.std(correction=0).item())
        metrics["advantages/abs_max"].append(result.advantages.abs().max().item())
        metrics["advantages/clip_fraction"].append(result.clip_fraction)
        metrics["advantages/effective_share"].append(result.effective_share)
        metrics["advantages/batch_std"].append(result.batch_std)
        metrics["gamma"].append(self.args.gamma)
        for key, value in self._reward_metrics(rewards).items():
            metrics[key].append(value)
        if result.rewards.isnan().all():
            logger.warning(
                f"No image of the rollout after update {self.state.global_step} got a score: nothing to learn."
            )
        if 0 < result.effective_share < 0.1:
            logger.warning_once(
                f"The effective sample share of the advantages is {result.effective_share:.2f}, below 0.1: few images "
                "decide the update. Lower gamma or enlarge the rollout."
            )

    def _reward_metrics(self, rewards: torch.Tensor) -> dict[str, float]:
        metrics = {}
        for name, column in zip(self.scorer.names, rewards.T, strict=True):
            scored = column[~column.isnan()]
            metrics[f"rewards/{name}/mean"] = scored.mean().item()
            metrics[f"rewards/{name}/std"] = scored.std(correction=0).item() if len(scored) else float("nan")
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._last_log is not None:  # a training log
            now, step = time.perf_counter(), self.state.global_step
            logs["step_time"] = (now - self._last_log[0]) / max(1, step - self._last_log[1])
            self._last_log = now, step
            if self._images_sampled:  # which not every update begins with
                logs["images_per_second"] = self._images_sampled / (now - self._last_images)
                self._last_images, self._images_sampled = now, 0
            means = {key: float(np.mean(values)) for key, values in self._metrics.items()}
            everyone = gather_object([means]) if self.accelerator.num_processes > 1 else [means]
            logs.update({key: float(np.mean([each[key] for each in everyone])) for key in means})
            self._metrics.clear()
        super().log(logs, start_time)

    # Evaluation

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
        start = time.perf_counter()
        rewards = self._sample_and_score(dataset)  # type: ignore[arg-type]
        weights = torch.tensor(self.args.reward_weights or [1.0] * rewards.shape[1], dtype=torch.float64)
        total = (rewards.nan_to_num() * weights).sum(1)
        total[(rewards.isnan() | (weights == 0)).all(1)] = torch.nan
        metrics = {"reward": total.nanmean().item(), "reward_std": total[~total.isnan()].std(correction=0).item()}
        metrics |= self._reward_metrics(rewards)
        metrics |= {"runtime": time.perf_counter() - start, "samples": len(rewards)}
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.no_grad()
    def _sample_and_score(self, dataset: Dataset) -> torch.Tensor:
        args, world = self.args, self.accelerator.num_processes
        copies = args.num_generations_eval or args.num_generations
        jobs = [(i, j) for i in range(len(dataset)) for j in range(copies)]
        # Every process gets equally many, so that collective calls of a sharded model meet; surplus ones are dropped.
        share = -(-len(jobs) // world)
        first = self.accelerator.process_index * share
        mine = [jobs[k % len(jobs)] for k in range(first, first + share)]
        images, size = [], args.per_device_eval_batch_size
        denoiser = self.pipe.components[self.denoiser_name]
        was_training = denoiser.training
        denoiser.eval()
        with self._averaged_weights():
            for at in range(0, len(mine), size):
                part = mine[at : at + size]
                seeds = sampling.generators([(args.seed, sampling.EVALUATION, i, j) for i, j in part])
                images += self.pipe(**self._call([dataset[i]["prompt"] for i, _ in part], seeds))[0]
        denoiser.train(was_training)
        return self._score(dataset, [i for i, _ in mine], images)[: len(jobs)]
