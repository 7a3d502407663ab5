"""Pipelines with two denoisers, of which each step calls one."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Experts(nn.Module):
    """Several denoisers as the one model that the Trainer knows; the first argument of a call names one of them."""

    def __init__(self, denoisers: Mapping[str, nn.Module]):
        super().__init__()
        for name, denoiser in denoisers.items():
            self.add_module(name, denoiser)

    def forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.get_submodule(name)(*args, **kwargs)


def as_model(denoisers: Mapping[str, nn.Module]) -> nn.Module:
    """The one denoiser, or [`Experts`]."""
    return next(iter(denoisers.values())) if len(denoisers) == 1 else Experts(denoisers)


def calls_of(model: Any, names: list[str]) -> dict[str, Callable[..., Any]]:
    """
    What to call for each denoiser, given the model of [`as_model`] or its FSDP or compiled form. Of its DDP form, the
    plain model: DDP allows for one call with each backward pass, but guidance may take two, of other layers each.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return {names[0]: model} if len(names) == 1 else {name: partial(model, name) for name in names}
