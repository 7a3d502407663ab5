"""Seeds of random numbers, which follow from where they are used: the same on every machine, in any batch."""

from collections.abc import Iterable

import numpy as np
import torch


def seed_for(*key: int) -> int:
    """A 63-bit seed from integers, such as (seed, stream, rollout, image); well mixed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generators(keys: Iterable[tuple[int, ...]]) -> list[torch.Generator]:
    """One CPU generator for each key."""
    return [torch.Generator().manual_seed(seed_for(*key)) for key in keys]
