"""The calibration panel of runs that nobody had to wait for."""

import numpy as np
import pytest
from PIL import Image

from slas_trl.reports.calibration_panel import COLORS, plot_calibration
from slas_trl.run_files import read_lines, write_lines
from tests.reports.tiny_runs import down, evaluations, run, up


def write(folder, lines):
    """A run's folder."""
    rng = np.random.default_rng(0)
    for line in lines:
        stds = rng.uniform(0, 1, 12).round(3)
        line |= {"scale_rewards": "batch", "gamma": 0.5, "group_std": [None, 0.0, *stds]}
        line |= {"group_abs_advantage": [0.0, 0.0, *stds**1.5]}
        shares = ("frac_reward_zero_std", "advantages/clip_fraction", "advantages/effective_share")
        line |= dict(zip(shares, rng.uniform(0, 0.5, 3), strict=True))
    path = folder / "calibration.jsonl"
    write_lines(path, lines)
    return path


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.size == (1300, 1050)
        return np.asarray(picture.convert("RGB"))


def has(part, color):
    """How many pixels of a part of the picture are of this color."""
    return (np.abs(part.astype(int) - color).sum(axis=-1) < 12).sum()


@pytest.mark.parametrize(("verdict", "curve"), [("hacking", down), ("healthy", up)])
def test_the_color_under_the_curves_tells_a_hacked_run_from_a_healthy_one(tmp_path, verdict, curve):
    assert plot_calibration(write(tmp_path, run(up, taste=curve))).verdict == verdict
    corner = pixels(tmp_path / "calibration.png")[525:, 650:]
    papers = {name: tuple(int(paper[i : i + 2], 16) for i in (1, 3, 5)) for name, (_, paper) in COLORS.items()}
    assert {name for name, paper in papers.items() if has(corner, paper) > 2000} == {verdict}


def test_every_part_of_it_is_drawn(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", evaluations(0.0, 0.2, 0.4))
    path = write(tmp_path, run(up, taste=down))
    plot_calibration(path, output_path=tmp_path / "other.png")
    assert not (tmp_path / "calibration.png").exists()
    picture = pixels(tmp_path / "other.png")
    for top, left in ((130, 0), (130, 650), (650, 0), (650, 650)):
        assert has(picture[top : top + 350, left : left + 650], (31, 119, 180)) > 200  # matplotlib's first color
    (tmp_path / "metrics.jsonl").unlink()
    plot_calibration(path, output_path=tmp_path / "without.png")
    assert (pixels(tmp_path / "without.png") != picture).any()  # evaluations were drawn


NO_ADVANTAGE = {"group_abs_advantage": [0.0] * 14, "reward": None}


@pytest.mark.parametrize(
    ("rollouts", "changes"),
    [(1, {}), (9, {"group_std": [0.0] * 14, **NO_ADVANTAGE}), (1, {"group_std": [None] * 14, **NO_ADVANTAGE})],
)
def test_short_runs_and_those_in_which_no_group_differs(tmp_path, rollouts, changes):
    path = write(tmp_path, run(up, rollouts, taste=down))
    write_lines(path, [line | changes for line in read_lines(path)])
    assert plot_calibration(path).verdict == "too short"
    assert pixels(tmp_path / "calibration.png").min() < 50
