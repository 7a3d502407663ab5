"""`slas-trl doctor` makes the first update of a training, and prints what was measured, or the first problem."""

import os
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from transformers import PrinterCallback, TrainerState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..cli.main import BAD_INPUT
from ..images import still
from ..policy import PipelineReplayer, Rollout
from ..policy.checks import denoisers_of
from ..run_files import TRAINER_STATE
from ..schedulers import FlowSDEScheduler
from ..statistics import text_table
from ..trainer import SLASConfig, SLASTrainer, checkpoints
from .arguments import LoraArguments, SLASScriptArguments, parse
from .train import eval_prompts, make_trainer, train_prompts


WIDTH, LABEL = 96, 18
EVALUATED = 2  # prompts of an evaluation, which scores the held-out rewards


def main(argv: Sequence[str]) -> int:
    """Returns 0 if training could start, and 1 if not."""
    script, lora, config = parse(argv, prog="slas-trl doctor", one_process=True)
    pipe = script.load_pipeline(config)
    print_row("pipeline", f"{type(pipe).__name__}, {script.model_name_or_path or 'the embedded one'}")
    for name, denoiser in denoisers_of(pipe).items():
        print_row("denoiser", f"{name}: {type(denoiser).__name__}, {_parameters(denoiser.parameters())}")
    try:
        with tempfile.TemporaryDirectory() as folder:
            examine(pipe, script, lora, config, folder)
    except Exception as error:  # of a pipeline or reward of the user's own, it may be of any kind
        print(file=sys.stderr)  # ends the line of a progress bar
        if os.environ.get("SLAS_TRL_DEBUG") == "1":
            traceback.print_exception(error)
        message = str(error) if isinstance(error, BAD_INPUT) else f"{type(error).__name__}: {error}"
        print(f"\nTraining cannot start:\n{_wrapped(message, '- ', '  ')}")
        return 1
    print("\nTraining can start.")
    return 0


def examine(
    pipe: DiffusionPipeline, script: SLASScriptArguments, lora: LoraArguments, config: SLASConfig, folder: str
) -> None:
    """Make one update and print what it was like. Raises the first problem; `folder` is for the trainer's files."""
    resume = config.resume_from_checkpoint
    checkpoint = checkpoints.find(config.run_dir, True if resume in ("true", "True") else resume)
    config.output_dir, config.push_to_hub, config.report_to, config.log_completions = folder, False, [], False
    trainer = make_trainer(script, lora, config, train_prompts(script), eval_prompts(script, config), pipe)
    trainer.remove_callback(PrinterCallback)
    print_trained(trainer, is_adapter=lora.use_peft or script.adapter is not None)
    config.max_steps = 1
    if checkpoint is not None:
        config.max_steps += TrainerState.load_from_json(str(checkpoint / TRAINER_STATE)).global_step
    config.logging_strategy, config.logging_steps = IntervalStrategy.STEPS, 1
    config.save_strategy, config.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    config.load_best_model_at_end = config.eval_on_start = False
    print(f"slas-trl doctor: one update, of {config.generation_batch_size} images ...", file=sys.stderr)
    sampling = Sampling(trainer.replayer, config.num_trained_timesteps)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    log = next(line for line in reversed(trainer.state.log_history) if "loss" in line)
    for label, text in sampling.rows.items():
        print_row(label, text)
    print_update(config, log)
    data = trainer.eval_dataset
    few = data.select(range(min(EVALUATED, len(data)))) if isinstance(data, Dataset) else None
    print_rewards(trainer, log, {} if few is None else trainer.evaluate(few))
    print_time(trainer, log, sampling.seconds)


class Sampling:
    """Takes the place of a replayer's `sample`, to describe the first call in `rows`, and to add up the `seconds`."""

    def __init__(self, replayer: PipelineReplayer, trained: int):
        self.rows: dict[str, str] = {}
        self.seconds = 0.0
        self._trained = trained
        self._sample, replayer.sample = replayer.sample, self  # type: ignore[method-assign]

    def __call__(self, **call: Any) -> Rollout:
        start = time.perf_counter()
        rollout = self._sample(**call)
        self.seconds += time.perf_counter() - start
        self.rows = self.rows or rollout_rows(rollout, self._trained)
        return rollout


