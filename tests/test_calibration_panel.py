"""The calibration panel of runs that nobody had to wait for."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from slas_trl.calibration_panel import COLOURS, plot_calibration
from tests.test_calibration import down, evaluations, run, up


def write(folder, lines, scale_rewards="batch", gamma=0.5):
    """A run's folder."""
    rng = np.random.default_rng(0)
    for line in lines:
        stds = rng.uniform(0, 1, 12).round(3)
        line |= {"scale_rewards": scale_rewards, "gamma": gamma, "group_std": [None, 0.0, *stds]}
        line |= {"group_abs_advantage": [0.0, 0.0, *(stds ** (1 + gamma))]}
        shares = ("frac_reward_zero_std", "advantages/clip_fraction", "advantages/effective_share")
        line |= dict(zip(shares, rng.uniform(0, 0.5, 3), strict=True))
    path = folder / "calibration.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pixels(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.size == (1300, 1050)
        return np.asarray(picture.convert("RGB"))


def has(part, colour):
    return (np.abs(part.astype(int) - colour).sum(axis=-1) < 12).sum()


@pytest.mark.parametrize(
    ("verdict", "curve"), [("likely hacking", down), ("healthy", up)], ids=["hacked run", "healthy run"]
)
def test_the_colour_under_the_curves_tells_a_hacked_run_from_a_healthy_one(tmp_path, verdict, curve):
    path = write(tmp_path, run(up, taste=curve))
    assert plot_calibration(path).verdict == verdict
    picture = pixels(tmp_path / "calibration.png")
    corner = picture[525:, 650:]
    papers = {name: tuple(int(paper[i : i + 2], 16) for i in (1, 3, 5)) for name, (_, paper) in COLOURS.items()}
    shown = {name for name, paper in papers.items() if has(corner, paper) > 2000}
    assert verdict in shown and not {"likely hacking", "healthy"} - {verdict} & shown


def test_every_part_of_it_is_drawn(tmp_path):
    metrics = "".join(json.dumps({"step": step, **line}) + "\n" for step, line in evaluations(0.0, 0.2, 0.4).items())
    (tmp_path / "metrics.jsonl").write_text(metrics)
    path = write(tmp_path, run(up, taste=down))
    plot_calibration(path, output_path=tmp_path / "other.png")
    assert not (tmp_path / "calibration.png").exists()
    picture = pixels(tmp_path / "other.png")
    for top in (130, 650):
        for left in (0, 650):
            part = picture[top : top + 350, left : left + 650]
            assert has(part, (31, 119, 180)) > 200  # matplotlib's first colour
    (tmp_path / "metrics.jsonl").unlink()
    plot_calibration(path, output_path=tmp_path / "without.png")
    assert (pixels(tmp_path / "without.png") != picture).any()  # evaluations were drawn


@pytest.mark.parametrize("rollouts", [1, 2, 9])
def test_short_runs(tmp_path, rollouts):
    assert plot_calibration(write(tmp_path, run(up, rollouts, taste=down))).verdict == "too short"
    assert pixels(tmp_path / "calibration.png").min() < 50


@pytest.mark.parametrize("std", [0.0, None])
def test_runs_in_which_no_group_differs(tmp_path, std):
    path = write(tmp_path, run(up))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line | {"group_std": [std] * 14, "group_abs_advantage": [0.0] * 14, "reward": None} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert plot_calibration(path).verdict == "too short"


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError):
        plot_calibration(tmp_path / "calibration.jsonl")
    shutil.rmtree(tmp_path)
