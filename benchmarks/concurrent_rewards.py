"""
Time to sample and score a rollout of the embedded pipeline with concurrent rewards, as a ratio to that without.

    python benchmarks/concurrent_rewards.py                   # a reward that computes on the same cores
    python benchmarks/concurrent_rewards.py --wait 0.5        # one that waits for another machine or device

Both take turns, rollout by rollout, in one process and on the same threads, so that a noisy machine disturbs both
alike. The ratio of every pair, their median and its 95% interval are printed; the first pair, which warms up, is left
out.
"""

import argparse
import tempfile
import time
from typing import Any

import numpy as np
import torch

from slas_trl.rewards import shapes_clip, shapes_verifier
from slas_trl.scripts.arguments import parse
from slas_trl.shapes import load_shapes_pipeline, shapes_prompts
from slas_trl.trainer import SLASTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--wait", type=float, help="seconds that a reward waits, for each chunk")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def waits(prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
        time.sleep(options.wait)
        return [image.convert("L").getpixel((0, 0)) / 255 for image in images]

    with tempfile.TemporaryDirectory() as folder:
        files = ["--output_dir", folder, "--save_strategy", "no", "--log_completions", "false"]
        # The optimizer is of no interest here: one step of one timestep.
        short = ["--sde_window_size", "1", "--beta", "0", "--disable_tqdm", "true"]
        _, adapter, config = parse([*files, *short, "--max_steps", str(2 * options.pairs)])
        trainer = SLASTrainer(
            load_shapes_pipeline(),
            [shapes_verifier, shapes_clip] if options.wait is None else [shapes_verifier, waits],
            config,
            train_dataset=shapes_prompts("train"),
            peft_config=adapter.peft_config(),
        )
        seconds: list[float] = []
        sample = trainer.sample_rollout

        def timed(indices: list[int], rollout_index: int) -> Any:
            config.concurrent_rewards = rollout_index % 2 == 1
            start = time.perf_counter()
            rollout = sample(indices, rollout_index)
            seconds.append(time.perf_counter() - start)
            return rollout

        trainer.sample_rollout = timed  # type: ignore[method-assign]
        trainer.train()
    alone, together = np.array(seconds).reshape(-1, 2)[1:].T
    ratios = together / alone
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, size=(2000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    print(
        f"{options.threads} thread(s); a rollout without: {np.median(alone):.2f} s, with: {np.median(together):.2f} s"
    )
    print("ratios: " + " ".join(f"{ratio:.3f}" for ratio in ratios))
    print(f"median {np.median(ratios):.3f} [{low:.3f}, {high:.3f}] (95%, bootstrap over {len(ratios)} pairs)")


if __name__ == "__main__":
    main()
