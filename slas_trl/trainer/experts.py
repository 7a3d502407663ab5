"""Pipelines with two denoisers, of which each step calls one."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn


class Experts(nn.Module):
    """
    Several denoisers as the one model that the Trainer knows; the first argument of a call names one of them.

    Attributes:
        called (`set[str]`): those that were called with gradients since it was last emptied.
    """

    def __init__(self, denoisers: Mapping[str, nn.Module]):
        super().__init__()
        self.called: set[str] = set()
        for name, denoiser in denoisers.items():
            self.add_module(name, denoiser)

    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """Trained parameters of the denoisers that were not called."""
        for name, denoiser in self.named_children():
            if name not in self.called:
                yield from (p for p in denoiser.parameters() if p.requires_grad)

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            self.called.add(name)
        return self.get_submodule(name)(*args, **kwargs)


def as_model(denoisers: Mapping[str, nn.Module]) -> nn.Module:
    """The one denoiser, or [`Experts`]."""
    return next(iter(denoisers.values())) if len(denoisers) == 1 else Experts(denoisers)


def calls_of(model: Any, names: list[str]) -> dict[str, Callable[..., Any]]:
    """What to call for each denoiser, given the model of [`as_model`] or its DDP, FSDP or compiled form."""
    return {names[0]: model} if len(names) == 1 else {name: partial(model, name) for name in names}
