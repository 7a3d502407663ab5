"""
A diffusers pipeline is its own policy: sampling is one recorded `__call__`, training executes the same call again.

Sampling runs the pipeline unmodified, with a stochastic scheduler and a proxy in place of the denoiser. Training on
step n runs it again with the same arguments: the denoiser is called, with gradients, at step n alone; the outputs of
earlier steps and of frozen components (text encoders, VAE) come from the record; at step n the pipeline's own
prediction, guidance and all, gives the log-probability of the recorded x_{t-1}, and the call ends there. So nothing
has to be known about the pipeline.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import AutoencoderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..schedulers import StochasticScheduler, stochastic_scheduler
from .checks import RatioReport, check_pipeline, denoisers_of
from .pictures import call_pipeline, replaced
from .rollout import ReplayError, Rollout, StepOutput
from .sessions import CHANGED, Finished, RandomSources, Recording, Refilling, Replaying, copied


ATTENTION = (Attention, AttentionModuleMixin)

# Methods whose results do not depend on the denoiser. Recorded whole: tokenizers and encoders are not needed again.
FROZEN_METHODS = ("encode_prompt", "encode_image", "_encode_vae_image", "prepare_image_latents")


class DenoiserProxy:
    """
    Takes the denoiser's place in the pipeline: attributes come from the plain module, calls go to the session, which
    calls `forward` (the same module, or its DDP, FSDP or compiled form).
    """

    def __init__(self, module: nn.Module, forward: Callable, session: Recording | Replaying):
        self._module, self._forward, self._session = module, forward, session

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._module, attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._session.denoise(self._forward, args, kwargs)


class PipelineReplayer:
    """
    Sample from a pipeline and evaluate the policy of any recorded step, with gradients.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]):
            Any pipeline with a `transformer` or `unet` and one `scheduler.step` per denoising step. It is left as it
            was found after every call.
        scheduler ([`~slas_trl.schedulers.StochasticScheduler`], *optional*):
            The step policy. By default `pipe.scheduler`, converted unless it is one of ours.

    Raises `ValueError` when the pipeline cannot be a policy (no denoiser, a cache or dropout is active, ...).

    Example:

    ```python
    replayer = PipelineReplayer(pipe)
    rollout = replayer.sample(prompt=["a red circle"] * 8, num_inference_steps=10)
    step = replayer.replay(rollout, rollout.trainable_steps[0])
    step.log_prob.mean().backward()
    ```
    """

    def __init__(self, pipe: DiffusionPipeline, scheduler: StochasticScheduler | None = None):
        check_pipeline(pipe)
        if scheduler is not None and not isinstance(scheduler, StochasticScheduler):
            raise TypeError(f"Expected a FlowSDEScheduler or DDIMSDEScheduler, got {type(scheduler).__name__}.")
        self.pipe: Any = pipe  # DiffusionPipeline itself declares no __call__
        if scheduler is None:
            own = pipe.scheduler
            scheduler = own if isinstance(own, StochasticScheduler) else stochastic_scheduler(pipe)
        self.scheduler = scheduler
        # To call for each denoiser, by component name; the trainer puts the DDP or FSDP form of the module here.
        self.models: dict[str, Callable] = dict(denoisers_of(pipe))

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(next(iter(denoisers_of(self.pipe).values())).parameters()).device

    @torch.no_grad()
    def sample(
        self, *, noise_generator: torch.Generator | Sequence[torch.Generator] | None = None, **call: Any
    ) -> Rollout:
        """
        Call the pipeline once and record it.

        Args:
            noise_generator (`torch.Generator` or a list of them, *optional*):
                Source of the steps' noise, one for all images or one for each; the pipeline's `generator` draws the
                initial latents. With one for each, an image does not depend on the others in its call. By default
                derived from the state of the (first) `generator`, or else from torch's global generator.
            **call: arguments of the pipeline's `__call__`.

        Raises:
            `ValueError`: when the pipeline does not take one step for each image and denoising step.
        """
        call = copied(call)  # the pipeline and the caller may write into it
        generators = _as_list(call.get("generator"))
        random = RandomSources(generators, self.device)
        recording = Recording(_noise_source(noise_generator, generators), random)
        random_states = random.states()
        with self._installed(recording, self.models):
            output, problems = call_pipeline(self.pipe, copied(call))
        if not recording.steps:
            raise ValueError(f"{type(self.pipe).__name__} finished without calling scheduler.step: it has no steps.")
        images, samples, name = output[0], len(recording.log_probs[0]), type(self.pipe).__name__
        if len(images) != samples:
            raise ValueError(f"{name} denoises {samples} samples for {len(images)} images; expected one for each.")
        return Rollout(
            images=images,
            problems=problems,
            log_probs=torch.stack(recording.log_probs, dim=1),
            trainable_steps=tuple(i for i, step in enumerate(recording.steps) if step.std > 0),
            steps=recording.steps,
            call=call,
            random_states=random_states,
            window=self.scheduler.window,
            memo=recording.memo,
        )

    def replay(self, rollout: Rollout, step: int, models: Mapping[str, Callable] | None = None) -> StepOutput:
        """
        The policy of one recorded step at the current weights.

        It equals that of sampling to the last bit only if the same parameters require gradients: torch chooses its
        kernels for matrix products by that, with gradients enabled or not.

        Args:
            rollout ([`Rollout`]): from [`~PipelineReplayer.sample`].
            step (`int`): one of `rollout.trainable_steps`.
            models (`dict[str, Callable]`, *optional*): other denoisers than `self.models`, by component name.

        Returns a [`StepOutput`], with gradients unless called under `torch.no_grad`.

        Raises:
            `ReplayError`: when the pipeline does not do what it did while sampling; the message says what differs.
            `ValueError`: when the step has no density.
        """
        if step not in rollout.trainable_steps:
            raise ValueError(f"Step {step} has no density; the trainable ones are {list(rollout.trainable_steps)}.")
        models = models or {}
        if unknown := models.keys() - self.models.keys():
            raise ValueError(f"models has {sorted(unknown)}, but the pipeline's denoisers are {list(self.models)}.")
        call, random = self._again(rollout)
        replaying = Replaying(rollout, step, torch.is_grad_enabled(), random)
        self._execute(rollout, call, replaying, {**self.models, **models})
        if replaying.result is None:
            raise ReplayError(f"The pipeline ended before step {step} of {len(rollout.steps)} recorded. {CHANGED}")
        return replaying.result

    @torch.no_grad()
    def reference(
        self,
        rollout: Rollout,
        step: int,
        models: Mapping[str, Callable] | None = None,
        adapter: str | None = None,
        instead: str | None = None,
    ) -> StepOutput:
        """
        The same step under the reference policy, without gradients: without `adapter` (by default, without any), or
        with the adapter `instead` in its place, or by the denoisers in `models` (frozen copies, for full fine-tuning).
        """
        if models is not None:
            return self.replay(rollout, step, models)
        with self.without_adapter(adapter, instead):
            return self.replay(rollout, step)

    @contextmanager
    def without_adapter(self, adapter: str | None = None, instead: str | None = None) -> Iterator[None]:
        """
        Within, the denoisers are without `adapter` (by default, without any), or with the adapter `instead` in its
        place. Raises `ValueError` if there is none to disable.
        """
        modules = (module for denoiser in denoisers_of(self.pipe).values() for module in denoiser.modules())
        adapted = [layer for layer in modules if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters]
        if not adapted:
            raise ValueError("The denoiser has no adapter to disable; pass `models` with a frozen copy of it.")
        # Not by peft's methods for it, which set requires_grad too, of frozen adapters as well.
        active = [list(layer.active_adapters) for layer in adapted]
        others = [] if instead is None else [instead]
        for layer, names in zip(adapted, active, strict=True):
            layer._active_adapter = others + ([] if adapter is None else [name for name in names if name != adapter])
        try:
            yield
        finally:
            for layer, names in zip(adapted, active, strict=True):
                layer._active_adapter = names

    @torch.no_grad()
    def restore(self, state: dict[str, Any], call: dict[str, Any]) -> Rollout:
        """
        A rollout from its [`~Rollout.state`] and the arguments of the call that sampled it. The states of generators
        come from `state`, not from `call`. The frozen components are called once more.
        """
        rollout = Rollout.from_state(state, call)
        call, random = self._again(rollout)
        self._execute(rollout, call, Refilling(rollout, random), self.models)
        return rollout

    def _again(self, rollout: Rollout) -> tuple[dict[str, Any], RandomSources]:
        """The arguments of the call that sampled `rollout`, with new generators, and its sources of random numbers."""
        call = copied(rollout.call)
        given = call.get("generator")
        generators = [torch.Generator(generator.device) for generator in _as_list(given)]
        if generators:
            call["generator"] = generators if isinstance(given, (list, tuple)) else generators[0]
        return call, RandomSources(generators, self.device)

    def _execute(
        self, rollout: Rollout, call: dict[str, Any], session: Replaying, models: Mapping[str, Callable]
    ) -> None:
        """Call the pipeline as it was called for `rollout`, until the session ends the call."""
        window, self.scheduler.window = self.scheduler.window, rollout.window
        try:
            # The outer contexts restore the caller's grad mode and random numbers.
            with (
                torch.set_grad_enabled(torch.is_grad_enabled()),
                torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []),
                self._installed(session, models),
            ):
                session.random.restore(rollout.random_states)
                self.pipe(**call)
        except Finished:
            pass
        finally:
            self.scheduler.window = window

    @contextmanager
    def _installed(self, session: Recording | Replaying, models: Mapping[str, Callable]) -> Iterator[None]:
        """The pipeline with our scheduler, proxies and recorded components; restored on the way out."""
        pipe, cls = self.pipe, type(self.pipe)
        depth = 0

        def recorded(name: str, function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal depth
                if depth:  # inside another recorded call, whose whole result is kept
                    return function(*args, **kwargs)
                depth += 1
                try:
                    return session.call_frozen(name, lambda: function(*args, **kwargs))
                finally:
                    depth -= 1

            return call

        device, denoisers, components = self.device, denoisers_of(pipe), pipe.components
        attributes: dict[str, Any] = {
            "scheduler": self.scheduler,
            "_progress_bar_config": {**pipe.__dict__.get("_progress_bar_config", {}), "disable": True},
        }
        for name, module in denoisers.items():
            attributes[name] = DenoiserProxy(module, models[name], session)
        for name in FROZEN_METHODS:
            if name in dir(cls):
                attributes[name] = recorded(name, getattr(pipe, name))
        # All of the pipeline's attributes are restored: a call leaves its guidance scale and the like behind.
        pipe_before, frozen = dict(pipe.__dict__), ExitStack()
        # Some kinds of guidance replace attention processors, and restore them only at the end of the call.
        layers = [layer for module in denoisers.values() for layer in module.modules()]
        processors = [(layer, layer.processor) for layer in layers if isinstance(layer, ATTENTION)]
        self.scheduler.controller = session
        try:
            pipe.__dict__.update(attributes)
            for name, component in components.items():
                if isinstance(component, nn.Module) and name not in denoisers:
                    method = "encode" if isinstance(component, AutoencoderMixin) else "forward"
                    proxy = recorded(f"{name}.{method}", getattr(component, method))
                    frozen.enter_context(replaced(component, method, proxy))
            # The pipeline works on the denoiser's device: encoders may be on another, even on "meta".
            located = {"device": property(lambda _: device), "_execution_device": property(lambda _: device)}
            pipe.__class__ = type(cls.__name__, (cls,), {**located, "__module__": cls.__module__})
            yield
        finally:
            pipe.__class__ = cls
            self.scheduler.controller = None
            pipe.__dict__.clear()
            pipe.__dict__.update(pipe_before)
            for layer, processor in processors:
                if layer.processor is not processor:
                    layer.set_processor(processor)
            frozen.close()


def measure_ratio(replayer: PipelineReplayer, rollout: Rollout, steps: Sequence[int] | None = None) -> RatioReport:
    """
    Replay the given steps (by default all trainable ones) and compare with the recorded log-probabilities.

    Gradients stay as the caller has them, since kernels may differ with and without them. Samples whose recorded
    log-probability is NaN are left out, unless all are.
    """
    deviations = {}
    for step in rollout.trainable_steps if steps is None else steps:
        recorded = rollout.log_probs[:, step]
        deviation = (torch.exp(replayer.replay(rollout, step).log_prob.detach() - recorded) - 1).abs()
        finite = deviation[recorded.isfinite()]
        deviations[step] = (finite if len(finite) else deviation).max().item()
    return RatioReport(deviations)


def _as_list(generator: torch.Generator | Sequence[torch.Generator] | None) -> list[torch.Generator]:
    if generator is None:
        return []
    return [generator] if isinstance(generator, torch.Generator) else list(generator)


def _noise_source(
    noise_generator: torch.Generator | Sequence[torch.Generator] | None, generators: list[torch.Generator]
) -> torch.Generator | list[torch.Generator]:
    """The given generator(s), or else one that follows from the first of `generators` without advancing it."""
    if noise_generator is not None:
        return noise_generator if isinstance(noise_generator, torch.Generator) else list(noise_generator)
    # A copy: the pipeline's generator must draw the same initial latents as in a plain call.
    source = torch.Generator(generators[0].device).set_state(generators[0].get_state()) if generators else None
    seed = torch.randint(2**62, (), generator=source, device=source.device if source else "cpu")
    return torch.Generator().manual_seed(int(seed))
