"""
`slas-trl doctor`: would this training start, and what would it be like? Takes the options of `slas-trl train`, does
what its first rollout and its first micro-step do, and prints what it finds. It trains and writes nothing.
"""

import math
import os
import sys
import tempfile
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from transformers import Trainer

from slas_trl.advantages import Advantages, compute_advantages, slas_advantages
from slas_trl.policy import Rollout, measure_ratio
from slas_trl.policy.doctor import (
    counting_activations,
    denoisers_of,
    load_pipeline,
    pipeline_problems,
    rollout_bytes,
    samples_per_call,
)
from slas_trl.schedulers import DDIMSDEScheduler, FlowSDEScheduler, stochastic_scheduler
from slas_trl.scripts.arguments import LoraArguments, SLASScriptArguments, parse
from slas_trl.scripts.train import _eval_prompts, _train_prompts
from slas_trl.shapes import load_shapes_pipeline
from slas_trl.trainer import SLASConfig, SLASTrainer
from slas_trl.trainer.checkpoints import last_whole_checkpoint
from slas_trl.trainer.prompts import load_prompts
from slas_trl.trainer.scoring import (
    RewardFunc,
    RewardScorer,
    resolve_reward,
    reward_name,
    reward_resolution,
    typical_group_std,
)


WIDTH, LABEL = 96, 18
SHAPERS = [name for name in signature(slas_advantages).parameters if name not in ("rewards", "num_generations")]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if training could start, and 1 if not."""
    script, lora, config = parse(sys.argv[1:] if argv is None else argv, prog="slas-trl doctor")
    sys.path.append(str(Path.cwd()))  # as for `slas-trl train`
    if config.world_size > 1:
        raise ValueError(f"slas-trl doctor runs in one process, but there are {config.world_size}. Start it alone.")
    name = script.model_name_or_path
    pipe = load_shapes_pipeline() if name is None else load_pipeline(name, cast(dict, config.model_init_kwargs or {}))
    with tempfile.TemporaryDirectory() as folder:
        findings = Doctor(pipe, script, lora, config, folder).examine()
    _print_findings(findings)
    return 1 if findings.refusals else 0


@dataclass
class Findings:
    """What is wrong: `refusals` keep training from starting, `warnings` do not."""

    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def refuse(self, error: Exception, stage: str = "") -> None:
        """Note an error, which in a foreign pipeline or reward may be of any kind."""
        if os.environ.get("SLAS_TRL_DEBUG") == "1":
            traceback.print_exception(error)
        if isinstance(error, torch.OutOfMemoryError):
            stage += "; lower per_device_train_batch_size, set gradient_checkpointing, or train an adapter (use_peft)"
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        message = f"{kind}{error}"
        self.refusals.append(f"{stage}: {message}" if stage else message)


class ExaminedTrainer(SLASTrainer):
    """Keeps what its first rollout is made of, and notes what is wrong with it rather than stop at the first."""

    findings: Findings

    def examine(self, indices: list[int]) -> None:
        """Sample and score, and compute one micro-step with its gradients, as `train` does at its start."""
        self.pictures: list[Any] = []
        self.rewards: torch.Tensor | None = None  # (N, K)
        self.rollout: Rollout | None = None  # the first chunk
        self.ratio: dict[int, float] = {}
        self.failed: set[str] = set()  # rewards that raised
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.activations = 0
        findings, model = self.findings, cast(torch.nn.Module, self.model)
        try:
            self.create_optimizer()
            self.model_wrapped, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        except Exception as error:
            findings.refuse(error, f"The optimizer (optim {self.args.optim}) could not be made")
            return
        model.train()
        self._measured = self._now()
        try:
            inputs = self._prepare_inputs(indices)
        except Exception as error:
            findings.refuse(error, "Sampling failed")
            return
        try:
            report = measure_ratio(self.replayer, inputs["rollout"], tuple(sorted(self.trained_steps)))
            self.ratio = report.deviations
            if (problem := report.problem(self.args.epsilon)) is not None:
                findings.refusals.append(problem)
            self._measured = self._now()
            models = [module for module in self.pipe.components.values() if isinstance(module, torch.nn.Module)]
            kept = [inputs["rollout"].steps[inputs["step"]].__dict__, inputs["rollout"].memo]
            with counting_activations(*models, *kept) as activations, self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
                self.activations = sum(activations.values())
            self.accelerator.backward(loss)
            self.optimizer.zero_grad()  # type: ignore[union-attr]
            self.note("micro-step")
        except Exception as error:
            findings.refuse(error, "The first micro-step failed")

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        return time.perf_counter()

    def note(self, what: str) -> None:
        """Time and, on CUDA, peak memory since the last one."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
            self.peaks[what] = torch.cuda.max_memory_allocated()
        self.seconds[what] = time.perf_counter() - self._measured
        self._measured = self._now()

    # The trainer's own pieces, in the order in which it calls them

    def _choose_steps(self, rollout: Rollout, rng: np.random.Generator) -> list[int]:
        self.note("sampling")
        self.rollout = rollout
        self.trained_steps = super()._choose_steps(rollout, rng)
        return self.trained_steps

    def _score(self, dataset: Dataset, indices: list[int], images: list[Any]) -> torch.Tensor:
        self.pictures = images
        scorer, columns = self.scorer, []
        for name, function in zip(scorer.names, scorer.functions, strict=True):
            self.scorer = RewardScorer(function)
            try:
                columns.append(super()._score(dataset, indices, images))
            except (ValueError, TypeError) as error:
                self.findings.refuse(error)
                self.failed.add(name)
                columns.append(torch.full((len(images), 1), math.nan, dtype=torch.float64))
        self.scorer = scorer
        self.rewards = torch.cat(columns, dim=1)
        self.note("scoring")
        return self.rewards

    def _log_rollout(self, rewards: torch.Tensor, result: Advantages) -> None:
        pass

    def _check_before_training(self, rollout: Rollout, steps: list[int], rewards: torch.Tensor) -> None:
        self._checked = True


