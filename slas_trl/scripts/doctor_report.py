"""What `slas-trl doctor` prints: rows of a label and a text, and tables under some of them."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from transformers.training_args import OptimizerNames

from slas_trl.advantages import compute_advantages
from slas_trl.images import still
from slas_trl.policy import Rollout
from slas_trl.policy.doctor import denoisers_of, rollout_bytes, samples_per_call
from slas_trl.schedulers import DDIMSDEScheduler, FlowSDEScheduler
from slas_trl.scripts.examination import ExaminedTrainer, Findings
from slas_trl.trainer.lora import ADAPTER_NAME
from slas_trl.trainer.metrics import advantage_problem
from slas_trl.trainer.scoring import reward_resolution, typical_group_std


WIDTH, LABEL = 96, 18


def print_pipeline(
    pipe: DiffusionPipeline, source: str, scheduler: FlowSDEScheduler | DDIMSDEScheduler | None
) -> None:
    """`scheduler` is what the pipeline's own is converted to, if it can be."""
    print_row("pipeline", f"{type(pipe).__name__}, {source}")
    for name, denoiser in denoisers_of(pipe).items():
        parameters = list(denoiser.parameters())
        print_row("denoiser", f"{name}: {type(denoiser).__name__}, {_parameters(parameters)}")
    if scheduler is None:
        converted = "none"
    elif isinstance(scheduler, FlowSDEScheduler):
        noise_schedule, level = scheduler.config["noise_schedule"], scheduler.config["noise_level"]
        converted = f"{type(scheduler).__name__}, noise_schedule {noise_schedule}, noise_level {level:g}"
    else:
        prediction, eta = scheduler.config["prediction_type"], scheduler.config["eta"]
        converted = f"{type(scheduler).__name__}, {prediction} prediction, eta {eta:g}"
    print_row("scheduler", f"{type(pipe.components.get('scheduler')).__name__} -> {converted}")


def print_weights(pipe: DiffusionPipeline) -> None:
    """In place of all that cannot be measured."""
    print_row("not sampled", "because of what is refused below; of the memory, only the weights are known:")
    _print_table([(name, _bytes(size)) for name, size in _weights(pipe).items()])


