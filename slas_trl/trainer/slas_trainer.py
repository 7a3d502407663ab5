"""
`SLASTrainer`: GRPO-style fine-tuning of any diffusers pipeline with Super-Linear Advantage Shaping.

The loop is transformers' Trainer's. Its model is the denoiser, and one of its micro-steps is one chunk of sampled
trajectories at one timestep, so accumulation, distribution, clipping, callbacks and resuming are the Trainer's too.
The mathematics is in `advantages.py`, `objective.py`, `schedulers/` and `policy/`.
"""

import copy
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from ..advantages import Advantages, compute_advantages
from ..images import still
from ..objective import clip_indicators, clipped_surrogate_loss, gaussian_kl, importance_ratio
from ..policy import PipelineReplayer, Rollout, check_pipeline, measure_ratio
from ..policy.doctor import denoisers_of, load_pipeline
from ..rewards.by_name import RewardFunc
from ..schedulers import stochastic_scheduler
from . import checkpoints, lora, sampling
from .calibration import CalibrationCallback, rollout_record
from .callbacks import (
    DenoiserTensorBoardCallback,
    EMACallback,
    MetricsFileCallback,
    PromptOrderCallback,
    RLProgressCallback,
    show_images,
)
from .calls import PipelineCalls, as_pictures
from .collectives import average_gradients, check_sharding, gathered, raise_together, reshard
from .experts import as_model, calls_of
from .gamma import GammaControl
from .hacking import RewardHackingCallback
from .metrics import advantage_problem, reward_times, rollout_metrics, warn_of_resolution
from .precision import autocast_forward, autocast_sharded
from .prompts import check_prompts, load_prompts
from .publishing import PublishingTrainer
from .resumable import Buffer
from .scoring import RewardScorer, Scores
from .slas_config import SLASConfig


logger = logging.get_logger(__name__)

UNSCORED_ROLLOUTS = 5  # in a row, which end the training