class Doctor:
    """
    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): the pipeline; it is changed.
        script, lora, config: the options of `slas-trl train`; `config` is changed.
        folder (`str`): one to write to, for what insists on it.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        script: SLASScriptArguments,
        lora: LoraArguments,
        config: SLASConfig,
        folder: str,
    ):
        self.pipe: Any = pipe
        self.script, self.lora, self.config = script, lora, config
        self.findings = Findings()
        self.weights = {name: _weight_bytes(m) for name, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
        # Neither files nor a repository on the Hub.
        self.output_dir, config.output_dir, config.push_to_hub = Path(config.output_dir or "."), folder, False

    def examine(self) -> Findings:
        findings, config = self.findings, self.config
        _print_row("pipeline", f"{type(self.pipe).__name__}, {self.script.model_name_or_path or 'the embedded one'}")
        for name, denoiser in denoisers_of(self.pipe).items():
            size = _count(sum(p.numel() for p in denoiser.parameters()))
            dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in denoiser.parameters()}))
            _print_row("denoiser", f"{name}: {type(denoiser).__name__}, {size} parameters, {dtypes}")
        findings.refusals += pipeline_problems(self.pipe)
        self._convert_scheduler()
        self._put_right()
        functions = self._rewards()
        try:
            data = _train_prompts(self.script)
            data = load_prompts(config.prompt_dataset) if data is None else data
        except Exception as error:
            findings.refuse(error, "Prompts")
            data = None
        try:
            eval_data = _eval_prompts(self.script, config)
        except Exception as error:
            findings.refuse(error, "Evaluation prompts")
            eval_data = None
            config.eval_strategy = "no"
        trainer = None
        if data is not None and not list(pipeline_problems(self.pipe)):
            trainer = self._build(functions or [_no_reward], data, eval_data)
        if trainer is None:
            _print_row("not sampled", "because of what is refused below; so only the weights are known:")
            _print_lines(f"{name:<{LABEL}}{_bytes(size)}" for name, size in self.weights.items())
            return findings

        images = math.lcm(config.per_device_train_batch_size, config.num_generations)
        chunks = images // config.per_device_train_batch_size
        print(f"slas-trl doctor: sampling {images} images in {chunks} chunk(s) ...", file=sys.stderr)
        trainer.examine(next(iter(trainer.get_train_dataloader()))[:images])
        trained = [p for m in denoisers_of(self.pipe).values() for p in m.parameters() if p.requires_grad]
        self._print_trained(trained)
        if trainer.rollout is not None:
            self._print_sampling(trainer, trainer.rollout)
        if trainer.rewards is not None and functions:
            self._print_rewards(trainer, trainer.rewards)
        if config.beta:
            how = "the denoiser with its adapter off" if trainer.has_adapter else "a frozen copy of the denoiser"
            _print_row("KL reference", f"{how} (beta {config.beta:g})")
        if trainer.rollout is not None:
            self._print_memory(trainer, trained, rollout_bytes(trainer.rollout))
            self._print_time(trainer, chunks)
        return findings

    # What can be found out before a trainer is built

    def _convert_scheduler(self) -> None:
        own = self.pipe.components.get("scheduler")
        self.scheduler = None
        if own is None:
            return
        args = self.config
        try:
            self.scheduler = stochastic_scheduler(
                self.pipe, noise_schedule=args.noise_schedule, noise_level=args.noise_level, eta=args.eta
            )
        except ValueError as error:
            self.findings.refuse(error)
            _print_row("scheduler", f"{type(own).__name__} -> none")
            return
        settings = self.scheduler.config
        if isinstance(self.scheduler, FlowSDEScheduler):
            noise = f"noise_schedule {settings['noise_schedule']}, noise_level {settings['noise_level']:g}"
        else:
            noise = f"{settings['prediction_type']} prediction, eta {settings['eta']:g}"
        _print_row("scheduler", f"{type(own).__name__} -> {type(self.scheduler).__name__}: {noise}")

    def _put_right(self) -> None:
        """What is refused of the pipeline and can be put right in memory is, so that the rest can be examined too."""
        changed = []
        for module in [m for denoiser in denoisers_of(self.pipe).values() for m in denoiser.modules()]:
            if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
                module.p = 0.0
                changed = ["without dropout"]
        if self.scheduler is not None and self.pipe.scheduler.order != 1:
            self.pipe.scheduler = self.scheduler
            changed.append("with the converted scheduler")
        if changed:
            _print_row("measured", f"{' and '.join(changed)}; see what is refused below")

    def _rewards(self) -> list[RewardFunc]:
        named, functions = self.script.reward_funcs or [], {}
        if not named:
            self.findings.refusals.append(
                "No reward is named, so rewards were not checked. Give --reward_funcs: functions of slas_trl.rewards, "
                "or package.module:function."
            )
        for reward in named:
            try:
                function = resolve_reward(reward)
                functions.setdefault(reward_name(function), []).append(function)
            except (ValueError, TypeError) as error:
                self.findings.refuse(error)
        resolved = [function for same in functions.values() for function in same]
        try:
            if resolved:
                RewardScorer(resolved)
        except ValueError as error:  # two of one name
            self.findings.refuse(error)
        usable = [same[0] for same in functions.values()]
        # Weights are those of all that were named.
        self.weighted = len(usable) == len(named) > 0
        if not self.weighted:
            self.config.reward_weights = None
        return usable

    def _build(
        self, functions: list[RewardFunc], data: Dataset, eval_data: Dataset | None
    ) -> ExaminedTrainer | None:
        """The trainer, or what it refuses; as long as that is known, and can be left aside, the next thing too."""
        config = self.config
        while True:
            try:
                trainer = ExaminedTrainer(
                    self.pipe, functions, config, data, eval_data, peft_config=self.lora.peft_config()
                )
                break
            except Exception as error:
                self.findings.refuse(error)
            needed = config.images_per_rollout // config.num_generations
            if config.reward_weights is not None and len(config.reward_weights) != len(functions):
                config.reward_weights, self.weighted = None, False
            elif len(data) < needed:
                data = data.select([i % len(data) for i in range(needed)])
            else:
                return None
        trainer.findings = self.findings
        resume = config.resume_from_checkpoint
        if resume:
            try:
                folder = last_whole_checkpoint(self.output_dir) if resume in ("true", "True") else Path(resume)
                if folder is None:
                    raise ValueError(f"There is no whole checkpoint in {str(self.output_dir)!r} to resume from.")
                trainer._load_from_checkpoint(str(folder))
                trainer._micro_step = 0  # a whole rollout is wanted
            except Exception as error:
                self.findings.refuse(error, "The checkpoint cannot be resumed")
        return trainer

    # What was found

    def _print_trained(self, trained: list[torch.nn.Parameter]) -> None:
        lora = self.lora
        what = f"LoRA, rank {lora.lora_r}, alpha {lora.lora_alpha}" if lora.use_peft else "all weights of the denoiser"
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trained}))
        precision = f"; autocast to {self.config.mixed_precision}" if self.config.mixed_precision != "no" else ""
        _print_row("trained", f"{what}: {_count(sum(p.numel() for p in trained))} parameters, {dtypes}{precision}")

    def _print_sampling(self, trainer: ExaminedTrainer, rollout: Rollout) -> None:
        config, scheduler = self.config, trainer.replayer.scheduler
        if trainer.pictures:
            shape = " x ".join(map(str, rollout.steps[0].sample.shape[1:]))
            width, height = trainer.pictures[0].size
            _print_row("images", f"{width} x {height} pixels, from latents of {shape}")
        _print_row("denoiser calls", _calls(rollout))

        final = len(rollout.steps) - 1
        candidates = [i for i in rollout.trainable_steps if i != final or config.train_final_step]
        wanted = min(config.num_trained_timesteps, len(candidates))
        text = f"{len(rollout.steps)}, of which {wanted} are trained"
        if wanted < len(candidates):
            text += f", drawn for each rollout from {len(candidates)} (timestep_fraction {config.timestep_fraction:g})"
        if config.sde_window_size is not None:
            where = f"drawn for each rollout, here {rollout.window}" if config.sde_window_start is None else ""
            text += f"; a window of {config.sde_window_size} stochastic steps{where and ', ' + where}"
        _print_row("steps", text)
        time_name = "sigma" if isinstance(scheduler, FlowSDEScheduler) else "timestep"
        lines = [f"{'step':>4}  {time_name:>9}  {'std':>9}  {'|ratio - 1|':>11}"]
        for i, step in enumerate(rollout.steps):
            if isinstance(scheduler, FlowSDEScheduler):
                at = f"{scheduler.sigmas[step.index].item():.4f}"
            else:
                at = f"{scheduler.timesteps[step.index].item():g}"
            ratio = f"{trainer.ratio[i]:.2g}" if i in trainer.ratio else "-"
            why = self._why_not(rollout, i, final)
            lines.append(f"{i:>4}  {at:>9}  {step.std:>9.4f}  {ratio:>11}  {why}".rstrip())
        _print_lines(lines)
        if trainer.ratio:
            worst, allowed = max(trainer.ratio.values()), min(1e-5, config.epsilon / 10)
            _print_row("max |ratio - 1|", f"{worst:.3g} before any update (allowed: {allowed:g})")

    def _why_not(self, rollout: Rollout, position: int, final: int) -> str:
        """Why a step is not trained; empty if it is."""
        if position in rollout.trainable_steps:
            kept = position == final and not self.config.train_final_step
            return "not trained: the final step (train_final_step)" if kept else ""
        if rollout.window is not None and rollout.steps[position].index not in rollout.window:
            return "not trained: outside of the window"
        return "not trained: deterministic"

    def _print_rewards(self, trainer: ExaminedTrainer, rewards: torch.Tensor) -> None:
        config, findings, names = self.config, self.findings, trainer.scorer.names
        size = config.num_generations
        _print_row("rewards", f"on {len(rewards)} images: {len(rewards) // size} group(s) of {size}")
        weights = config.reward_weights or [1.0] * len(names)
        width = max(6, *(len(name) for name in names))
        columns = ("mean", "min", "max", "resolution", "group std", "no score", "weight")
        lines = [f"{'reward':<{width}}" + "".join(f"{column:>11}" for column in columns)]
        for name, column, weight in zip(names, rewards.T, weights, strict=True):
            if name in trainer.failed:
                lines.append(f"{name:<{width}}  raised, see below")
                continue
            scored = column[~column.isnan()]
            share = f"{1 - len(scored) / len(column):>11.0%}{weight:>11g}"
            if not len(scored):
                lines.append(f"{name:<{width}}{'-':>11}{'-':>11}{'-':>11}{'-':>11}{'-':>11}{share}")
                continue
            resolution, spread = reward_resolution(column), typical_group_std(column, size)
            numbers = (scored.mean(), scored.min(), scored.max(), resolution, spread)
            lines.append(f"{name:<{width}}" + "".join(f"{float(number):>11.4g}" for number in numbers) + share)
            if weight and resolution >= spread > 0:
                findings.warnings.append(
                    f"Reward {name!r} resolves differences of {resolution:.3g}, but within a group its values spread "
                    f"by only {spread:.3g}: much of the advantage is rounding. Score in float32, or return finer "
                    "values."
                )
        _print_lines(lines)
        trained = [i for i, weight in enumerate(weights) if weight]
        if trainer.failed & {names[i] for i in trained}:
            return
        if rewards[:, trained].isnan().all():
            findings.refusals.append(
                f"No image got a score: {', '.join(names[i] for i in trained)} returned only None or NaN."
            )
        elif self.weighted:
            self._print_share(rewards)

    def _print_share(self, rewards: torch.Tensor) -> None:
        config = self.config
        settings = {name: getattr(config, name) for name in SHAPERS}
        shaped = compute_advantages(rewards, config.num_generations, **settings)
        linear = compute_advantages(rewards, config.num_generations, **{**settings, "gamma": 0.0})
        _print_row(
            "effective share",
            f"{shaped.effective_share:.3f} of the {len(rewards)} images with gamma {config.gamma:g}; "
            f"{linear.effective_share:.3f} with gamma 0",
        )
        if shaped.frac_reward_zero_std == 1:
            self.findings.warnings.append(
                "In no group do the rewards differ: images like these teach nothing. Look at the reward, or raise the "
                "noise (noise_level, eta) or num_generations."
            )
        elif shaped.frac_groups_filtered == 1:
            self.findings.warnings.append(f"All groups are below min_group_std ({config.min_group_std:g}); lower it.")
        elif shaped.effective_share < 0.1:
            self.findings.warnings.append(
                f"The effective sample share is {shaped.effective_share:.2f}, below 0.1: few images decide the "
                "update. Lower gamma or enlarge the rollout."
            )

    def _print_memory(self, trainer: ExaminedTrainer, trained: list[torch.nn.Parameter], chunk: int) -> None:
        config, device = self.config, trainer.accelerator.device
        denoisers = denoisers_of(self.pipe)
        weights = sum(_weight_bytes(module) for module in denoisers.values())
        frozen = sum(size for name, size in self.weights.items() if name not in denoisers)
        own = sum(p.nbytes for p in trained)
        copies = weights if config.beta and not trainer.has_adapter else 0
        copies += own if config.use_ema else 0
        rollout = chunk * cast(int, config.steps_per_generation)
        states = _optimizer_bytes(trainer, trained)
        rows = [
            ("denoiser", weights, weights),
            ("other components", frozen, frozen),
            ("KL reference, EMA", copies, copies),
            (f"rollout of {config.images_per_rollout}", rollout, rollout),
            ("gradients", 0, own),
            (f"optimizer ({_name(config.optim)})", states, states),
            ("activations", None, trainer.activations),
        ]
        _print_row("memory (estimate)", f"on {device}; activations are what autograd keeps of one micro-step")
        lines = [f"{'':<26}{'sampling':>12}{'training':>12}"]
        lines += [f"{label:<26}{_bytes(sampling):>12}{_bytes(training):>12}" for label, sampling, training in rows]
        sampling, training = (sum(row[i] or 0 for row in rows) for i in (1, 2))
        lines.append(f"{'sum':<26}{_bytes(sampling) + ' +':>12}{_bytes(training):>12}")
        if trainer.peaks:
            peaks = [_bytes(trainer.peaks.get(what)) for what in ("sampling", "micro-step")]
            lines.append(f"{'peak measured':<26}{peaks[0]:>12}{peaks[1]:>12}")
        _print_lines(lines)
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            if training > total:
                self.findings.warnings.append(
                    f"Training needs about {_bytes(training)}, but {device} has {_bytes(total)}. Lower "
                    "per_device_train_batch_size, set gradient_checkpointing, or train an adapter (use_peft)."
                )

    def _print_time(self, trainer: ExaminedTrainer, chunks: int) -> None:
        config, seconds = self.config, trainer.seconds
        chunk = seconds["sampling"] / chunks
        text = f"{chunk:.2g} s to sample a chunk of {config.per_device_train_batch_size}"
        if "micro-step" in seconds and "scoring" in seconds:
            scoring = seconds["scoring"] * config.images_per_rollout / len(trainer.pictures)
            rollout = chunk * cast(int, config.steps_per_generation) + scoring
            updates = config.micro_steps_per_rollout / config.micro_steps_per_update  # for each rollout
            update = rollout / updates + seconds["micro-step"] * config.micro_steps_per_update
            text += (
                f", {scoring:.2g} s to score a rollout, {seconds['micro-step']:.2g} s for a micro-step: about "
                f"{update:.2g} s for an update of {config.micro_steps_per_update} micro-steps with its share of "
                "sampling"
            )
        _print_row("time (estimate)", text)


def _no_reward(prompts: list[str], images: list[Any], **columns: Any) -> list[None]:
    """Stands in where no reward is named or can be found."""
    return [None] * len(images)


def _calls(rollout: Rollout) -> str:
    images = len(rollout)
    parts = []
    counted = Counter(samples_per_call(rollout))
    for calls, steps in counted.items():
        if len(set(calls)) == 1:
            text = f"{len(calls)} of {calls[0]} samples" if len(calls) > 1 else f"1, of {calls[0]} samples"
        else:
            text = f"{len(calls)}, of {', '.join(map(str, calls))} samples"
        factor = sum(calls) / images
        guided = "no guidance" if factor == 1 else f"{factor:g} for each image, so guided"
        parts.append(f"{text} ({guided})" + (f" at {steps} steps" if len(counted) > 1 else ""))
    return f"per step {'; '.join(parts)}, for {images} images"


def _optimizer_bytes(trainer: Trainer, trained: list[torch.nn.Parameter]) -> int | None:
    """What the optimizer keeps for these parameters, going by what it keeps for a small one; `None` if unknown."""
    cls, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    total = 0
    for dtype in {p.dtype for p in trained}:
        small = torch.nn.Parameter(torch.zeros(256, 256, dtype=dtype, device=trainer.accelerator.device))
        small.grad = torch.zeros_like(small)
        try:
            optimizer = cls([small], **kwargs)
            optimizer.step()
        except (TypeError, RuntimeError, ValueError):  # one that wants to know the model
            return None
        kept = sum(value.nbytes for value in optimizer.state[small].values() if isinstance(value, torch.Tensor))
        total += round(kept / small.numel() * sum(p.numel() for p in trained if p.dtype == dtype))
    return total


def _weight_bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _name(optim: Any) -> str:
    return optim.value if hasattr(optim, "value") else optim


def _count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return str(number)


def _bytes(size: int | None) -> str:
    if size is None:
        return "unknown"
    for unit, letters in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {letters}"
    return f"{size} B" if size else "-"


def _print_row(label: str, text: str) -> None:
    indent = " " * LABEL
    print(textwrap.fill(text, WIDTH, initial_indent=f"{label:<{LABEL}}", subsequent_indent=indent,
                        break_long_words=False, break_on_hyphens=False))  # fmt: skip


def _print_lines(lines: Any) -> None:
    print(textwrap.indent("\n".join(lines), " " * LABEL))


def _print_findings(findings: Findings) -> None:
    def listed(title: str, texts: list[str]) -> None:
        print(f"\n{title}")
        for text in dict.fromkeys(texts):
            print(textwrap.fill(" ".join(text.split()), WIDTH, initial_indent="- ", subsequent_indent="  ",
                                break_long_words=False, break_on_hyphens=False))  # fmt: skip

    if findings.warnings:
        listed("Warnings", findings.warnings)
    if findings.refusals:
        listed("Training cannot start:", findings.refusals)
    else:
        print("\nTraining can start.")
