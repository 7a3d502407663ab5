"""Arguments of [`SLASTrainer`]: TRL's names for reinforcement learning, diffusers' names for sampling."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.training_args import OptimizerNames

from ..advantages import AdvantageOptions, Count, NotNegative, Positive, check_fields, option
from ..schedulers.flow_sde import NOISE_SCHEDULES


# Arguments of the pipeline's call that are the trainer's, or have a field of their own.
RESERVED = {"prompt", "generator", "num_inference_steps", "num_images_per_prompt", "output_type", "return_dict"}
MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]  # of torch.compile

# Of the inherited ones; any other has to be finite.
INHERITED = {
    **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"), "[0, inf)"),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), "[1, inf)"),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps"), "(0, inf)"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "[0, 1)"),
    **dict.fromkeys(("seed", "data_seed", "save_total_limit"), f"[0, {2**32})"),
    **{"eval_delay": "[0, inf)", "max_steps": "[-1, inf)", "adam_epsilon": "(0, inf)"},
}

# Options, or values of one, that earlier versions had, and what to use instead.
REMOVED = {
    "shape_order": "rewards are scaled first, and shaped then; leave it out",
    "gamma_warmup_steps": "gamma_schedule='ess' lowers gamma where few images would decide an update",
    **dict.fromkeys(("gamma_schedule=linear", "gamma_schedule=cosine"), "use 'constant', or 'ess' against outliers"),
}


def refuse_removed(given: Mapping[str, Any]) -> None:
    """Raises `ValueError` for an option in `given` that is no more, naming what to use instead."""
    for removed, instead in REMOVED.items():
        name, _, value = removed.partition("=")
        if name in given and value in ("", given[name]):
            raise ValueError(f"{removed} was removed: {instead}.")


@dataclass
class SLASConfig(AdvantageOptions, TrainingArguments):
    r"""
    Configuration class for the [`SLASTrainer`].

    Only the arguments that are specific to this trainer, or have another default, are described here; those of the
    advantages are described by [`~slas_trl.advantages.AdvantageOptions`], and the others by
    [`~transformers.TrainingArguments`]. A *micro-step* is one chunk of `per_device_train_batch_size` sampled
    trajectories at one timestep; a *rollout* is `steps_per_generation` chunks on every process, sampled and scored
    before any update. The loss is the mean over all images of an update and over the trained timesteps: the learning
    rate means the same however a rollout is cut.

    Args:
        num_generations (`int`, *optional*, defaults to `8`):
            Images per prompt (G of Eq. 1). The rollout must be divisible by it.
        num_generations_eval (`int`, *optional*):
            Images per prompt in evaluation; by default `num_generations`.
        generation_batch_size (`int`, *optional*):
            Images per rollout over all processes. Mutually exclusive with `steps_per_generation`.
        steps_per_generation (`int`, *optional*):
            Chunks per rollout and process; by default `num_generations`: as many groups as samples in a chunk of all.
        gradient_accumulation_steps (`int`, *optional*):
            Micro-steps per update. By default one update per pass over a rollout: `steps_per_generation` times the
            number of trained timesteps. Must divide that product.
        num_iterations (`int`, *optional*, defaults to `1`):
            Passes over each rollout (μ of GRPO).
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Clip range of the ratio. So small because log-probabilities are means over latent elements.
        epsilon_high (`float`, *optional*): upper clip range; by default `epsilon`.
        beta (`float`, *optional*, defaults to `0.0`):
            Weight of the KL divergence to the reference policy (adapters disabled, or a frozen copy of the denoiser).
        kl_reference (`str`, *optional*, defaults to `"initial"`):
            The reference of a run that goes on from an adapter: the policy with the adapter as it came, or the
            `"base"` model without it.
        gamma_schedule (`str`, *optional*, defaults to `"constant"`):
            How γ changes from rollout to rollout: `"constant"`; or, from 0 to `gamma_max`, `"trust_region"`, the
            largest whose moment is within the budget of Theorem 4, `"kl"`, by feedback of the updates' measured KL,
            and `"ess"`, the largest with an effective share of `min_effective_share`. The first two of these begin
            with `gamma`.
        gamma_max (`float`, *optional*, defaults to `1.0`):
            The largest γ of the schedules `"trust_region"`, `"kl"` and `"ess"`.
        kl_threshold (`float`, *optional*):
            ζ of Eq. 78, the largest KL of one update in nats per latent element: of its bound under `"trust_region"`,
            by default 3e-4, far above the KL with AdamW; of its measurement under `"kl"`, by default 1e-5.
        fisher_update_steps (`int`, *optional*):
            Updates after which the largest eigenvalue of the Fisher matrix is measured anew, by the next rollout. By
            default 20 with `"trust_region"`, and never with another schedule, which then logs the bounds as well.
        min_effective_share (`float`, *optional*, defaults to `0.25`):
            Share of the images that is to carry the update under `"ess"`.
        concurrent_rewards (`bool`, *optional*, defaults to `True`):
            Whether each reward scores in its own thread while the next chunk is sampled. The scores are the same.
        hacking_patience (`int`, *optional*, defaults to `3`):
            Evaluations in a row with the trained reward rising and a held-out one (of `eval_reward_funcs` or weight 0)
            falling before `hacking_action` is taken.
        hacking_action (`str`, *optional*, defaults to `"warn"`):
            Or `"stop"`, which ends training.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Denoising steps while sampling for training and in evaluation.
        guidance_scale (`float`, *optional*):
            Guidance, in sampling and loss alike; by default the pipeline's own.
        height (`int`, *optional*), width (`int`, *optional*):
            Image size in pixels; by default the pipeline's own.
        eta (`float`, *optional*, defaults to `1.0`):
            Noise of the DDIM step (ε-, v- and x0-prediction models).
        noise_schedule (`str`, *optional*, defaults to `"flow_grpo"`):
            Noise of flow-matching models: `"flow_grpo"`, `"dance_grpo"` or `"cps"`.
        noise_level (`float`, *optional*): its level; by default 0.3 for `"dance_grpo"` and 0.7 otherwise.
        timestep_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the trainable timesteps that is trained, drawn anew for each rollout.
        train_final_step (`bool`, *optional*, defaults to `False`):
            Whether to train the last transition, whose noise then stays on the image. Otherwise it is deterministic.
        sde_window_size (`int`, *optional*):
            Number of stochastic steps; the others are deterministic. By default all steps are stochastic.
        sde_window_start (`int`, *optional*):
            First stochastic step; by default drawn anew for each rollout from the first half of the trajectory.
        sde_window_slide_every (`int`, *optional*):
            Rollouts after which the window moves on by a step, from `sde_window_start` (0 by default) to the end and
            over again, as MixGRPO's does.
        init_same_noise (`bool`, *optional*, defaults to `True`):
            Whether all images of a group start from the same noise.
        max_skipped_updates (`int`, *optional*, defaults to `3`):
            So many updates in a row with NaN or infinite gradients are skipped, and the images named; one more stops.
        offload_frozen_components (`bool`, *optional*, defaults to `False`):
            Whether text encoders and VAE are on the CPU while the denoiser is trained.
        use_ema (`bool`, *optional*, defaults to `False`):
            Whether to keep an exponential moving average of the trained weights, which is then evaluated and saved.
        ema_decay (`float`, *optional*, defaults to `0.9`):
            Its decay per update. The average begins with the weights before training.
        log_completions (`bool`, *optional*, defaults to `True`):
            Whether to show images in the trackers of `report_to` that can, every tenth rollout; and to record rollouts
            in `calibration.jsonl` and draw `calibration.png` at checkpoints and when training ends.
        prompt_dataset (`str`, *optional*, defaults to `"shapes"`):
            Prompts for a trainer without `train_dataset`, see [`~slas_trl.trainer.prompts.load_prompts`].
        pipeline_columns (`list[str]`, *optional*):
            Columns that reach the pipeline's `__call__` under their names, such as `image`. By default those with text
            or images that it takes; `[]` for none.
        pipeline_kwargs (`dict`, *optional*): further arguments of the pipeline's `__call__`.
        model_init_kwargs (`dict`, *optional*):
            Arguments of `DiffusionPipeline.from_pretrained` when the model is given as a string.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "pipeline_kwargs", "model_init_kwargs"]

    # Defaults that are not those of TrainingArguments
    learning_rate: float = option(1e-5, "Initial learning rate of AdamW.")
    lr_scheduler_type: str = option("constant", "Learning-rate schedule.")
    weight_decay: float = option(1e-4, "Weight decay of AdamW.")
    logging_steps: float = option(1, "Log every so many updates.")
    logging_nan_inf_filter: bool = option(False, "Hide NaN losses in the logs.")
    report_to: None | str | list[str] = option("none", "Trackers to report to.")
    remove_unused_columns: bool | None = option(False, "Kept off: all columns reach the rewards.")
    torch_compile_mode: str | None = option(None, "See torch.compile.", choices=MODES)
    gradient_accumulation_steps: Count | None = option(
        None, "Micro-steps per update. Default: one update per pass over a rollout."
    )  # type: ignore[assignment]

    # Groups and rollouts
    num_generations: Annotated[int, "[2, inf)"] = option(8, "Images per prompt.")
    num_generations_eval: Count | None = option(None, "Images per prompt in evaluation. Default: num_generations.")
    generation_batch_size: Count | None = option(
        None, "Images per rollout over all processes; or give steps_per_generation."
    )
    steps_per_generation: Count | None = option(None, "Chunks per rollout and process. Default: num_generations.")
    num_iterations: Count = option(1, "Passes over each rollout.")

    # Objective
    epsilon: Positive = option(1e-4, "Clip range of the ratio.")
    epsilon_high: Positive | None = option(None, "Upper clip range. Default: epsilon.")
    beta: NotNegative = option(0.0, "Weight of the KL divergence to the reference policy.")
    kl_reference: str = option(
        "initial",
        "Reference when training goes on from an adapter: that adapter as it came, or the base model.",
        choices=["initial", "base"],
    )

    # How γ changes
    gamma_schedule: str = option(
        "constant", "How gamma changes from rollout to rollout.", choices=["constant", "trust_region", "kl", "ess"]
    )
    gamma_max: NotNegative = option(1.0, "Largest gamma of trust_region, kl and ess.")
    kl_threshold: Positive | None = option(
        None, "KL of an update that trust_region and kl keep to, per latent element. Default: 3e-4, 1e-5."
    )
    fisher_update_steps: Count | None = option(
        None, "Updates between measurements of the Fisher matrix. Default: 20 with trust_region."
    )
    min_effective_share: Annotated[float, "(0, 1]"] = option(
        0.25, "Share of the images that is to carry the update under ess."
    )
    concurrent_rewards: bool = option(True, "Score while the next chunk is sampled.")
    hacking_patience: Count = option(
        3, "Evaluations with the reward rising and a held-out one falling before an action."
    )
    hacking_action: str = option("warn", "What that leads to.", choices=["warn", "stop"])

    # Sampling
    num_inference_steps: Count = option(10, "Denoising steps.")
    guidance_scale: Annotated[float, "(-inf, inf)"] | None = option(
        None, "Guidance in sampling and loss. Default: the pipeline's own."
    )
    height: Count | None = option(None, "Image height in pixels.")
    width: Count | None = option(None, "Image width in pixels.")
    eta: Annotated[float, "[0, 1]"] = option(1.0, "Noise of the DDIM step.")
    noise_schedule: str = option("flow_grpo", "Noise of flow-matching models.", choices=list(NOISE_SCHEDULES))
    noise_level: NotNegative | None = option(
        None, "Noise level of flow-matching models. Default: 0.3 for dance_grpo, else 0.7."
    )
    timestep_fraction: Annotated[float, "(0, 1]"] = option(1.0, "Share of the trainable timesteps to train.")
    train_final_step: bool = option(False, "Train the last transition too.")
    sde_window_size: Count | None = option(None, "Number of stochastic steps. Default: all.")
    sde_window_start: Annotated[int, "[0, inf)"] | None = option(
        None, "First stochastic step. Default: drawn for each rollout from the first half."
    )
    sde_window_slide_every: Count | None = option(
        None, "Rollouts after which the window of stochastic steps moves on by one step."
    )
    init_same_noise: bool = option(True, "Start all images of a group from the same noise.")

    # The rest
    max_skipped_updates: Annotated[int, "[0, inf)"] = option(
        3, "Updates in a row that may be skipped because of NaN or infinity."
    )
    offload_frozen_components: bool = option(
        False, "Keep text encoders and VAE on the CPU while the denoiser is trained."
    )
    use_ema: bool = option(False, "Evaluate and save a moving average of the weights.")
    ema_decay: Annotated[float, "[0, 1)"] = option(0.9, "Decay of the moving average per update.")
    log_completions: bool = option(True, "Show sampled images in the trackers, and draw calibration.png.")
    prompt_dataset: str = option("shapes", "Prompts for a trainer without train_dataset.")
    pipeline_columns: list[str] | None = option(
        None, "Columns that reach the pipeline's call. Default: those with text or images that it takes."
    )
    pipeline_kwargs: dict[str, Any] | str | None = option(None, "Further arguments of the pipeline's call, as JSON.")
    model_init_kwargs: dict[str, Any] | str | None = option(
        None, "Arguments of DiffusionPipeline.from_pretrained, as JSON."
    )

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
        """`gradient_accumulation_steps`, a number after `__post_init__`."""
        return cast(int, self.gradient_accumulation_steps)

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
            raise ValueError(
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps}) must divide the "
                f"{self.micro_steps_per_pass} micro-steps of a rollout. Leave it out for one update per rollout."
            )

    def _divide_the_rollout(self) -> None:
        chunk = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            if self.generation_batch_size != chunk * self.steps_per_generation:
                raise ValueError(
                    f"generation_batch_size ({self.generation_batch_size}) and steps_per_generation "
                    f"({self.steps_per_generation} × {chunk} images) disagree; give one of them."
                )
        elif self.generation_batch_size is not None:
            if self.generation_batch_size % chunk:
                raise ValueError(
                    f"generation_batch_size ({self.generation_batch_size}) must be divisible by {chunk}, the "
                    f"images of all processes; use {math.ceil(self.generation_batch_size / chunk) * chunk}."
                )
            self.steps_per_generation = self.generation_batch_size // chunk
        elif self.steps_per_generation is None:
            self.steps_per_generation = self.num_generations
        self.generation_batch_size = chunk * self.steps_per_generation
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"A rollout of {self.generation_batch_size} images does not divide into groups of num_generations "
                f"({self.num_generations}). Use "
                f"steps_per_generation={self.num_generations // math.gcd(chunk, self.num_generations)} or a multiple."
            )

    def _check_numbers(self) -> None:
        if self.gamma_schedule in ("trust_region", "kl") and self.gamma > self.gamma_max:
            raise ValueError(
                f"gamma ({self.gamma}), where {self.gamma_schedule!r} begins, is above gamma_max ({self.gamma_max})."
            )
        if self.num_inference_steps == 1 and not self.train_final_step:
            raise ValueError("With num_inference_steps=1 the only step is the final one; set train_final_step=True.")
        last = self.num_trainable_steps
        if self.sde_window_size is not None and (self.sde_window_start or 0) + self.sde_window_size > last:
            raise ValueError(
                f"A window of sde_window_size ({self.sde_window_size}) steps from {self.sde_window_start or 0} does "
                f"not fit into the {last} trainable steps."
            )
        for name in ("sde_window_start", "sde_window_slide_every"):
            if getattr(self, name) is not None and self.sde_window_size is None:
                raise ValueError(f"{name} ({getattr(self, name)}) needs sde_window_size, the length of the window.")
        if self.n_gpu > 1:
            raise ValueError(
                f"This one process sees {self.n_gpu} GPUs. Start a process for each with `accelerate launch "
                f"--num_processes {self.n_gpu}`, or show it one with CUDA_VISIBLE_DEVICES=0."
            )
        if self.max_steps == 0:
            raise ValueError("max_steps is 0: nothing would be trained. Leave it out, or give a number of updates.")
        if missing := {*cast(list, self.report_to)} - {*get_available_reporting_integrations()}:
            raise ValueError(f"report_to names {sorted(missing)}: not installed. Install it, or leave it out.")
        for name in ("pipeline_kwargs", "model_init_kwargs", "lr_scheduler_kwargs"):
            given: Any = getattr(self, name) or {}
            if not isinstance(given, dict):
                raise ValueError(f"{name} must be a dictionary of arguments, but it is {given!r}.")
            if bad := [key for key, value in given.items() if isinstance(value, float) and not math.isfinite(value)]:
                raise ValueError(f"{name} must have finite numbers, but those of {bad} are not.")
        if reserved := RESERVED & set(cast(dict, self.pipeline_kwargs or {})):
            raise ValueError(f"pipeline_kwargs holds {sorted(reserved)}, which the trainer sets; leave that out.")
        if self.reward_weights is not None and not any(self.reward_weights):
            raise ValueError("All reward_weights are 0, so there is nothing to train on; give one reward a weight.")
        unfit = {
            "ignore_data_skip": "would resume with other prompts than the rollout's",
            "save_only_model": "leaves checkpoints that no run can go on from",
            "auto_find_batch_size": "would break up the groups: lower per_device_train_batch_size instead",
        }
        for name in filter(lambda name: getattr(self, name), unfit):
            raise ValueError(f"{name} {unfit[name]}; leave it out.")
