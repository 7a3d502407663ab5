"""Chooses the γ of each rollout, and measures what that takes; the mathematics is in `trust_region.py`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback
from transformers.utils import logging

from .. import trust_region
from ..objective import gaussian_kl
from ..policy import PipelineReplayer, Rollout
from ..policy.rollout import StepOutput
from ..trust_region import Eigenpair, FisherProduct, Vector
from .distributed import copy_full_tensor, full_tensor, gathered, reshard, world_size
from .slas_config import SLASConfig
from .trained_model import HALF_PRECISION


logger = logging.get_logger(__name__)

UPDATES_KEPT = 20  # for G
FIRST_PRODUCTS, LATER_PRODUCTS = (5, 20), (2, 6)  # at least and at most; later, from the last eigenvector
TOLERANCE = 0.05  # between rollouts, λ_max differs by more
SHIFT, NARROW_SHIFT = 0.003, 0.03  # stds by which the mean is moved for a derivative


@dataclass(frozen=True)
class GammaState:
    """The state that a checkpoint keeps. Nothing in it is changed in place, so a reference to it is a copy."""

    gamma: float
    moment: float = 0.0  # M of the rollout under way
    kls: tuple[tuple[int, float], ...] = ()  # (timestep, KL) of the last updates, at most one for each timestep
    updates: tuple[tuple[float, float], ...] = ()  # (τ, ‖g̃‖²/M) of the last UPDATES_KEPT updates, the newest last
    lambda_max: float | None = None
    vector: tuple[torch.Tensor, ...] = ()  # its eigenvector: a tensor for each parameter, sharded as that is
    measured_at: int | None = None  # number of updates before λ_max was measured
    checks_kl: bool = False  # whether the KL of the rollout's updates is measured too


@dataclass(eq=False)
class GammaControl(TrainerCallback):
    """
    Chooses γ by `args.gamma_schedule`, after the rewards of a rollout are known and before they become advantages.
    Collective: every rank must call each method, and all make the same choice. Measurements leave weights, gradients
    and random numbers as they were.
    """

    args: SLASConfig
    replayer: PipelineReplayer
    model: torch.nn.Module  # what is trained
    accelerator: Accelerator  # knows how many processes there are, and how they share the model
    log: Callable[[str, float], None]  # name and value of each figure
    FILE: ClassVar = "gamma.pt"

    def __post_init__(self):
        self.interval = self.args.fisher_interval
        self._keeps_state = self.interval is not None or self.args.gamma_schedule == "kl"  # of other rollouts
        if self.interval is not None and self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError("gamma_schedule 'trust_region' and fisher_update_steps need DDP or FSDP2, not DeepSpeed.")
        self.reset()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Not cached: FSDP replaces the parameter objects."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def reset(self) -> None:
        """Back to the state before training."""
        self.state = GammaState(gamma=self.args.gamma)
        self._finished = self.state  # after the last finished update, which a checkpoint goes on from
        self._seen: tuple[Rollout, int, torch.Tensor, torch.Tensor] | None = None  # a micro-step: its mean and std
        self._norm = math.nan  # of the gradient
        self._before: list[torch.Tensor] = []  # the weights before the update

    def choose(self, x: torch.Tensor, chunks: list[Rollout], steps: list[int], update: int) -> float:
        """
        γ for a rollout, by the scaled rewards `x` `(N,)` of all processes around the mean of each group, the chunks of
        this process, the trained timesteps, and the number of updates before.
        """
        if self.interval is not None:
            last = self.state.measured_at
            if due := last is None or update - last >= self.interval:
                self._measure_fisher(chunks, steps)
            self.state = replace(self.state, checks_kl=due, measured_at=update if due else last)
        gamma = gathered(self._choose(x))[0]
        self.state = replace(self.state, gamma=gamma)
        return gamma

    def note_rollout(self, x: torch.Tensor) -> None:
        """Keep the moment of the scaled rewards `(N,)`, around the baseline that they are shaped by."""
        self.state = replace(self.state, moment=trust_region.reward_moment(x, self.state.gamma))
        if self.interval is not None:
            self.log("trust_region/moment", self.state.moment)

    def _choose(self, x: torch.Tensor) -> float:
        args, state = self.args, self.state
        bound = None if self.interval is None else self._bound(x)
        match args.gamma_schedule:
            case "ess":
                return trust_region.largest_gamma_of_share(x, args.min_effective_share, args.gamma_max)
            case "kl" if state.kls:
                kl = sum(kl for _, kl in state.kls) / len(state.kls)
                return trust_region.kl_feedback(state.gamma, kl, args.allowed_kl, args.gamma_max)
            case "trust_region" if bound is not None:
                return bound
        return args.gamma if args.gamma_schedule == "constant" else state.gamma

    def _bound(self, x: torch.Tensor) -> float | None:
        """The largest γ whose moment is within the budget; `None` before the first update, and where all x are 0."""
        state, top = self.state, self.args.gamma_max
        if state.lambda_max is None:
            return None
        self.log("trust_region/lambda_max", state.lambda_max)
        if not state.updates or not x.any():
            return None
        tau, g_max = max(state.updates, key=lambda each: each[0] ** 2 * each[1])  # the longest step for its M
        budget = trust_region.kl_budget(self.args.allowed_kl, tau, state.lambda_max, g_max)
        bound = trust_region.largest_gamma(x, budget, top)
        for name, value in (("tau", tau), ("g_max", g_max), ("budget", budget), ("gamma_bound", bound)):
            self.log(f"trust_region/{name}", value)
        bounded = trust_region.gamma_bound_bounded(budget, x.abs().max().item())
        sub_gaussian = trust_region.gamma_bound_sub_gaussian(budget, trust_region.sub_gaussian_norm(x))
        for name, admissible in (("bounded", bounded), ("sub_gaussian", sub_gaussian)):
            self.log(f"trust_region/gamma_bound_{name}", max(0.0, min(top, admissible.high)))  # 0 where there is none
        return bound

    def _measure_fisher(self, chunks: list[Rollout], steps: list[int]) -> None:
        """λ_max over the first chunk of each process, at the first and the last of the trained steps."""
        finite = [chunk for chunk in chunks if chunk.log_probs[:, steps].isfinite().all()]
        chunk = (finite or chunks)[0]
        policies = [partial(self._policy, chunk, step) for step in sorted({min(steps), max(steps)})]
        if self.accelerator.is_fsdp2:  # within the Trainer's no_sync, but these gradients are to be averaged
            cast(FSDPModule, self.model).set_requires_gradient_sync(True)
        try:
            found = self._largest_eigenvalue(policies, chunk.steps[0].sample.numel())
        finally:
            if self.accelerator.is_fsdp2:
                cast(FSDPModule, self.model).set_requires_gradient_sync(self.accelerator.sync_gradients)
        if 0 < found.value < math.inf:
            self.state = replace(self.state, lambda_max=found.value, vector=tuple(found.vector))
        else:
            logger.warning("The Fisher matrix of this rollout is 0 or not finite; its last eigenvalue is kept.")

    def _largest_eigenvalue(self, policies: Sequence[Callable[[], StepOutput]], elements: int) -> Eigenpair:
        start, curvature, (least, most) = list(self.state.vector), self.state.lambda_max or 0.0, LATER_PRODUCTS
        if not start:
            # The gradient of the log-probability of what was sampled is random, as its noise was, and in the image of
            # Jᵀ: a start that needs no random vector. Its square is the trace of H on average.
            start = [torch.zeros_like(parameter) for parameter in self.parameters]
            for policy in policies:
                for part, gradient in zip(start, self._gradients(policy().log_prob.mean()), strict=True):
                    part += gradient
            curvature = self._inner(start, start) * elements * world_size() / len(policies)
            least, most = FIRST_PRODUCTS
        if not 0 < curvature < math.inf:
            return Eigenpair(curvature, start, 0)
        # Small differences are lost where the mean is computed in half precision.
        dtypes = {parameter.dtype for parameter in self.model.parameters()}
        is_narrow = self.accelerator.mixed_precision != "no" or not dtypes.isdisjoint(HALF_PRECISION.values())
        by: dict[str, Any] = {"gradients": self._gradients, "inner": self._inner}
        product = FisherProduct(policies, self.parameters, curvature, **by, shift=NARROW_SHIFT if is_narrow else SHIFT)
        bounds: dict[str, Any] = {"min_products": least, "max_products": most, "tolerance": TOLERANCE}
        return trust_region.power_iteration(product, start, **bounds, inner=self._inner)

    def _policy(self, rollout: Rollout, step: int) -> StepOutput:
        output = self.replayer.replay(rollout, step)
        if not torch.is_grad_enabled():
            reshard(self.model)
        return output

    def _gradients(self, scalar: torch.Tensor) -> Vector:
        """Mean over the processes. By `backward`, which FSDP needs; before an update there are no other gradients."""
        scalar.backward()
        found = []
        for parameter in self.parameters:
            found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        if world_size() > 1 and not self.accelerator.is_fsdp2:
            for gradient in found:
                dist.all_reduce(gradient)
                gradient.div_(world_size())
        return found

    def _inner(self, a: Vector, b: Vector) -> float:
        """That of the first process: decisions that follow from it must not differ in a last bit."""
        total: Any = sum((x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True))
        return gathered(full_tensor(total).item())[0]

    def on_step_begin(self, args, state, control, **kwargs):
        self._seen = None

    def note_micro_step(self, rollout: Rollout, step: int, policy: StepOutput) -> None:
        """Keep one micro-step of the update, for its KL: at the timestep that was measured the longest ago."""
        if self.args.gamma_schedule != "kl" and not self.state.checks_kl:
            return
        last = {measured: i for i, (measured, _) in enumerate(self.state.kls)}
        if self._seen is None or last.get(step, -1) < last.get(self._seen[1], -1):
            self._seen = rollout, step, policy.mean.detach(), policy.std

    def note_gradient(self, norm: Any) -> None:
        """‖g̃‖ before clipping; NaN or infinite where the update is skipped."""
        self._norm = math.nan if norm is None else float(norm)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.interval is not None and 0 < self._norm < math.inf:
            self._before = [parameter.detach().clone() for parameter in self.parameters]

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._before:
            change = [parameter.detach() - old for parameter, old in zip(self.parameters, self._before, strict=True)]
            self._note_change(math.sqrt(self._inner(change, change)))
            self._before = []
        if self._seen is not None and math.isfinite(self._norm):
            self._measure_kl(*self._seen)
        self._seen = None

    def _note_change(self, length: float) -> None:
        if not 0 < length < math.inf:  # float16 looks for its loss scale
            return
        if self.state.moment > 0:
            tau_and_g = length / self._norm, self._norm**2 / self.state.moment
            self.state = replace(self.state, updates=(*self.state.updates, tau_and_g)[-UPDATES_KEPT:])
        if self.state.lambda_max is not None:
            self.log("trust_region/kl_bound", self.state.lambda_max * length**2 / 2)

    @torch.no_grad()
    def _measure_kl(self, rollout: Rollout, step: int, mean: torch.Tensor, std: torch.Tensor) -> None:
        kls = gathered(gaussian_kl(mean, self._policy(rollout, step).mean, std).mean().item())
        kl = sum(kls) / len(kls)
        if math.isfinite(kl):
            self.log("trust_region/kl", kl)
            self.state = replace(self.state, kls=(*self.state.kls, (step, kl))[-self.args.num_trained_timesteps :])

    def on_step_end(self, args, state, control, **kwargs):
        self._finished = self.state

    on_train_begin = on_step_end

    def save(self, folder: Path, writes: bool) -> None:
        """The eigenvector may be sharded, so every rank must call this; the one that `writes` writes."""
        if not self._keeps_state:
            return
        vector = [full_tensor(part).cpu() for part in self._finished.vector]
        if writes:
            # Not by asdict, which would copy the vector.
            figures = {field.name: getattr(self._finished, field.name) for field in fields(GammaState)}
            torch.save({**figures, "vector": vector, "schedule": self.args.gamma_schedule}, folder / self.FILE)

    def load(self, folder: Path) -> None:
        """Does nothing if the checkpoint has no state of γ; another schedule starts from `args.gamma`."""
        if not self._keeps_state or not (folder / self.FILE).exists():
            return
        saved = torch.load(folder / self.FILE, map_location="cpu", weights_only=True)
        if saved.pop("schedule") != self.args.gamma_schedule:
            saved["gamma"] = self.args.gamma
        vector = saved.pop("vector")
        parts = [torch.zeros_like(parameter) for parameter in self.parameters] if vector else []
        for target, source in zip(parts, vector, strict=True):
            copy_full_tensor(target, source)
        self.state = self._finished = GammaState(**saved, vector=tuple(parts))
