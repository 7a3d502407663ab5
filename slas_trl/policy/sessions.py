"""
A session decides what happens inside one pipeline call: a [`Recording`] keeps everything, a [`Replaying`] returns what
was recorded, and runs the denoiser at a single step alone. Both take the place of the denoiser (`denoise`), of
encoders and other frozen functions (`call_frozen`), and of `scheduler.step` (`step`: prediction and x_t in, x_{t-1}
out, all `(B, ...)`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.utils import _pytree as pytree

from ..schedulers import StochasticScheduler
from .rollout import FrozenOutput, ReplayError, Rollout, Step, StepOutput


CHANGED = "Its __call__ depends on something that changed since sampling."


class Finished(Exception):
    """Ends the pipeline's call once the step that was asked for has been computed."""


class RandomSources:
    """Sources of a pipeline call's random numbers: the generators that it is given, and torch's global ones."""

    def __init__(self, generators: Sequence[torch.Generator], device: torch.device):
        self.generators, self.device = generators, device

    def states(self) -> list[torch.Tensor]:
        states = [*(generator.get_state() for generator in self.generators), torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else states

    def restore(self, states: list[torch.Tensor]) -> None:
        own = len(self.generators)
        for generator, state in zip(self.generators, states[:own], strict=True):
            generator.set_state(state.cpu())
        torch.set_rng_state(states[own].cpu())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[own + 1].cpu(), self.device)


def copied(value: Any) -> Any:
    """
    Copies of containers and tensors, the rest as it is: pipelines write into their arguments, and into what the
    denoiser and the frozen components return.
    """
    return pytree.tree_map_only(torch.Tensor, torch.clone, value)


def run_denoiser(forward: Callable, args: tuple, kwargs: dict, device_type: str) -> Any:
    """
    Call the denoiser; under autocast without its cache of casted weights, which would hide an update of the weights
    until the caller leaves the autocast context.
    """
    if not torch.is_autocast_enabled(device_type):
        return forward(*args, **kwargs)
    dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, dtype=dtype, cache_enabled=False):
        return forward(*args, **kwargs)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they are equal to the last bit; NaN, which a model may have made, is equal to itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _remembered(memo: list[FrozenOutput], random: RandomSources, name: str, function: Callable[[], Any]) -> Any:
    result = function()
    memo.append(FrozenOutput(name, result, random.states()))
    return copied(result)


