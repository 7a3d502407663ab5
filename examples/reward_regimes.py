"""
In which regime should which kind of advantages win? A sweep that takes a minute, since it trains nothing.

    python examples/reward_regimes.py --output regimes.md

Pictures of the embedded base are scored by an exact judge, t, and by rewards r that are t spoilt in various ways: with
noise, on a scale that differs between prompts, without any signal for half of the prompts, or with a judge that is
rarely content. The advantages A are made of r alone. Shown is their alignment with the truth,

    cos(A, Δt) = ΣA Δt / √(ΣA² ΣΔt²),    Δt = t - mean of its group,

which is what a unit of A gains in t, to first order and if the gradients of all images are alike. The optimizer
normalizes the size of an update, so the direction is what counts. Intervals are 95% of a bootstrap over prompts.

The rewards can be trained on, too: `slas-trl compare --reward_funcs examples.reward_regimes:unresolved_half ...`.
"""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from slas_trl.advantages import slas_advantages
from slas_trl.rewards import shapes_clip, shapes_coloured_area, shapes_verifier, shapes_verifier_strict
from slas_trl.shapes import load_shapes_pipeline, shapes_prompts


Reward = Callable[[list[str], list[Image]], Any]
ARMS: dict[str, dict[str, Any]] = {
    "group std": {"scale_rewards": "group", "gamma": 0.0},
    **{f"batch std, γ {g:g}": {"scale_rewards": "batch", "gamma": g} for g in (0.0, 0.25, 0.5, 1.0)},
}
LARGE = 0.15  # share of the pixels that a picture with large shapes colors
SPREAD = 0.28  # std of the verifier's graded score within a group of the base


def _random(prompts: Sequence[str], images: Sequence[Image] | None = None) -> np.ndarray:
    """One number, uniform in (0, 1), for each prompt, or picture of it: always the same one for the same pixels."""
    pixels = [b""] * len(prompts) if images is None else [image.tobytes() for image in images]
    digests = [hashlib.sha256(p.encode() + x).digest() for p, x in zip(prompts, pixels, strict=True)]
    return (np.array([int.from_bytes(d[:6], "big") for d in digests]) + 0.5) / 2**48


def _noise(prompts: Sequence[str], images: Sequence[Image], std: float) -> np.ndarray:
    """Gaussian, independent between pictures: what a judge adds that is no property of the picture one could learn."""
    return std * torch.special.ndtri(torch.from_numpy(_random(prompts, images))).numpy()


def _scores(reward: Reward, prompts: list[str], images: list[Image]) -> np.ndarray:
    return np.array(reward(prompts, images), dtype=float)


def noisy(std: float) -> Reward:
    """The graded verifier, with noise of `std` within-group standard deviations."""

    def reward(prompts: list[str], images: list[Image]) -> list[float]:
        return (_scores(shapes_verifier, prompts, images) + _noise(prompts, images, std * SPREAD)).tolist()

    return reward


def heavy_tailed(std: float) -> Reward:
    """The same with noise of Student's t with 3 degrees of freedom: a judge that is sometimes far off."""

    def reward(prompts: list[str], images: list[Image]) -> list[float]:
        normal = [_noise([p + str(i) for p in prompts], images, 1.0) for i in range(4)]
        t = normal[0] / np.sqrt(sum(x**2 for x in normal[1:]) / 3)
        return (_scores(shapes_verifier, prompts, images) + std * SPREAD * t / np.sqrt(3)).tolist()

    return reward


def narrow_gaps(prompts: list[str], images: list[Image], std: float = 0.1, **columns: Any) -> list[float]:
    """
    The graded verifier on a scale between 1/30 and 1 that differs between prompts, with noise of 0.1 within-group
    standard deviations everywhere, all of it 30 times smaller: within a group, scores differ by thousandths, as those
    of learned rewards do.
    """
    scale = 30.0 ** -_random(prompts)
    return ((scale * _scores(shapes_verifier, prompts, images) + _noise(prompts, images, std * SPREAD)) / 30).tolist()


def unresolved_half(prompts: list[str], images: list[Image], std: float = 0.5, **columns: Any) -> list[float]:
    """The graded verifier for half of the prompts and nothing for the others, with noise for all."""
    resolved = _random(prompts) < 0.5
    return (resolved * _scores(shapes_verifier, prompts, images) + _noise(prompts, images, std * SPREAD)).tolist()


