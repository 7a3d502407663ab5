"""Arguments of [`SLASTrainer`]: TRL's names for reinforcement learning, diffusers' names for sampling."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from ..advantages import AdvantageOptions, Count, NotNegative, Positive, check_fields, check_number, option
from ..schedulers.flow_sde import NOISE_SCHEDULES


Index = Annotated[int, "[0, inf)"]
Finite = Annotated[float, "(-inf, inf)"]

# Arguments of the pipeline's call that are the trainer's, or have a field of their own.
RESERVED = {"prompt", "generator", "num_inference_steps", "num_images_per_prompt", "output_type", "return_dict"}

MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]  # of torch.compile

# Options that earlier versions had, and what to use instead.
REMOVED = {
    "shape_order": "rewards are scaled first, and shaped then; leave it out",
    "gamma_warmup_steps": "gamma_schedule='ess' lowers gamma where few images would decide an update",
}

# Of the inherited ones; any other has to be finite.
INHERITED = {
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"), "[0, inf)"),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), "[1, inf)"),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), "(0, inf)"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "[0, 1)"),
    **dict.fromkeys(("seed", "data_seed", "save_total_limit"), f"[0, {2**32})"),
    **{"eval_delay": "[0, inf)", "max_steps": "[-1, inf)", "adam_epsilon": "(0, inf)"},
}


def refuse_removed(given: Iterable[str]) -> None:
    """Raises `ValueError` for an option that is no more, naming what to use instead."""
    for name in REMOVED.keys() & given:
        raise ValueError(f"{name} was removed: {REMOVED[name]}.")


@dataclass
class SLASConfig(AdvantageOptions, TrainingArguments):
    r"""
    Configuration class for the [`SLASTrainer`]. Each field has its meaning as `help`; those of the advantages are in
    [`~slas_trl.advantages.AdvantageOptions`], the others in [`~transformers.TrainingArguments`].

    A *micro-step* is one chunk of `per_device_train_batch_size` sampled trajectories at one timestep. A *rollout* is
    `steps_per_generation` chunks on every process, sampled and scored before any update: `generation_batch_size`
    images over all processes, in groups of `num_generations` (G of Eq. 1). `num_iterations` is μ of GRPO. The loss is
    the mean over all images of an update and over the trained timesteps: the learning rate means the same however a
    rollout is cut.

    `epsilon` is so small because log-probabilities are means over latent elements. The reference of `beta` is the
    model with its adapters disabled, or a frozen copy of the denoiser.

    `gamma_schedule` changes γ from rollout to rollout, from 0 to `gamma_max`: `"trust_region"` takes the largest γ
    whose moment is within the budget of Theorem 4, `"kl"` goes by the measured KL of the updates, and both begin with
    `gamma`; `"ess"` takes the largest with an effective share of `min_effective_share`. `kl_threshold` is ζ of Eq. 78:
    of a bound under `"trust_region"`, far above the KL with AdamW, and of a measurement under `"kl"`, both in nats per
    latent element. `fisher_update_steps` is 20 with `"trust_region"`; set, other schedules log the bounds as well.

    A trajectory has `sde_window_size` stochastic steps, from `sde_window_start` on, which is drawn anew for each
    rollout; `sde_window_slide_every` moves them from there to the end and over again, as MixGRPO does. The noise of
    the last transition would stay on the image, so it is deterministic unless `train_final_step`.

    `pipeline_columns` reach the pipeline's call under their names, such as `image`; by default those with text or
    images that it takes, and `[]` for none. `log_completions` shows every tenth rollout in the trackers of `report_to`
    that can, records rollouts in `calibration.jsonl`, and draws `calibration.png` at checkpoints and at the end.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "pipeline_kwargs", "model_init_kwargs"]

    # Defaults that are not those of TrainingArguments
    learning_rate: float = option(1e-5, "Initial learning rate of AdamW.")
    lr_scheduler_type: str = option("constant", "Learning-rate schedule.")
    weight_decay: float = option(1e-4, "Weight decay of AdamW.")
    logging_steps: float = option(1, "Log every so many updates.")
    logging_nan_inf_filter: bool = option(False, "Hide NaN losses in the logs.")
    report_to: None | str | list[str] = option("none", "Trackers to report to.")
    torch_compile_mode: str | None = option(None, "See torch.compile.", choices=MODES)
    remove_unused_columns: bool | None = option(False, "Kept off: all columns reach the rewards.")
    gradient_accumulation_steps: Count | None = option(  # type: ignore[assignment]
        None, "Micro-steps per update. Default: one update per pass over a rollout."
    )

    # Groups and rollouts
    num_generations: Annotated[int, "[2, inf)"] = option(8, "Images per prompt.")
    num_generations_eval: Count | None = option(None, "Images per prompt in evaluation. Default: num_generations.")
    generation_batch_size: Count | None = option(None, "Images per rollout; or give steps_per_generation.")
    steps_per_generation: Count | None = option(None, "Chunks per rollout and process. Default: num_generations.")
    num_iterations: Count = option(1, "Passes over each rollout.")

    # Objective
    epsilon: Positive = option(1e-4, "Clip range of the ratio.")
    epsilon_high: Positive | None = option(None, "Upper clip range. Default: epsilon.")
    beta: NotNegative = option(0.0, "Weight of the KL divergence to the reference policy.")
    kl_reference: str = option("initial", "A continued adapter as it came, or the base.", choices=["initial", "base"])

    # How γ changes
    gamma_schedule: str = option("constant", "How gamma changes.", choices=["constant", "trust_region", "kl", "ess"])
    gamma_max: NotNegative = option(1.0, "Largest gamma of trust_region, kl and ess.")
    kl_threshold: Positive | None = option(None, "KL of an update. Default: 3e-4 for trust_region, 1e-5 for kl.")
    fisher_update_steps: Count | None = option(None, "Updates from one Fisher matrix to the next.")
    min_effective_share: Annotated[float, "(0, 1]"] = option(0.25, "Share of images to carry the update under ess.")

    # Rewards
    concurrent_rewards: bool = option(True, "Score each reward in its own thread while the next chunk is sampled.")
    hacking_patience: Count = option(3, "Evaluations in a row with the reward rising and a held-out one falling.")
    hacking_action: str = option("warn", "What they lead to: a warning, or the end.", choices=["warn", "stop"])

    # Sampling
    num_inference_steps: Count = option(10, "Denoising steps.")
    guidance_scale: Finite | None = option(None, "Guidance in sampling and loss. Default: the pipeline's own.")
    height: Count | None = option(None, "Image height in pixels. Default: the pipeline's own.")
    width: Count | None = option(None, "Image width in pixels. Default: the pipeline's own.")
    eta: Annotated[float, "[0, 1]"] = option(1.0, "Noise of the DDIM step (epsilon, v and x0 prediction).")
    noise_schedule: str = option("flow_grpo", "Noise of flow-matching models.", choices=list(NOISE_SCHEDULES))
    noise_level: NotNegative | None = option(None, "Its level. Default: 0.3 for dance_grpo, else 0.7.")
    timestep_fraction: Annotated[float, "(0, 1]"] = option(1.0, "Share of the trainable timesteps to train.")
    train_final_step: bool = option(False, "Train the last transition too.")
    sde_window_size: Count | None = option(None, "Number of stochastic steps. Default: all.")
    sde_window_start: Index | None = option(None, "First stochastic step. Default: random in the first half, or 0.")
    sde_window_slide_every: Count | None = option(None, "Rollouts after which the window moves on by one step.")
    init_same_noise: bool = option(True, "Start all images of a group from the same noise.")

    # The rest
    max_skipped_updates: Index = option(3, "Updates in a row that NaN or infinity may skip.")
    offload_frozen_components: bool = option(False, "Text encoders and VAE are on the CPU during updates.")
    use_ema: bool = option(False, "Evaluate and save a moving average of the weights.")
    ema_decay: Annotated[float, "[0, 1)"] = option(0.9, "Decay of the moving average per update.")
    log_completions: bool = option(True, "Show sampled images in the trackers, and draw calibration.png.")
    prompt_dataset: str = option("shapes", "Prompts for a trainer without train_dataset.")
    pipeline_columns: list[str] | None = option(None, "Columns that reach the pipeline. Default: texts and images.")
    pipeline_kwargs: dict[str, Any] | str | None = option(None, "Further arguments of the pipeline's call, as JSON.")
    model_init_kwargs: dict[str, Any] | str | None = option(None, "Arguments of from_pretrained, as JSON.")

    @property
    def run_dir(self) -> Path:
        """`output_dir`, absolute: a reward may change the working folder."""
        return self._home / (self.output_dir or "")

    @property
    def num_trainable_steps(self) -> int:
        """Steps that a trajectory could be trained at: all, or all but the last."""
        return self.num_inference_steps - (0 if self.train_final_step else 1)

    @property
    def num_trained_timesteps(self) -> int:
        """Timesteps trained for each chunk: `timestep_fraction` of the trainable ones, at least one."""
        trainable = self.num_trainable_steps if self.sde_window_size is None else self.sde_window_size
        return max(1, math.floor(self.timestep_fraction * trainable + 1e-9))

    @property
    def images_per_rollout(self) -> int:
        """Images of one rollout on each process."""
        return self.per_device_train_batch_size * cast(int, self.steps_per_generation)  # set in __post_init__

    @property
    def micro_steps_per_pass(self) -> int:
        """Micro-steps of one pass over a rollout."""
        return cast(int, self.steps_per_generation) * self.num_trained_timesteps

    @property
    def micro_steps_per_rollout(self) -> int:
        """Micro-steps from one rollout to the next."""
        return self.num_iterations * self.micro_steps_per_pass

    @property
    def micro_steps_per_update(self) -> int:
        return cast(int, self.gradient_accumulation_steps)  # a number after `__post_init__`

    @property
    def fisher_interval(self) -> int | None:
        """Updates between measurements of the Fisher matrix, if it is measured."""
        return self.fisher_update_steps or (20 if self.gamma_schedule == "trust_region" else None)

    @property
    def allowed_kl(self) -> float:
        """ζ: `kl_threshold`, or the default of its schedule."""
        return self.kl_threshold or (1e-5 if self.gamma_schedule == "kl" else 3e-4)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that a resumed run reports if they differ: all but those that may name a place."""
        places = {"prompt_dataset", "pipeline_kwargs", "model_init_kwargs", "_VALID_DICT_FIELDS"}
        optimizer = {"adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "max_steps", "num_train_epochs"}
        others = {"warmup_steps", "lr_scheduler_kwargs", "optim_args", "bf16", "fp16"}
        own = SLASConfig.__annotations__.keys() | AdvantageOptions.__annotations__.keys()
        names = (own | optimizer | others) - places
        return {name: value for name, value in self.to_dict().items() if name in names}

    @property
    def resume_signature(self) -> dict[str, Any]:
        """Settings that must be equal when a run is resumed: they place prompts, images and micro-steps."""
        names = ("seed", "data_seed", "per_device_train_batch_size", "generation_batch_size", "num_generations",
                 "gradient_accumulation_steps", "num_iterations", "num_inference_steps", "world_size",
                 "num_trained_timesteps", "train_final_step", "sde_window_size", "sde_window_start",
                 "sde_window_slide_every", "init_same_noise", "pipeline_columns",
                 "noise_schedule", "noise_level", "eta", "guidance_scale", "height", "width", "use_ema",
                 "kl_reference")  # fmt: skip
        others = {"pipeline_kwargs": repr(self.pipeline_kwargs), "optim": OptimizerNames(self.optim).value}
        return {name: getattr(self, name) for name in names} | others

    def __new__(cls, *args: Any, **given: Any):
        refuse_removed(given)
        return super().__new__(cls)

    def __post_init__(self):
        self._home = Path.cwd()
        one_update_per_pass = self.gradient_accumulation_steps is None
        if self.metric_for_best_model is None and (self.load_best_model_at_end or self.save_strategy == "best"):
            self.metric_for_best_model = "eval_reward"
        if one_update_per_pass:
            self.gradient_accumulation_steps = 1  # a number for TrainingArguments; the true one is computed below
        super().__post_init__()
        check_fields(self, SLASConfig, INHERITED)
        TrainingArguments.__post_init__(self)
        self._check_numbers()
        self._divide_the_rollout()
        if one_update_per_pass:
            self.gradient_accumulation_steps = self.micro_steps_per_pass
        elif self.micro_steps_per_pass % self.micro_steps_per_update:
            what = f"gradient_accumulation_steps ({self.gradient_accumulation_steps}) must divide the"
            raise ValueError(f"{what} {self.micro_steps_per_pass} micro-steps of a rollout; leave it out for all.")

    def _divide_the_rollout(self) -> None:
        chunk, group = self.per_device_train_batch_size * self.world_size, self.num_generations
        images = self.generation_batch_size or chunk * (self.steps_per_generation or group)
        rollout, fitting = f"A rollout (generation_batch_size) of {images} images", math.ceil(images / chunk) * chunk
        if images % chunk:
            raise ValueError(f"{rollout} does not divide into chunks of {chunk} over all processes; use {fitting}.")
        if self.steps_per_generation not in (None, images // chunk):
            raise ValueError(f"{rollout} is not {self.steps_per_generation} × {chunk} images (steps_per_generation).")
        if images % group:
            fix = f"use steps_per_generation={group // math.gcd(chunk, group)} or a multiple"
            raise ValueError(f"{rollout} does not divide into groups of num_generations ({group}); {fix}.")
        self.generation_batch_size, self.steps_per_generation = images, images // chunk

    def _check_numbers(self) -> None:
        size, start, last = self.sde_window_size, self.sde_window_start, self.num_trainable_steps
        weights, available = self.reward_weights, get_available_reporting_integrations()
        missing = {*cast(list, self.report_to)} - {*available}
        for name in ("pipeline_kwargs", "model_init_kwargs", "lr_scheduler_kwargs"):
            given: Any = getattr(self, name) or {}
            if not isinstance(given, dict):
                raise ValueError(f"{name} must be a dictionary of arguments, but it is {given!r}.")
            for key in given:
                if isinstance(given[key], float):
                    check_number(f"{name}[{key!r}]", given[key], "(-inf, inf)")
        unfit = {
            f"gamma ({self.gamma}), where {self.gamma_schedule!r} begins, is above gamma_max ({self.gamma_max})": (
                self.gamma_schedule in ("trust_region", "kl") and self.gamma > self.gamma_max
            ),
            "num_inference_steps is 1, and that step the final one; set train_final_step=True": last < 1,
            f"sde_window_size ({size}) steps from {start or 0} do not fit into the {last} trainable steps": (
                size is not None and (start or 0) + size > last
            ),
            "sde_window_start needs sde_window_size": size is None and start is not None,
            "sde_window_slide_every needs sde_window_size": size is None and self.sde_window_slide_every is not None,
            f"This one process sees {self.n_gpu} GPUs. Start a process for each with `accelerate launch "
            f"--num_processes {self.n_gpu}`, or show it one with CUDA_VISIBLE_DEVICES=0": self.n_gpu > 1,
            f"report_to names {sorted(missing)}, not installed here": bool(missing),
            "max_steps is 0: nothing would be trained": self.max_steps == 0,
            f"pipeline_kwargs holds one of {sorted(RESERVED)}, which the trainer sets": bool(
                RESERVED & {*cast(dict, self.pipeline_kwargs or {})}
            ),
            "All reward_weights are 0: nothing to train on": weights is not None and not any(weights),
            "ignore_data_skip would resume with other prompts than the rollout's": self.ignore_data_skip,
            "save_only_model leaves checkpoints that no run can go on from": self.save_only_model,
            "auto_find_batch_size would break up the groups": self.auto_find_batch_size,
        }
        if problem := next((problem for problem, is_so in unfit.items() if is_so), None):
            raise ValueError(f"{problem}.")
