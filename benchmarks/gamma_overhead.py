"""
The share of the training time that `gamma_schedule="trust_region"` takes, on the embedded pipeline.

    python benchmarks/gamma_overhead.py

Trains with the settings of `slas-trl train` and adds up the time that is spent on choosing γ: measuring the Fisher
matrix, which the first rollout and then one every `fisher_update_steps` updates does, the length and KL of updates, and
the bounds. The share is that time over all time, both of one run, so that a slow or busy machine disturbs both alike.
Measurements begin with the eigenvector of the last one. The first has none and takes longer; it is printed by itself.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from slas_trl.rewards import shapes_clip, shapes_verifier
from slas_trl.scripts.arguments import parse
from slas_trl.shapes import load_shapes_pipeline, shapes_prompts
from slas_trl.trainer import SLASTrainer


class Stopwatch(TrainerCallback):
    """Seconds of each update, and those of them that went into γ."""

    def __init__(self, control: Any):
        self.whole: list[float] = []
        self.gamma: list[float] = []
        self.start = self.spent = 0.0
        for name in ("shape", "note_micro_step", "on_pre_optimizer_step", "on_optimizer_step"):
            setattr(control, name, self.timed(getattr(control, name)))

    def timed(self, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent += time.perf_counter() - start

        return call

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.whole.append(now - self.start)
        self.gamma.append(self.spent)
        self.start, self.spent = now, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=65)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options, others = parser.parse_known_args()  # the others are those of `slas-trl train`
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"max_steps": options.updates, "output_dir": folder, "save_strategy": "no", "disable_tqdm": "true"}
        flags = [flag for name, value in settings.items() for flag in (f"--{name}", str(value))]
        _, adapter, config = parse(["--gamma_schedule", "trust_region", *flags, *others])
        trainer = SLASTrainer(
            load_shapes_pipeline(),
            [shapes_verifier, shapes_clip],
            config,
            train_dataset=shapes_prompts("train"),
            peft_config=adapter.peft_config(),
        )
        watch = Stopwatch(trainer._gamma)
        trainer.add_callback(watch)
        trainer.train()
    whole, gamma = np.array(watch.whole), np.array(watch.gamma)
    measured = np.arange(len(whole)) % (config.fisher_interval or 1) == 0
    plain = np.median((whole - gamma)[1:])
    later = gamma[measured][1:]
    print(f"threads {options.threads}, {len(whole)} updates, measured every {config.fisher_interval}")
    print(
        f"an update without that: {plain:.2f} s; the first measurement: {gamma[0]:.2f} s, {gamma[0] / plain:.2f} of it"
    )
    print(f"later ones: {' '.join(f'{seconds / plain:.2f}' for seconds in later)} of an update")
    print(f"every other update: {np.median(gamma[~measured]) / plain:.4f} of it")
    print(f"share of all training time: {gamma.sum() / whole.sum():.4f}; after the first measurement: "
          f"{gamma[1:].sum() / whole[1:].sum():.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