class Recording:
    """Samples x_{t-1} from the step's Gaussian, and keeps what the replay needs."""

    def __init__(self, noise_generator: torch.Generator | list[torch.Generator], random: RandomSources):
        self.noise_generator, self.random = noise_generator, random
        self.steps: list[Step] = []
        self.log_probs: list[torch.Tensor] = []
        self.memo: list[FrozenOutput] = []
        self._outputs: list[Any] = []

    def denoise(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        output = run_denoiser(forward, args, kwargs, self.random.device.type)
        self._outputs.append(copied(output))
        return output

    def call_frozen(self, name: str, function: Callable[[], Any]) -> Any:
        return _remembered(self.memo, self.random, name, function)

    def step(
        self, scheduler: StochasticScheduler, model_output: torch.Tensor, sample: torch.Tensor, index: int
    ) -> torch.Tensor:
        if not self._outputs:
            raise ValueError(f"The pipeline steps at index {index} without a call of the denoiser; it has no replay.")
        mean, std = scheduler.transition(model_output, sample, index)
        if std > 0:
            if isinstance(given := self.noise_generator, list) and len(given) != len(sample):
                raise ValueError(f"Expected a noise generator for each of {len(sample)} samples, got {len(given)}.")
            noise = randn_tensor(mean.shape, generator=self.noise_generator, device=mean.device, dtype=mean.dtype)
            # Rounded to the latent's dtype before its log-probability is taken: the replay sees the rounded value.
            prev_sample = (mean + std * noise).to(sample.dtype)
            log_prob = scheduler.log_prob(mean, std, prev_sample)
        else:
            prev_sample = mean.to(sample.dtype)
            log_prob = torch.full((len(sample),), torch.nan, device=mean.device)
        # Copies, where they are not the last step's result: some pipelines write into their latents.
        unchanged = bool(self.steps) and _same(sample, self.steps[-1].prev_sample)
        kept = self.steps[-1].prev_sample if unchanged else sample.clone()
        self.steps.append(Step(index, kept, prev_sample, float(std), self._outputs))
        self.log_probs.append(log_prob)
        self._outputs = []
        return prev_sample.clone()


class Replaying:
    """Executes a recorded call again up to step `target`, and computes the policy there at the current weights."""

    def __init__(self, rollout: Rollout, target: int, grad: bool, random: RandomSources):
        self.rollout, self.target, self.grad, self.random = rollout, target, grad, random
        self.result: StepOutput | None = None
        self._step = 0  # scheduler steps so far
        self._calls = 0  # denoiser calls since the last one
        self._frozen_calls = 0  # in order of the memo

    def denoise(self, forward: Callable, args: tuple, kwargs: dict) -> Any:
        recorded = self.rollout.steps[self._step].outputs
        if self._calls >= len(recorded):
            raise ReplayError(f"Step {self._step} has more calls than the {len(recorded)} recorded. {CHANGED}")
        self._calls += 1
        if self._step < self.target:
            return copied(recorded[self._calls - 1])
        # Stays on for the pipeline's own arithmetic (guidance) until `step`; leaving the call restores it.
        torch.set_grad_enabled(self.grad)
        return run_denoiser(forward, args, kwargs, self.random.device.type)

    def call_frozen(self, name: str, function: Callable[[], Any]) -> Any:
        expected = [output.name for output in self.rollout.memo[self._frozen_calls : self._frozen_calls + 1]]
        if expected != [name]:
            raise ReplayError(f"The pipeline called {name!r} where sampling called {expected or 'nothing'}. {CHANGED}")
        output = self.rollout.memo[self._frozen_calls]
        self._frozen_calls += 1
        self.random.restore(output.random_states)  # as if the component had drawn its random numbers
        return copied(output.result)

    def step(
        self, scheduler: StochasticScheduler, model_output: torch.Tensor, sample: torch.Tensor, index: int
    ) -> torch.Tensor:
        record = self.rollout.steps[self._step]
        if index != record.index or self._calls != len(record.outputs):
            raise ReplayError(
                f"Step {self._step} was recorded at schedule index {record.index} after {len(record.outputs)} "
                f"denoiser call(s), but the replay is at index {index} after {self._calls}."
            )
        if self._step < self.target:
            self._step, self._calls = self._step + 1, 0
            return record.prev_sample.clone()
        if sample.shape != record.sample.shape or sample.dtype != record.sample.dtype:
            raise ReplayError(
                f"At step {self.target} the latents are {tuple(sample.shape)} {sample.dtype}; recorded were "
                f"{tuple(record.sample.shape)} {record.sample.dtype}."
            )
        if not _same(sample, record.sample):
            difference = (sample.float() - record.sample.float()).abs().max().item()
            between = "The pipeline changes the latents outside of scheduler.step, and not reproducibly"
            cause = between if self.target else "The initial latents are not reproducible from `generator`"
            raise ReplayError(
                f"At step {self.target} the latents differ from the recorded ones by up to {difference:.3g}. {cause}: "
                "every random number must come from `generator` or from torch's global generator."
            )
        mean, std = scheduler.transition(model_output, sample, index)
        log_prob = scheduler.log_prob(mean, std, record.prev_sample)
        self.result = StepOutput(model_output, mean, std, log_prob)
        raise Finished


class Refilling(Replaying):
    """Fills the memo of a saved rollout: calls the frozen components again, and takes every step from the record."""

    def __init__(self, rollout: Rollout, random: RandomSources):
        super().__init__(rollout, target=len(rollout.steps), grad=False, random=random)

    def call_frozen(self, name: str, function: Callable[[], Any]) -> Any:
        return _remembered(self.rollout.memo, self.random, name, function)

    def step(
        self, scheduler: StochasticScheduler, model_output: torch.Tensor, sample: torch.Tensor, index: int
    ) -> torch.Tensor:
        prev_sample = super().step(scheduler, model_output, sample, index)
        if self._step == self.target:
            raise Finished
        return prev_sample
