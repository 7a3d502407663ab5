"""
The share of the training time that `gamma_schedule="trust_region"` takes, on the embedded pipeline.

    python benchmarks/gamma_overhead.py

Trains as `slas-trl train` does, and adds up the time that goes into γ: measuring the Fisher matrix, which the
first rollout does and then one every `fisher_update_steps` updates, the length and KL of updates, and the bounds. All
shares are of the time of the same run, so that a slow or busy machine disturbs both alike. Measurements begin with the
eigenvector of the last one; the first has none, takes longer, and is printed by itself. With few updates, measure more
often (`--fisher_update_steps 3`): the share at the default interval follows from the time of one measurement.
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


DEFAULT_INTERVAL = 20


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
        watch = Stopwatch(trainer.gamma)
        trainer.add_callback(watch)
        trainer.train()
    whole, gamma = np.array(watch.whole), np.array(watch.gamma)
    measured = np.arange(len(whole)) % (config.fisher_interval or 1) == 0
    plain = np.median((whole - gamma)[1:])
    later, others = np.median(gamma[measured][1:]) / plain, np.median(gamma[~measured]) / plain
    print(f"threads {options.threads}, {len(whole)} updates of {plain:.2f} s, measured every {config.fisher_interval}")
    print(
        f"in updates: first measurement {gamma[0] / plain:.3f}, later ones {later:.3f} (median), without {others:.4f}"
    )
    print(
        f"share of all time {gamma.sum() / whole.sum():.4f}, after the first {gamma[1:].sum() / whole[1:].sum():.4f}"
    )
    spent = (later + (DEFAULT_INTERVAL - 1) * others) / DEFAULT_INTERVAL
    print(f"share with a measurement every {DEFAULT_INTERVAL} updates {spent / (1 + spent):.4f}")


if __name__ == "__main__":
    main()
