"""What is sampled when: the order of prompts, and the seed of every random number of a rollout."""

from collections.abc import Iterator

import numpy as np
import torch
from trl.trainer.utils import RepeatSampler

from .slas_config import SLASConfig


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler, in an order that depends on seed and epoch alone, so that a resumed run sees the same prompts."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + self.epoch)
        return super().__iter__()


# Streams of random numbers; each image, group or rollout has its own in each.
INITIAL_NOISE, STEP_NOISE, TIMESTEPS, EVALUATION = range(4)


def seed_for(*key: int) -> int:
    """A 63-bit seed from integers, such as (seed, stream, rollout, image); well mixed, the same on every machine."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generators(keys: list[tuple[int, ...]]) -> list[torch.Generator]:
    """One CPU generator for each key."""
    return [torch.Generator().manual_seed(seed_for(*key)) for key in keys]


def window_of(args: SLASConfig, rollout_index: int, rng: np.random.Generator) -> range | None:
    """The stochastic steps of a rollout: all (`None`), a fixed window, one drawn at random, or a sliding one."""
    size, start = args.sde_window_size, args.sde_window_start
    if size is None:
        return None
    last = args.num_trainable_steps - size
    if args.sde_window_slide_every is not None:
        first = start or 0
        start = first + rollout_index // args.sde_window_slide_every % (last - first + 1)
    elif start is None:
        start = int(rng.integers(min(last, args.num_inference_steps // 2) + 1))
    return range(start, start + size)