def rollout_rows(rollout: Rollout, trained: int) -> dict[str, str]:
    """Sizes, calls of the denoiser and steps, by label."""
    width, height = still(rollout.images[0]).size
    latents = " x ".join(map(str, rollout.steps[0].sample.shape[1:]))
    calls = sorted({len(step.outputs) for step in rollout.steps})
    noise = ", ".join(f"{step.std:.3g}" for step in rollout.steps)
    return {
        "images": f"{width} x {height} pixels, from latents of {latents}",
        "denoiser calls": " or ".join(f"{number} per step" for number in calls),
        "steps": f"{len(rollout.steps)}, of which {len(rollout.trainable_steps)} stochastic and {trained} trained; "
        f"std of each: {noise}",
    }


def print_trained(trainer: SLASTrainer, is_adapter: bool) -> None:
    scheduler, model = cast(Any, trainer.replayer.scheduler), cast(torch.nn.Module, trainer.model)
    is_flow = isinstance(scheduler, FlowSDEScheduler)
    names = ("noise_schedule", "noise_level") if is_flow else ("prediction_type", "eta")
    settings = ", ".join(f"{name} {scheduler.config[name]}" for name in names)
    print_row("scheduler", f"{type(trainer.pipe.scheduler).__name__} -> {type(scheduler).__name__}, {settings}")
    what, precision = "adapter" if is_adapter else "all weights", trainer.args.mixed_precision
    autocast = "" if precision == "no" else f", autocast to {precision}"
    print_row("trained", f"{what}: {_parameters(p for p in model.parameters() if p.requires_grad)}{autocast}")


def print_update(config: SLASConfig, log: dict[str, float]) -> None:
    allowed = min(1e-5, config.epsilon / 10)
    print_row("max |ratio - 1|", f"{log['ratio/max_deviation']:.3g} before the update (allowed: {allowed:g})")
    for key, label in (("kl", "KL to reference"), ("trust_region/kl", "KL of update")):
        if key in log:
            print_row(label, f"{log[key]:.3g} nats per element of a latent")
    largest = f"gamma {log['gamma']:g}, |A| up to {log['advantages/abs_max']:.3g}"
    shares = f"{log['advantages/effective_share']:.3f}; groups without a difference {log['frac_reward_zero_std']:.0%}"
    print_row("advantages", f"{largest}; effective share {shares}")
    print_row("reward", f"mean {log['reward']:.4g}, std within a group {log['reward_std']:.3g}")


def print_rewards(trainer: SLASTrainer, log: dict[str, float], evaluation: dict[str, float]) -> None:
    rows = [("reward", "mean", "std", "no score", "seconds", "weight")]
    for name, weight in trainer.weight_of.items():
        is_held_out = name not in trainer.scorer.names
        source, key = (evaluation, f"eval_rewards/{name}") if is_held_out else (log, f"rewards/{name}")
        if f"{key}/mean" in source:
            mean, std, missing, seconds = (source[f"{key}/{kind}"] for kind in ("mean", "std", "nan_share", "time"))
            numbers = f"{mean:.4g}", f"{std:.3g}", f"{missing:.0%}", f"{seconds:.2g}"
            rows.append((name, *numbers, "held out" if is_held_out else f"{weight:g}"))
    print(textwrap.indent(text_table(rows), "    "))


def print_time(trainer: SLASTrainer, log: dict[str, float], sampling: float) -> None:
    config, device = trainer.args, trainer.accelerator.device
    updates = config.micro_steps_per_rollout / config.micro_steps_per_update
    sampled = f"of which {sampling:.2g} s to sample {config.generation_batch_size} images"
    first = f"{log['step_time']:.2g} s for the first update, {sampled}"
    print_row("time", f"{first}; a rollout serves {updates:g} update(s)")
    if device.type == "cuda":
        print_row("peak memory", f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB on {device}")


def print_row(label: str, text: str) -> None:
    print(_wrapped(text, f"{label:<{LABEL}}", " " * LABEL))


def _wrapped(text: str, first: str, following: str) -> str:
    wrapper = textwrap.TextWrapper(WIDTH, first, following, break_long_words=False, break_on_hyphens=False)
    return wrapper.fill(" ".join(text.split()))


def _parameters(parameters: Iterable[torch.nn.Parameter]) -> str:
    every = list(parameters)
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in every}))
    return f"{sum(p.numel() for p in every):,} parameters, {dtypes}"
