"""
Work of several processes together. A collective call that one process leaves out hangs the others, so collectives are
made here, beside those of the denoiser's own DDP or FSDP form, and every rank must call them:

- once a rollout: errors in reading its rows; errors and scores of the rewards (`raise_together`, `gathered`); its γ;
  and the verdict of the pre-flight check
- once an update: whether one was interrupted; the gradients (`average_gradients`, in place of DDP's own); which images
  made an update unusable (the norm of the gradients is the same for all by then); its length and KL, where γ depends
  on them
- every so many rollouts, where γ depends on it: the products and inner products of the Fisher matrix (`gamma.py`)
- once a log: the means of the metrics
- while something is pushed: once a minute, whether it is done (`wait_together`)
- once a checkpoint: sharded weights (`full_tensor`), and the Trainer's barriers

The numbers of micro-steps, and of pipeline calls in evaluation, are equal before they start. A reward that raises
does so after `gathered` has told all processes, which then raise together.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    values: list[T] = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def raise_together(error: Exception | None, before: Callable[[], None] | None = None) -> None:
    """
    Raise the error of a process there and, with its message, on all other ranks; all call `before` first. Nothing
    happens where no process has one.
    """
    errors = gathered(None if error is None else str(error))
    if all(message is None for message in errors):
        return
    if before is not None:
        before()
    if error is not None:
        raise error
    rank, message = next((rank, message) for rank, message in enumerate(errors) if message is not None)
    raise ValueError(f"On process {rank} of {len(errors)}: {message}")


def wait_together(done: Callable[[], bool]) -> None:
    """
    Until `done()`, which itself waits for a minute at most, is true of all: NCCL ends processes that one call keeps
    waiting for half an hour, which an upload may take.
    """
    while not all(gathered(done())):
        pass


def check_sharding(accelerator: Accelerator, is_fsdp: bool, denoisers: int) -> None:
    """Raises `ValueError` for ways to share a model between processes that are not supported."""
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError("DeepSpeed's ZeRO-3 is not supported; FSDP2 shards weights too (accelerate_config fsdp2).")
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not is_fsdp:
        raise ValueError("FSDP does not shard over CPUs; use DDP (accelerate_config multi_gpu) or GPUs.")
    if is_fsdp and not accelerator.is_fsdp2:
        raise ValueError("FSDP of version 1 is not supported; set fsdp_version: 2 (accelerate_config fsdp2).")
    if is_fsdp and denoisers > 1:
        raise ValueError(f"FSDP cannot shard {denoisers} denoisers as one; use DDP (accelerate_config multi_gpu).")


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes; one that some do not have counts as 0 there."""
    trained = [p for p in parameters if p.requires_grad]
    has_gradient = torch.tensor([p.grad is not None for p in trained], dtype=torch.uint8, device=trained[0].device)
    dist.all_reduce(has_gradient, op=dist.ReduceOp.MAX)
    for parameter, anywhere in zip(trained, has_gradient.tolist(), strict=True):
        if anywhere:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(world_size())


def reshard(model: torch.nn.Module) -> None:
    """After a forward pass that no backward follows, FSDP leaves its root's parameters whole, and others in place."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or all of a sharded one. Collective: every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_full_tensor(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy `source`, which every process has whole, into a tensor that may be sharded."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)
