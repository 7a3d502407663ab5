"""The curves of a run."""

import math

import numpy as np
import pytest
from PIL import Image

from slas_trl.reports.curves import plot_training
from slas_trl.run_files import write_lines


LINES = [
    {"step": 1, "reward": 0.1, "reward_std": 0.2, "kl": 0.0, "clip_ratio/region_mean": 0.0, "advantages/std": 1.2},
    {"step": 2, "reward": 0.3, "reward_std": 0.2, "kl": 0.01, "clip_ratio/region_mean": 0.1, "advantages/std": 1.4},
    {"step": 2, "eval_reward": 0.4},
]


def draw(folder, lines):
    write_lines(folder / "metrics.jsonl", lines)
    plot_training(folder / "metrics.jsonl", folder / "training.png")
    with Image.open(folder / "training.png") as plot:
        assert plot.format == "PNG" and plot.size == (1200, 840)
        return np.asarray(plot.convert("RGB"))


def test_every_panel_has_its_curve(tmp_path):
    plot = draw(tmp_path, LINES)
    for panel in (plot[:420, :600], plot[:420, 600:], plot[420:, :600], plot[420:, 600:]):
        assert (panel == (31, 119, 180)).all(axis=-1).sum() > 100  # matplotlib's first color, C0


@pytest.mark.parametrize(
    "lines", [[], [{"step": 1}], [{"step": 1, "reward": math.nan}], [{"step": 5, "kl": 1.0}]], ids=str
)
def test_missing_metrics_leave_their_panel_empty(tmp_path, lines):
    plot = draw(tmp_path, lines)
    assert (plot < 150).all(axis=-1).sum() > 1000  # titles
    assert not (plot[:420, :600] == (31, 119, 180)).all(axis=-1).any()
