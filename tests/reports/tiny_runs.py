"""Runs that nobody had to wait for: lines of `calibration.jsonl` and `metrics.jsonl`."""

import numpy as np


def run(trained, rollouts=60, noise=0.1, seed=0, **held_out):
    """Lines of `calibration.jsonl`; each reward a function of the time, from 0 to 1, in std between images."""
    rng = np.random.default_rng(seed)
    lines = []
    for step, t in enumerate(np.linspace(0, 1, rollouts), start=1):
        line = {"step": step, "weights": {"trained": 1.0, **dict.fromkeys(held_out, 0.0)}}
        line |= {"reward": 5 + 2 * (trained(t) + noise * rng.normal()), "reward_std_of_images": 2.0}
        for name, curve in held_out.items():
            line[f"rewards/{name}/mean"] = 0.1 * (curve(t) + noise * rng.normal())
            line[f"rewards/{name}/std"] = 0.1
        lines.append(line)
    return lines


def up(t):
    return t


def down(t):
    return -0.6 * t


def flat(t):
    return 0.0


def evaluations(*changes, key="eval_reward", std="eval_reward_std", samples=400):
    """Lines of `metrics.jsonl`, one for each evaluation."""
    return [{"step": 1 + 10 * i, key: v, std: 1.0, "eval_samples": samples} for i, v in enumerate(changes)]