class DoctorReport:
    """Prints what a trainer's examination showed, and adds to the findings what only numbers show."""

    def __init__(self, trainer: ExaminedTrainer, adapter: str | None, findings: Findings):
        self.trainer, self.config, self.pipe, self.findings = trainer, trainer.args, trainer.pipe, findings
        denoisers = denoisers_of(trainer.pipe).values()
        self.trained = [p for denoiser in denoisers for p in denoiser.parameters() if p.requires_grad]
        self.adapter = None
        if trainer.has_adapter:
            config = trainer.pipe.components[trainer.denoiser_names[0]].peft_config[ADAPTER_NAME]
            origin = "" if adapter is None else f" from {adapter}"
            self.adapter = f"LoRA{origin}, rank {config.r}, alpha {config.lora_alpha}"

    def print_trained(self) -> None:
        config = self.config
        text = f"{self.adapter or 'all weights'}: {_parameters(self.trained)}"
        if config.mixed_precision != "no":
            text += f", autocast to {config.mixed_precision}"
        print_row("trained", text)
        if config.beta:
            how = "the denoiser without its adapter" if self.adapter else "a frozen copy of the denoiser"
            how = how if self.trainer.kept_adapter is None else "the denoiser with the adapter as it came"
            print_row("KL reference", f"{how}, beta {config.beta:g}")

    def print_sampling(self, rollout: Rollout) -> None:
        trainer, config = self.trainer, self.config
        if trainer.images:
            width, height = still(trainer.images[0]).size
            latents = " x ".join(map(str, rollout.steps[0].sample.shape[1:]))
            print_row("images", f"{width} x {height} pixels, from latents of {latents}")
        print_row("denoiser calls", _calls(rollout))
        candidates, wanted = rollout.trainable_steps, config.num_trained_timesteps
        text = f"{len(rollout.steps)}, of which trained: {min(wanted, len(candidates))}"
        if wanted < len(candidates):
            text += f", drawn for each rollout from {len(candidates)} (timestep_fraction {config.timestep_fraction:g})"
        if rollout.window is not None:
            text += f"; stochastic only in a window of {len(rollout.window)}"
            text += ", drawn for each rollout" if config.sde_window_start is None else ""
        print_row("steps", text)
        self._print_steps(rollout)
        if trainer.ratio is not None:
            allowed = min(1e-5, config.epsilon / 10)
            print_row("max |ratio - 1|", f"{trainer.ratio.worst[1]:.3g} before any update (allowed: {allowed:g})")

    def _print_steps(self, rollout: Rollout) -> None:
        trainer = self.trainer
        scheduler = cast(FlowSDEScheduler | DDIMSDEScheduler, trainer.replayer.scheduler)
        is_flow = isinstance(scheduler, FlowSDEScheduler)
        deviations = {} if trainer.ratio is None else trainer.ratio.deviations
        rows = [("step", "sigma" if is_flow else "timestep", "std", "|ratio - 1|")]
        notes = [""]
        for i, step in enumerate(rollout.steps):
            at = f"{scheduler.sigmas[step.index]:.4f}" if is_flow else f"{scheduler.timesteps[step.index]:g}"
            ratio = f"{deviations[i]:.2g}" if i in deviations else "-"
            rows.append((str(i), at, f"{step.std:.4f}", ratio))
            notes.append("" if i in trainer.trained_steps else f"not trained: {self._why_not(rollout, i)}")
        _print_table(rows, notes)

    def _why_not(self, rollout: Rollout, position: int) -> str:
        if rollout.window is not None and rollout.steps[position].index not in rollout.window:
            return "outside of the window"
        if position == len(rollout.steps) - 1 and not self.config.train_final_step:
            return "the final step (train_final_step)"
        if position not in rollout.trainable_steps:
            return "deterministic"
        return "not drawn for this rollout"

    def print_rewards(self, rewards: torch.Tensor, as_asked: bool) -> None:
        """`as_asked` is whether rewards and weights are those that were asked for; else advantages say nothing."""
        config, trainer, names = self.config, self.trainer, self.trainer.scorer.names
        size = config.num_generations
        print_row("rewards", f"on {len(rewards)} images, {len(rewards) // size} group(s) of {size}")
        weights = trainer.trained_weights
        rows: list[tuple[str, ...]] = [
            ("reward", "mean", "min", "max", "resolution", "group std", "no score", "weight")
        ]
        held_out = [] if trainer.held_out is None else trainer.held_out.T
        listed = [*zip(names, rewards.T, weights, strict=True)]
        listed += [*zip(trainer.eval_scorer.names[len(names) :], held_out, [None] * len(held_out), strict=True)]
        for name, column, weight in listed:
            scored = column[~column.isnan()]
            missing = "raised" if name in trainer.failed else f"{1 - len(scored) / len(column):.0%}"
            numbers = ["-"] * 5
            if len(scored):
                resolution, spread = reward_resolution(column), typical_group_std(column, size)
                values = (scored.mean().item(), scored.min().item(), scored.max().item(), resolution, spread)
                numbers = [f"{value:.4g}" for value in values]
                if weight and resolution >= spread > 0:
                    self.findings.warnings.append(
                        f"Reward {name!r} resolves differences of {resolution:.3g}, but within a group its values "
                        f"spread by only {spread:.3g}: much of the advantage is rounding. Score in float32, or return "
                        "finer values."
                    )
            rows.append((name, *numbers, missing, "held out" if weight is None else f"{weight:g}"))
        _print_table(rows)
        trained = [i for i, weight in enumerate(weights) if weight]
        if trainer.failed & {names[i] for i in trained}:
            return
        if rewards[:, trained].isnan().all():
            self.findings.refusals.append(
                f"No image got a score: {', '.join(names[i] for i in trained)} returned only None or NaN."
            )
        elif as_asked and trainer._checked:  # has come as far as that
            self._print_share(rewards)

    def _print_share(self, rewards: torch.Tensor) -> None:
        config, warnings = self.config, self.findings.warnings
        shaped = compute_advantages(rewards, config.num_generations, config)
        linear = compute_advantages(rewards, config.num_generations, config, gamma=0.0)
        print_row(
            "effective share",
            f"{shaped.effective_share:.3f} of the {len(rewards)} images with gamma {config.gamma:g}, "
            f"{linear.effective_share:.3f} with gamma 0",
        )
        if (problem := advantage_problem(shaped, config.min_group_std)) is not None:
            warnings.append(problem)

    def print_costs(self, rollout: Rollout) -> None:
        """Memory and time."""
        config, trainer, device = self.config, self.trainer, self.trainer.accelerator.device
        denoisers, components = denoisers_of(self.pipe), _weights(self.pipe)
        denoiser = sum(components[name] for name in denoisers)
        own = sum(p.nbytes for p in self.trained)
        copies = (own if config.use_ema else 0) + (denoiser if config.beta and not self.adapter else 0)
        stored = rollout_bytes(rollout) * cast(int, config.steps_per_generation)
        states = self._optimizer_bytes()
        frozen = sum(components.values()) - denoiser
        items: dict[str, tuple[int | None, int | None]] = {  # while sampling, while training
            "denoiser": (denoiser, denoiser),
            "other components": (frozen, 0 if config.offload_frozen_components else frozen),
            "KL reference, EMA": (copies, copies),
            f"rollout of {config.images_per_rollout} images": (stored, stored),
            "gradients": (0, own),
            f"optimizer ({OptimizerNames(config.optim).value})": (states, states),
            "activations": (None, trainer.activations or None),
        }
        totals = [sum(item[i] or 0 for item in items.values()) for i in (0, 1)]
        open_ended = [" + ?" if any(item[i] is None for item in items.values()) else "" for i in (0, 1)]
        rows: list[tuple[str, ...]] = [("", "sampling", "training")]
        rows += [(label, _bytes(a), _bytes(b)) for label, (a, b) in items.items() if (a, b) != (0, 0)]
        rows.append(("sum", *(_bytes(total) + more for total, more in zip(totals, open_ended, strict=True))))
        if trainer.peaks:
            rows.append(("peak measured", *(_bytes(trainer.peaks.get(name)) for name in ("sampling", "micro-step"))))
        print_row("memory (estimate)", f"on {device}; activations: what autograd keeps of one micro-step")
        _print_table(rows)
        if device.type == "cuda" and totals[1] > (there := torch.cuda.get_device_properties(device).total_memory):
            self.findings.warnings.append(
                f"Training needs about {_bytes(totals[1])}, but {device} has {_bytes(there)}. Lower "
                "per_device_train_batch_size, set activation_checkpointing, or train an adapter (use_peft)."
            )
        self._print_time()

    def _print_time(self) -> None:
        config, seconds, images = self.config, self.trainer.seconds, len(self.trainer.images)
        chunk = seconds["sampling"] * config.per_device_train_batch_size / images
        text = f"{chunk:.2g} s to sample a chunk of {config.per_device_train_batch_size} images"
        if "micro-step" in seconds:
            scoring = seconds["scoring"] * config.images_per_rollout / images
            rollout = chunk * cast(int, config.steps_per_generation) + scoring
            share = config.micro_steps_per_update / config.micro_steps_per_rollout  # of a rollout, in an update
            update = rollout * share + seconds["micro-step"] * config.micro_steps_per_update
            text += (
                f", {scoring:.2g} s to score a rollout, {seconds['micro-step']:.2g} s for a micro-step; so an update "
                f"of {config.micro_steps_per_update} micro-steps, with its share of sampling, takes about "
                f"{update:.2g} s"
            )
        print_row("time (estimate)", text)

    def _optimizer_bytes(self) -> int | None:
        """What the optimizer keeps for the trained weights, going by what it keeps for a few; `None` if unknown."""
        trainer = self.trainer
        if trainer.optimizer is None:
            return None
        cls, kwargs = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)  # type: ignore[arg-type]
        total = 0
        for dtype in {p.dtype for p in self.trained}:
            few = torch.nn.Parameter(torch.zeros(256, 256, dtype=dtype, device=trainer.accelerator.device))
            few.grad = torch.zeros_like(few)
            try:
                optimizer = cls([few], **kwargs)
                optimizer.step()
            except (TypeError, ValueError, RuntimeError):  # one that asks for the model
                return None
            state: dict[str, Any] = optimizer.state[few]
            kept = sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))
            total += round(kept / few.numel() * sum(p.numel() for p in self.trained if p.dtype == dtype))
        return total