def rare_success(prompts: list[str], images: list[Image], **columns: Any) -> list[float]:
    """1 for a picture that shows exactly what was asked for, and that large, which few pictures of the base do."""
    large = _scores(shapes_coloured_area, prompts, images) > LARGE
    return (large * _scores(shapes_verifier_strict, prompts, images)).tolist()


def rare_success_noisy(prompts: list[str], images: list[Image], std: float = 0.3, **columns: Any) -> list[float]:
    """The same, with Gaussian noise."""
    return (_scores(rare_success, prompts, images) + _noise(prompts, images, std)).tolist()


# Name, reward, and the truth that it should follow
REGIMES: list[tuple[str, Reward, Reward]] = [
    ("graded verifier", shapes_verifier, shapes_verifier),
    *((f"with noise, {s:g} std", noisy(s), shapes_verifier) for s in (0.5, 1, 2)),
    *((f"with heavy-tailed noise, {s:g} std", heavy_tailed(s), shapes_verifier) for s in (0.5, 1)),
    *((f"narrow gaps, noise {s:g} std", lambda p, x, s=s: narrow_gaps(p, x, s), shapes_verifier)
      for s in (0.03, 0.1, 0.3)),
    *((f"half of the prompts unresolved, noise {s:g} std", lambda p, x, s=s: unresolved_half(p, x, s), shapes_verifier)
      for s in (0.1, 0.5, 1)),
    *((f"rare success, noise {s:g}", lambda p, x, s=s: rare_success_noisy(p, x, s), rare_success)
      for s in (0.0, 0.1, 0.2, 0.3)),
    ("learned `shapes_clip`", shapes_clip, shapes_verifier),
    ("strict verifier + 0.3 × colored area",
     lambda p, x: _scores(shapes_verifier_strict, p, x) + 0.3 * _scores(shapes_coloured_area, p, x),
     shapes_verifier_strict),
]  # fmt: skip


def sample(prompts: list[str], images_per_prompt: int) -> tuple[list[str], list[Image]]:
    """Pictures of the base, with seeds of their own, in groups."""
    pipe: Any = load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    rows = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    images = []
    for i in range(0, len(rows), 64):
        seeds = [torch.Generator().manual_seed(i + j) for j in range(len(rows[i : i + 64]))]
        images += pipe(prompt=rows[i : i + 64], generator=seeds, num_inference_steps=10).images
    return rows, images


def alignment(r: np.ndarray, t: np.ndarray, **arm: Any) -> tuple[float, float, float]:
    """cos(A, Δt) of rewards and truths `(groups, G)`, and the ends of its interval."""
    a = slas_advantages(torch.from_numpy(r).flatten(), r.shape[1], **arm).double().numpy().reshape(r.shape)
    d = t - t.mean(axis=1, keepdims=True)
    sums = np.stack([(a * d).sum(1), (a * a).sum(1), (d * d).sum(1)], axis=1)  # (groups, 3)
    drawn = np.random.default_rng(0).multinomial(len(r), np.full(len(r), 1 / len(r)), size=2000) @ sums
    cosines = drawn[:, 0] / np.sqrt(drawn[:, 1] * drawn[:, 2])
    total = sums.sum(axis=0)
    return total[0] / np.sqrt(total[1] * total[2]), *np.percentile(cosines, [2.5, 97.5])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Markdown file to write (default: the terminal)")
    parser.add_argument("--prompts", type=int, default=192, help="training prompts (default: 192)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = shapes_prompts("train")["prompt"]
    rows, images = sample([data[i * len(data) // args.prompts] for i in range(args.prompts)], 16)
    lines = [f"| reward | G | {' | '.join(ARMS)} |", "|---" * (len(ARMS) + 2) + "|"]
    for name, reward, truth in REGIMES:
        r, t = (_scores(f, rows, images).reshape(args.prompts, 16) for f in (reward, truth))
        for size in (8, 16):
            cells = [alignment(r[:, :size], t[:, :size], **arm) for arm in ARMS.values()]
            best = max(mean for mean, _, _ in cells)
            written = [
                f"{'**' * int(m == best)}{m:.3f}{'**' * int(m == best)} [{lo:.3f}, {hi:.3f}]" for m, lo, hi in cells
            ]
            lines.append(f"| {name} | {size} | {' | '.join(written)} |")
    text = "\n".join(lines) + "\n"
    if args.output is None:
        print(text)
    else:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
