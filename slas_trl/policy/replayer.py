"""
A diffusers pipeline is its own policy: sampling is one recorded `__call__`, training executes the same call again.

Sampling runs the pipeline unmodified, with a stochastic scheduler and a proxy in place of the denoiser. Training on
step n runs it again with the same arguments: the denoiser is really called, with gradients, at step n alone; earlier
steps and frozen components (text encoders, VAE) answer from the record; at step n the pipeline's own prediction,
guidance and all, gives the log-probability of the recorded x_{t-1}, and the call ends there. So nothing has to be
known about the pipeline.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import AutoencoderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..schedulers import StochasticScheduler, stochastic_scheduler
from .doctor import check_pipeline, denoisers_of
from .pictures import call_pipeline
from .rollout import ReplayError, Rollout, StepOutput
from .sessions import Finished, RandomSources, Recording, Refilling, Replaying, Session, copied


ATTENTION = (Attention, AttentionModuleMixin)

# Methods whose results do not depend on the denoiser; memorised whole, so that tokenizers and encoders can be away.
FROZEN_METHODS = ("encode_prompt", "encode_image", "_encode_vae_image", "prepare_image_latents")


class DenoiserProxy:
    """
    Stands where the pipeline expects its denoiser: attributes come from the plain module, calls go to the session,
    which calls `forward` (the same module, or its DDP, FSDP or compiled form).
    """

    def __init__(self, module: nn.Module, forward: Callable, session: Session):
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

    Attributes:
        models (`dict[str, Callable]`): what to call for each denoiser, by component name; the trainer puts the DDP or
            FSDP form of the module here.

    Raises:
        `ValueError`: when the pipeline cannot be a policy (no denoiser, a cache or dropout is active, ...).

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
            raise TypeError(
                f"scheduler must be a FlowSDEScheduler or a DDIMSDEScheduler, but it is a {type(scheduler).__name__}. "
                "Leave it out to convert the pipeline's own."
            )
        self.pipe: Any = pipe  # DiffusionPipeline itself declares no __call__
        if scheduler is None:
            own = pipe.scheduler
            scheduler = own if isinstance(own, StochasticScheduler) else stochastic_scheduler(pipe)
        self.scheduler = scheduler
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
                Source of the steps' noise, one for all images or one for each, apart from the pipeline's `generator`,
                which draws the initial latents. With one for each, an image does not depend on the others in its
                call. By default derived from the state of the (first) `generator`, else from torch's global generator.
            **call: arguments of the pipeline's `__call__`.

        Returns:
            [`Rollout`]

        Raises:
            `ValueError`: when the pipeline does not take one step for each image and denoising step.
        """
        call = copied(call)  # as given, whatever the pipeline and the caller do to it
        generators = _as_list(call.get("generator"))
        random = RandomSources(generators, self.device)
        recording = Recording(_noise_source(noise_generator, generators), random)
        random_states = random.states()
        with self._installed(recording, self.models):
            output, problems = call_pipeline(self.pipe, copied(call))
        if not recording.steps:
            raise ValueError(
                f"{type(self.pipe).__name__} finished without calling scheduler.step, so it has no steps to train."
            )
        images, samples = output[0], len(recording.log_probs[0])
        if len(images) != samples:
            raise ValueError(
                f"{type(self.pipe).__name__} denoises {samples} samples for {len(images)} images; expected one for "
                "each image."
            )
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
        The policy of one recorded step at the present weights.

        To the last bit it is that of sampling only if the same parameters require gradients as did then: torch chooses
        between matrix products by that, with gradients enabled or not.

        Args:
            rollout ([`Rollout`]): from [`~PipelineReplayer.sample`].
            step (`int`): one of `rollout.trainable_steps`.
            models (`dict[str, Callable]`, *optional*): other denoisers than `self.models`, by component name.

        Returns:
            [`StepOutput`]: with gradients, unless called under `torch.no_grad`.

        Raises:
            `ReplayError`: when the pipeline does not do what it did while sampling; the message says what differs.
            `ValueError`: when the step has no density.
        """
        if step not in rollout.trainable_steps:
            raise ValueError(
                f"Step {step} has no density; the trainable steps of this rollout are {list(rollout.trainable_steps)}."
            )
        models = models or {}
        if unknown := models.keys() - self.models.keys():
            raise ValueError(f"models has {sorted(unknown)}, but the pipeline's denoisers are {list(self.models)}.")
        call, random = self._again(rollout)
        replaying = Replaying(rollout, step, torch.is_grad_enabled(), random)
        self._execute(rollout, call, replaying, {**self.models, **models})
        if replaying.result is None:
            raise ReplayError(
                f"The pipeline returned before step {step}; {len(rollout.steps)} steps were recorded. Its __call__ "
                "depends on something that changed since sampling."
            )
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
        The same step under the reference policy, without gradients: without `adapter` (by default, without any), with
        the adapter `instead` in its place, or by the denoisers in `models` (frozen copies, for full fine-tuning).
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
        # Not by the methods for it, which also set requires_grad, frozen adapters' too.
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
        A rollout from its [`~Rollout.state`] and the arguments of the call that sampled it, of which generators are
        only counted: their states are in `state`. The frozen components are called once more.
        """
        rollout = Rollout.from_state(state, call)
        call, random = self._again(rollout)
        self._execute(rollout, call, Refilling(rollout, random), self.models)
        return rollout

    def _again(self, rollout: Rollout) -> tuple[dict[str, Any], RandomSources]:
        """The arguments of the call that sampled `rollout`, with generators of their own, and what it draws from."""
        call = copied(rollout.call)
        given = call.get("generator")
        generators = [torch.Generator(generator.device) for generator in _as_list(given)]
        if generators:
            call["generator"] = generators if isinstance(given, (list, tuple)) else generators[0]
        return call, RandomSources(generators, self.device)

    def _execute(
        self, rollout: Rollout, call: dict[str, Any], session: Replaying, models: Mapping[str, Callable]
    ) -> None:
        """Call the pipeline as it was called for `rollout`, until the session has had enough."""
        window, self.scheduler.window = self.scheduler.window, rollout.window
        try:
            # The outer contexts give the caller's grad mode and random numbers back, whatever the pipeline does.
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
    def _installed(self, session: Session, models: Mapping[str, Callable]) -> Iterator[None]:
        """The pipeline with our scheduler, proxies and memorised components; restored on the way out."""
        pipe, cls = self.pipe, type(self.pipe)
        depth = 0

        def memorised(name: str, function: Callable) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal depth
                if depth:  # inside another memorised call, which keeps the whole result
                    return function(*args, **kwargs)
                depth += 1
                try:
                    return session.frozen(name, lambda: function(*args, **kwargs))
                finally:
                    depth -= 1

            return call

        device, denoisers = self.device, denoisers_of(pipe)
        attributes: dict[str, Any] = {
            "scheduler": self.scheduler,
            "_progress_bar_config": {**pipe.__dict__.get("_progress_bar_config", {}), "disable": True},
        }
        for name, module in denoisers.items():
            attributes[name] = DenoiserProxy(module, models[name], session)
        for name in FROZEN_METHODS:
            if name in dir(cls):
                attributes[name] = memorised(name, getattr(pipe, name))
        methods: list[tuple[dict[str, Any], str, Callable]] = []
        for name, component in pipe.components.items():
            if isinstance(component, nn.Module) and name not in denoisers:
                method = "encode" if isinstance(component, AutoencoderMixin) else "forward"
                methods.append((component.__dict__, method, memorised(f"{name}.{method}", getattr(component, method))))

        # Straight into __dict__: nn.Module and DiffusionPipeline would register what is assigned to them. All of the
        # pipeline's is put back, for a call leaves its guidance scale and the like behind.
        pipe_before = dict(pipe.__dict__)
        methods_before = [(namespace, name, namespace.get(name)) for namespace, name, _ in methods]
        # Some kinds of guidance exchange these, and put them back only at the end of the call.
        layers = [layer for module in denoisers.values() for layer in module.modules()]
        processors = [(layer, layer.processor) for layer in layers if isinstance(layer, ATTENTION)]
        self.scheduler.controller = session
        try:
            pipe.__dict__.update(attributes)
            for namespace, name, method in methods:
                namespace[name] = method
            # Encoders may be elsewhere, even on "meta"; the pipeline works where the denoiser is.
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
            for namespace, name, method in methods_before:
                if method is None:
                    namespace.pop(name, None)
                else:
                    namespace[name] = method


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
    # Of a copy: the pipeline's own must draw the same initial latents as in a plain call.
    source = torch.Generator(generators[0].device).set_state(generators[0].get_state()) if generators else None
    seed = torch.randint(2**62, (), generator=source, device=source.device if source else "cpu")
    return torch.Generator().manual_seed(int(seed))