def print_findings(findings: Findings) -> None:
    """The verdict, after the warnings if there are any."""
    if findings.warnings:
        print("\nWarnings:")
    for text in findings.warnings:
        print(_wrapped(text, "- ", "  "))
    print("\nTraining cannot start:" if findings.refusals else "\nTraining can start.")
    for text in dict.fromkeys(findings.refusals):
        print(_wrapped(text, "- ", "  "))


def print_row(label: str, text: str) -> None:
    print(_wrapped(text, f"{label:<{LABEL}}", " " * LABEL))


def _wrapped(text: str, first: str, following: str) -> str:
    return textwrap.fill(
        " ".join(text.split()),
        WIDTH,
        initial_indent=first,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _print_table(rows: Sequence[tuple[str, ...]], notes: Sequence[str] | None = None) -> None:
    """The first column to the left, the others to the right; `notes` follow the rows."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row, note in zip(rows, notes or [""] * len(rows), strict=True):
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        print(f"    {'  '.join(cells)}  {note}".rstrip())


def _calls(rollout: Rollout) -> str:
    """How the denoiser is called at each step; guidance shows as more samples than images."""
    images, texts = len(rollout), []
    counted = Counter(samples_per_call(rollout))
    for calls, steps in counted.items():
        sizes = " and ".join(map(str, sorted(set(calls))))
        guidance = "no guidance" if sum(calls) == images else f"guidance, {sum(calls) / images:g} samples per image"
        where = f" (at {steps} steps)" if len(counted) > 1 else ""
        texts.append(f"{len(calls)} per step{where}, of {sizes} samples for {images} images: {guidance}")
    return "; ".join(texts)


def _weights(pipe: DiffusionPipeline) -> dict[str, int]:
    """Bytes of the weights of each component."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    tensors = {name: [*module.parameters(), *module.buffers()] for name, module in modules.items()}
    return {name: sum(tensor.nbytes for tensor in kept) for name, kept in tensors.items()}


def _parameters(parameters: list[torch.nn.Parameter]) -> str:
    number: float = sum(p.numel() for p in parameters)
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter} parameters, {dtypes}"
    return f"{number} parameters, {dtypes}"


def _bytes(size: int | None) -> str:
    if size is None:
        return "not measured"
    for unit, letters in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {letters}"
    return f"{size} B" if size else "-"