class SLASTrainer(PublishingTrainer):
    """
    Trainer for Super-Linear Advantage Shaping (SLAS), and with `scale_rewards="group", gamma=0` for GRPO.

    Args:
        model ([`~diffusers.DiffusionPipeline`] or `str`):
            A text-to-image pipeline, or a path or Hub id, loaded with `args.model_init_kwargs`.
        reward_funcs (`Callable`, `str` or a list of them):
            `reward(prompts, images, **columns) -> list[float | None]`, sync or async; or names, see
            [`~slas_trl.rewards.by_name.resolve_reward`].
        args ([`SLASConfig`], *optional*): the configuration.
        train_dataset (`Dataset`, *optional*):
            Has a column "prompt"; the others reach the rewards. By default `args.prompt_dataset`.
        eval_dataset (`Dataset`, *optional*): prompts for [`~SLASTrainer.evaluate`].
        callbacks (`list[TrainerCallback]`, *optional*): further callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`): optimizer and learning-rate scheduler.
        peft_config (`LoraConfig`, *optional*):
            Trains a new adapter. Without it, the one that the pipeline carries is trained on, or else all weights.
        eval_reward_funcs (`Callable`, `str` or a list of them, *optional*):
            Held-out rewards: scored and logged in evaluation, never trained on. See `hacking_patience` of
            [`SLASConfig`].

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
        eval_reward_funcs: RewardFunc | str | Sequence[RewardFunc | str] | None = None,
    ):
        args = SLASConfig() if args is None else args
        checkpoints.try_writing(args.run_dir)
        self.scorer = self.eval_scorer = RewardScorer(reward_funcs)
        if eval_reward_funcs:
            self.eval_scorer = RewardScorer([*self.scorer.functions, *RewardScorer(eval_reward_funcs).functions])
            if eval_dataset is None:
                raise ValueError(
                    "eval_reward_funcs are scored in evaluation, for which there are no prompts; pass eval_dataset. A "
                    "reward of weight 0 (reward_weights) is scored on every rollout, and not trained on either."
                )
            if args.eval_strategy == "no":
                logger.warning("eval_strategy is 'no': eval_reward_funcs are scored by evaluate(), not in training.")
        if args.reward_weights is not None and len(args.reward_weights) != len(self.scorer.names):
            raise ValueError(
                f"reward_weights has {len(args.reward_weights)} entries for {len(self.scorer.names)} rewards "
                f"({', '.join(self.scorer.names)}); give one for each."
            )
        pipe = load_pipeline(model, cast(dict, args.model_init_kwargs or {})) if isinstance(model, str) else model
        check_pipeline(pipe)
        self.calls = PipelineCalls(pipe, args)
        self.dataset_name = args.prompt_dataset if train_dataset is None else None
        data = (
            load_prompts(args.prompt_dataset)
            if train_dataset is None
            else check_prompts(train_dataset, "train_dataset")
        )
        self.calls.check(data)
        self.scorer.check(data)
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
        denoisers: dict[str, Any] = denoisers_of(pipe)
        self.denoiser_names = list(denoisers)
        set_seed(args.seed)  # before the adapter's random weights
        self.has_adapter = peft_config is not None or any(map(lora.carries_adapter, denoisers.values()))
        self.continued = None if peft_config or not self.has_adapter else lora.continue_adapter(pipe, [*denoisers])
        keeps = self.continued is not None and args.beta and args.kl_reference == "initial"
        self.kept_adapter = lora.REFERENCE_NAME if keeps else None  # in place of the trained one, in the reference
        for denoiser in denoisers.values():
            if peft_config is not None:
                lora.add_adapter(denoiser, copy.deepcopy(peft_config))
            elif not self.has_adapter:
                denoiser.requires_grad_(True)
                if narrow := {p.dtype for p in denoiser.parameters()} & {torch.bfloat16, torch.float16}:
                    raise ValueError(
                        f"All weights would be trained in {narrow.pop()}, which rounds most updates away. Load the "
                        "pipeline in float32 and set bf16=True, or train an adapter (peft_config, use_peft)."
                    )
            elif self.kept_adapter is not None:
                lora.keep_reference(denoiser)
            if args.activation_checkpointing:
                denoiser.enable_gradient_checkpointing()  # diffusers' name; the Trainer knows only transformers'
        args.activation_checkpointing = args.gradient_checkpointing = False
        self.pipe = pipe
        self.replayer = PipelineReplayer(
            pipe,
            stochastic_scheduler(pipe, noise_schedule=args.noise_schedule, noise_level=args.noise_level, eta=args.eta),
        )
        self.replayer.scheduler.noisy_final_step = args.train_final_step  # noise that no step explains is not scored

        self._sampler = sampling.EpochRepeatSampler(
            range(len(data)),
            mini_repeat_count=args.num_generations,
            batch_size=prompts_per_rollout,
            repeat_count=args.micro_steps_per_rollout,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )
        super().__init__(
            model=as_model(denoisers),
            args=args,
            data_collator=list,  # type: ignore[arg-type]
            train_dataset=data,
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            callbacks=[PromptOrderCallback(self._sampler), MetricsFileCallback(), *(callbacks or [])],
            optimizers=optimizers,
        )
        for prompts in eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]:
            if prompts is not None:
                self._check_evaluation(prompts)
        self._check_best_metric()
        check_sharding(self.accelerator, self.is_fsdp_enabled, len(denoisers))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(RLProgressCallback)
        if "tensorboard" in cast(list, args.report_to):
            self.remove_callback(TensorBoardCallback)
            self.add_callback(DenoiserTensorBoardCallback)
        set_seed(args.seed, device_specific=True)
        pipe.to(self.accelerator.device)
        pipe.set_progress_bar_config(disable=True)
        self._reference: dict[str, torch.nn.Module] | None = None
        if args.beta and not self.has_adapter:
            self._reference = {n: copy.deepcopy(denoiser).requires_grad_(False) for n, denoiser in denoisers.items()}
            for frozen in self._reference.values():
                autocast_forward(self.accelerator, frozen)
        if self.is_fsdp_enabled:
            autocast_sharded(self.accelerator, cast(torch.nn.Module, self.model))
        self._ema: EMACallback | None = None
        if args.use_ema:
            self._ema = EMACallback(cast(torch.nn.Module, self.model), args.ema_decay)
            self.add_callback(self._ema)
        if held_out := [name for name, weight in self.weight_of.items() if not weight]:
            self.add_callback(RewardHackingCallback(held_out, args.hacking_patience, args.hacking_action))
        trained, log = cast(torch.nn.Module, self.model), lambda key, value: self._metrics[key].append(value)
        self._gamma = GammaControl(args, self.replayer, trained, self.accelerator, log)
        self.add_callback(self._gamma)
        self._calibration: CalibrationCallback | None = None
        if args.log_completions:
            self._calibration = CalibrationCallback(self.callback_handler)
            self.callback_handler.callbacks.insert(0, self._calibration)  # before the trackers, to draw while they run

        self._reset_progress()

    @property
    def _layout(self) -> dict[str, Any]:
        return {**super()._layout, "continued": self.continued}

    def _reset_progress(self) -> None:
        super()._reset_progress()
        self._gamma.reset()
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._images_sampled = 0
        self._has_warned = False  # of advantages from which nothing is learned
        self._last_log: tuple[float, int] | None = None  # when, and after which update
        self._last_images = 0.0  # when images_per_second was logged
        self._unusable: list[str] = []  # images with NaN or infinity in the update under way
        self._skipped = self._unscored = 0  # updates that were skipped, and rollouts without a score, in a row

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
        self.replayer.models.update(calls_of(self.model_wrapped, self.denoiser_names))
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
        args, data = self.args, self.train_dataset
        first = self.accelerator.process_index * len(indices)
        groups = args.num_generations if args.init_same_noise else 1
        keys = [(args.seed, sampling.INITIAL_NOISE, rollout_index, (first + i) // groups) for i in range(len(indices))]
        return [
            self.calls.call(data, [indices[i] for i in chunk], sampling.generators([keys[i] for i in chunk]))
            for chunk in self.calls.chunks(data, indices, args.per_device_train_batch_size)
        ]

    def _sample_rollout(self, indices: list[int], rollout_index: int) -> Buffer:
        args, size, device = self.args, self.args.per_device_train_batch_size, self.accelerator.device
        first = self.accelerator.process_index * len(indices)
        what = f"rollout, {len(indices) * args.num_inference_steps} denoiser passes"
        bar = tqdm(desc=what, total=len(indices), unit="image", leave=False, disable=args.disable_tqdm or first > 0)
        noise = sampling.generators(
            [(args.seed, sampling.STEP_NOISE, rollout_index, first + i) for i in range(len(indices))]
        )
        rng = np.random.default_rng([args.seed, sampling.TIMESTEPS, rollout_index])
        self.replayer.scheduler.window = sampling.window_of(args, rollout_index, rng)
        self._place_frozen_components(device)
        calls, error = [], None
        try:
            calls = self._calls(indices, rollout_index)
        except ValueError as raised:  # an image that cannot be read, on this process alone
            error = raised
        raise_together(error, lambda: self._save_unfinished("The data set failed"))
        chunks, images = [], []
        with self._start_scoring(self.scorer) as scoring:
            for i, call in enumerate(calls):
                if self.accelerator.num_processes == 1:
                    self._stop_if_interrupted()
                    if scoring.failed:  # why sample the rest?
                        self._gather_scores(scoring)
                try:
                    rollout = self.replayer.sample(noise_generator=noise[i * size : (i + 1) * size], **call)
                except (ValueError, RuntimeError) as error:
                    copies = call.get("num_images_per_prompt", 1)
                    if copies == 1 or isinstance(error, torch.OutOfMemoryError):
                        raise
                    what = f"{type(self.pipe).__name__} did not make {copies} images of one prompt and its images"
                    raise ValueError(f"{what}: {error}. Set per_device_train_batch_size=1 if it makes one.") from error
                made = as_pictures(rollout.images, rollout.problems, call["prompt"])
                self._add_images(scoring, self.train_dataset, indices[len(images) : len(images) + len(made)], made)
                images += made
                bar.update(len(made))
                rollout.images = None  # the replay does not need them
                chunks.append(rollout)
            bar.close()
            self.replayer.scheduler.window = None
            reshard(cast(torch.nn.Module, self.model_wrapped))
            self._place_frozen_components("cpu")
            steps = self._choose_steps(chunks[0], rng)
            usable = torch.cat([chunk.log_probs[:, steps].isfinite().all(1) for chunk in chunks]).cpu()
            scores = self._gather_scores(scoring, usable)
        rewards = scores.rewards  # (N, K) of all processes
        x = compute_advantages(rewards, args.num_generations, args, gamma=0.0).scaled
        gamma = self._gamma.choose(x, chunks, steps, self.state.global_step)
        result = compute_advantages(rewards, args.num_generations, args, gamma=gamma)
        self._gamma.note_rollout(result.scaled)
        mine = result.advantages[first : first + len(indices)].to(device)
        self._images_sampled += len(rewards)
        if args.log_completions and rollout_index % 10 == 0 and self.is_world_process_zero():
            prompts = [self.train_dataset[i]["prompt"] for i in indices[:8]]
            show_images(
                cast(list, args.report_to),
                self.callback_handler.callbacks,
                {f"samples/{i}": still(image) for i, image in enumerate(images[:8])},
                prompts,
                self.state.global_step,
            )
        if not self._checked:
            self._check_before_training(chunks, steps, rewards)
        self._log_rollout(scores, result)
        return Buffer(chunks, list(mine.split(size)), steps)

    def _choose_steps(self, rollout: Rollout, rng: np.random.Generator) -> list[int]:
        """The trained timesteps, in random order: the same for all chunks, so that their cut does not matter."""
        return sampling.trained_steps(self.args, rollout, rng)

    def _check_before_training(self, chunks: list[Rollout], steps: list[int], rewards: torch.Tensor) -> None:
        """Once for each call of `train`: the ratio is 1 before any update, and the reward can show a difference."""
        self._checked = True
        trained = [i for i, weight in enumerate(self.trained_weights) if weight]
        finite = [chunk.log_probs[:, steps].isfinite().all(1).any().item() for chunk in chunks]
        chunk = chunks[finite.index(True) if any(finite) else 0]
        # With gradients, as in training. But DDP would wait for the backward pass, and so would FSDP, whose `no_sync`
        # moreover ends the one that this is within.
        with torch.no_grad() if self.is_fsdp_enabled else self.accelerator.no_sync(self.model_wrapped):
            report = measure_ratio(self.replayer, chunk, tuple(sorted(steps)))
        reshard(cast(torch.nn.Module, self.model_wrapped))
        problem, error = report.problem(self.args.epsilon), None
        if not any(finite):
            error = ValueError(
                "The denoiser's predictions are NaN or infinite before any update. Check the pipeline and its dtype: "
                "float16 overflows in models that were trained in bfloat16."
            )
        elif problem is not None:
            error = ValueError(problem)
        elif rewards[:, trained].isnan().all():
            reasons = [problem for chunk in chunks for problem in chunk.problems if problem is not None]
            reasons += [f"{', '.join(self.scorer.names[i] for i in trained)} returned only None or NaN"]
            error = ValueError(f"No image of the first rollout got a score: {reasons[0]}.")
        raise_together(error)
        warn_of_resolution([self.scorer.names[i] for i in trained], rewards[:, trained], self.args.num_generations)

    # Loss

    def compute_loss(self, model, inputs: Any, return_outputs=False, num_items_in_batch=None):
        args, rollout, step = self.args, inputs["rollout"], inputs["step"]
        reference = None
        if args.beta:
            reference = self.replayer.reference(rollout, step, self._reference, lora.ADAPTER_NAME, self.kept_adapter)
        policy = self.replayer.replay(rollout, step)
        self._gamma.note_micro_step(rollout, step, policy)
        ratio = importance_ratio(policy.log_prob, rollout.log_probs[:, step])
        advantages = inputs["advantages"]
        loss = clipped_surrogate_loss(ratio, advantages, args.epsilon, args.epsilon_high)
        if reference is not None:
            kl = gaussian_kl(policy.mean, reference.mean, policy.std)
            loss = loss + args.beta * kl
            self._metrics["kl"].append(kl.detach().mean().item())
        for i in (~(loss.isfinite() & ratio.isfinite())).nonzero().flatten().tolist():
            self._unusable.append(f"{_prompt_of(rollout, i)!r} (image {i} of its chunk, step {step})")
        clipped = clip_indicators(ratio, advantages, args.epsilon, args.epsilon_high)
        for name, indicator in zip(("low_mean", "high_mean", "region_mean"), clipped, strict=True):
            self._metrics[f"clip_ratio/{name}"].append(indicator.float().mean().item())
        deviation = (ratio.detach() - 1).abs()
        self._metrics["ratio/mean"].append(ratio.detach().mean().item())
        self._metrics["ratio/max_deviation"].append(deviation.max().item())
        return loss.mean()

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        alone = self.accelerator.num_processes == 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.accelerator.sync_gradients and not alone:
            average_gradients(model.parameters())
        return loss.nan_to_num(posinf=0.0, neginf=0.0)  # the Trainer sums it up for the logs, in which NaN would stay

    def _get_grad_norm(self, model, grad_norm=None):
        """The Trainer asks for it before every update, and it is the same on all processes."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._gamma.note_gradient(norm)
        has_bad_loss = any(gathered(bool(self._unusable)))
        usable = not has_bad_loss and (norm is None or math.isfinite(norm))
        self._metrics["update_skipped"].append(float(not usable))
        if usable:
            self._skipped = 0
        elif self.accelerator.scaler is None or has_bad_loss:  # float16 finds its scale by infinite gradients
            self._skip_update()
        self._unusable = []
        return norm

    def _skip_update(self) -> None:
        """Drop the gradients; AdamW passes over parameters without one, and decays them neither."""
        cast(torch.optim.Optimizer, self.optimizer).zero_grad()
        images = [image for part in gathered(self._unusable) for image in part]
        what = f"NaN or infinity, first for {images[0]}" if images else "a gradient that is NaN or infinite"
        number, self._skipped = self.state.global_step + 1, self._skipped + 1
        is_last = number >= self.state.max_steps  # whoever sees "done" takes the weights for good ones
        if self._skipped > self.args.max_skipped_updates or is_last or self.is_deepspeed_enabled:
            self._save_unfinished("The run has diverged")
            raise ValueError(
                f"Update {number} of {self.state.max_steps} had {what}, after {self._skipped - 1} others in a row "
                f"that were skipped (max_skipped_updates {self.args.max_skipped_updates}; the last update is never "
                "skipped, and DeepSpeed skips none). Resume from an earlier checkpoint with a lower learning_rate or "
                "max_grad_norm."
            )
        logger.warning(f"Update {number} is skipped: it had {what}.")

    def _save_unfinished(self, why: str) -> None:
        super()._save_unfinished(why)
        if self._calibration is not None:
            self._calibration.draw(self.args, self.state)

    # Logs

    def _log_rollout(self, scores: Scores, result: Advantages) -> None:
        metrics = rollout_metrics(self.scorer.names, scores, result, self._gamma.gamma)
        for key, value in (metrics | reward_times(self.scorer.names, scores)).items():
            self._metrics[key].append(value)
        if self._calibration is not None and self.is_world_process_zero():
            record = rollout_record(self.args, self.scorer.names, result, metrics)
            self._calibration.append(self.args, {"step": self.state.global_step + 1, **record})
        self._unscored = self._unscored + 1 if result.rewards.isnan().all() else 0
        if not self._unscored:
            problem = advantage_problem(result, self.args.min_group_std)
            if problem and not self._has_warned:
                logger.warning(problem)
                self._has_warned = True
            return
        what = f"No image of the rollout after update {self.state.global_step} got a score"
        logger.warning(f"{what}: nothing to learn.")
        if self._unscored == UNSCORED_ROLLOUTS:
            self._save_unfinished("No image had a score")
            raise ValueError(f"{what}, the {UNSCORED_ROLLOUTS}th in a row. The warnings above say why.")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._last_log is not None:  # a training log
            now, step = time.perf_counter(), self.state.global_step
            logs["step_time"] = (now - self._last_log[0]) / max(1, step - self._last_log[1])
            self._last_log = now, step
            if self._images_sampled:  # which not every update begins with
                logs["images_per_second"] = self._images_sampled / (now - self._last_images)
                self._last_images, self._images_sampled = now, 0
            means = {key: float(np.mean(values)) for key, values in self._metrics.items()}
            everyone = gathered(means)
            logs.update({key: float(np.mean([each[key] for each in everyone])) for key in means})
            self._metrics.clear()
        super().log(logs, start_time)


def _prompt_of(rollout: Rollout, i: int) -> str:
    prompt = rollout.call["prompt"]
    return prompt if isinstance(prompt, str) else prompt[i]
