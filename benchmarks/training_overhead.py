"""
Training time on the embedded pipeline, as a ratio to the bare denoiser calls that it needs.

    python benchmarks/training_overhead.py

Trainer and bare loop take turns, in one process and on the same threads, so that a noisy machine disturbs both alike.
One turn of the trainer is one update: sampling a rollout, decoding, scoring, and the backward passes. One turn of the
bare loop is the same number of denoiser forwards without gradients (those of the reference policy too), the same
number of forwards and backwards with them, on inputs of the same shapes and the same adapter, and one optimizer step.
The ratio of every pair, their median and its 95% interval are printed; the first pair, which warms up, is left out.
"""

import argparse
import tempfile
import time
from typing import Any, cast

import numpy as np
import torch
from transformers import TrainerCallback

from slas_trl.rewards import shapes_clip, shapes_verifier
from slas_trl.scripts.arguments import parse
from slas_trl.shapes import load_shapes_pipeline, shapes_prompts
from slas_trl.trainer import SLASTrainer


class BareLoop:
    """The denoiser calls of one update in a plain loop, on the inputs of a call that the pipeline made."""

    def __init__(self, denoiser: Any, call: tuple[tuple, dict], chunks: int, sampled: int, trained: int, beta: float):
        self.denoiser, (self.args, self.kwargs) = denoiser, call
        self.chunks, self.sampled, self.trained = chunks, sampled, trained
        self.references = trained if beta else 0
        self.parameters = [p for p in denoiser.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, weight_decay=0.0)  # leaves the weights alone

    def run(self) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(self.chunks * self.sampled):
                self.denoiser(*self.args, **self.kwargs)
            self.denoiser.disable_adapters()
            for _ in range(self.chunks * self.references):
                self.denoiser(*self.args, **self.kwargs)
            self.denoiser.enable_adapters()
        for _ in range(self.chunks * self.trained):
            self.denoiser(*self.args, **self.kwargs)[0].square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start


class TakeTurns(TrainerCallback):
    """After every update of the trainer, one turn of the bare loop."""

    def __init__(self, trainer: SLASTrainer):
        self.trainer, self.call, self.loop = trainer, None, None
        self.pairs: list[tuple[float, float]] = []
        self.start = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        def remember(module, positional, keywords):
            self.call = (positional, {k: v.detach() if torch.is_tensor(v) else v for k, v in keywords.items()})
            hook.remove()

        hook = self.trainer.pipe.transformer.register_forward_pre_hook(remember, with_kwargs=True)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        trained = time.perf_counter() - self.start
        if self.loop is None:
            assert self.call is not None
            self.loop = BareLoop(
                self.trainer.pipe.transformer,
                self.call,
                chunks=cast(int, self.trainer.args.steps_per_generation),
                sampled=self.trainer.args.num_inference_steps,
                trained=self.trainer.args.num_trained_timesteps,
                beta=self.trainer.args.beta,
            )
        self.pairs.append((trained, self.loop.run()))
        self.start = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        _, adapter, config = parse(
            [
                "--max_steps",
                str(options.updates),
                "--output_dir",
                folder,
                "--save_strategy",
                "no",
                "--disable_tqdm",
                "true",
            ]
        )
        trainer = SLASTrainer(
            load_shapes_pipeline(),
            [shapes_verifier, shapes_clip],
            config,
            train_dataset=shapes_prompts("train"),
            peft_config=adapter.peft_config(),
        )
        turns = TakeTurns(trainer)
        trainer.add_callback(turns)
        trainer.train()
    pairs = np.array(turns.pairs[1:])
    ratios = pairs[:, 0] / pairs[:, 1]
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(2000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    images = config.images_per_rollout
    print(f"threads {options.threads}, {images} images per update, {len(ratios)} pairs after a warm-up")
    print(f"trainer {np.median(pairs[:, 0]):.2f} s per update ({images / np.median(pairs[:, 0]):.1f} images/s), "
          f"bare denoiser calls {np.median(pairs[:, 1]):.2f} s")  # fmt: skip
    print(f"ratios {' '.join(f'{ratio:.3f}' for ratio in ratios)}")
    print(f"median ratio {np.median(ratios):.3f}, 95% interval [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
