"""Order and seeds of sampling: the order of prompts, and the seed of every random number of a rollout."""

from collections.abc import Iterator

import numpy as np
from trl.trainer.utils import RepeatSampler

from ..policy import Rollout
from .slas_config import SLASConfig


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler, in an order that depends on seed and epoch alone, so that a resumed run sees the same prompts."""

    epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + self.epoch)
        return super().__iter__()


def prompt_sampler(args: SLASConfig, prompts: int) -> EpochRepeatSampler:
    """The order of so many prompts. Raises `ValueError` when there are too few for a rollout."""
    per_rollout = args.images_per_rollout * args.world_size // args.num_generations
    if prompts < per_rollout:
        how = "(generation_batch_size / num_generations); lower steps_per_generation"
        raise ValueError(f"There are {prompts} prompts, but a rollout needs {per_rollout} {how}, or add prompts.")
    seed = args.seed if args.data_seed is None else args.data_seed
    repeats = args.num_generations, per_rollout, args.micro_steps_per_rollout  # of a prompt, then of that many
    return EpochRepeatSampler(range(prompts), *repeats, seed=seed)


# Streams of random numbers; each image, group or rollout has its own in each.
INITIAL_NOISE, STEP_NOISE, TIMESTEPS, EVALUATION = range(4)


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


def trained_steps(args: SLASConfig, rollout: Rollout, rng: np.random.Generator) -> list[int]:
    """The trained timesteps, in random order. Raises `ValueError` when the pipeline did not take what is asked for."""
    skipped = rollout.steps[0].index
    if rollout.window is not None and (args.sde_window_start or 0) < skipped:  # before which none begins
        raise ValueError(f"The pipeline begins at step {skipped} (`strength`): set sde_window_start to that or more.")
    if rollout.steps[-1].std > 0 and not args.train_final_step:
        what = f"The pipeline ended early, at step {rollout.steps[-1].index}, with noise on the images"
        raise ValueError(f"{what} that no trained step explains. Set train_final_step=True, or an sde_window_size.")
    trainable = rollout.trainable_steps
    wanted = args.num_trained_timesteps
    if len(trainable) < wanted:
        what = f"Only {len(trainable)} of {wanted} timesteps can be trained"
        raise ValueError(f"{what}; lower timestep_fraction or sde_window_size, or raise noise_level or eta.")
    return rng.permutation(trainable)[:wanted].tolist()
