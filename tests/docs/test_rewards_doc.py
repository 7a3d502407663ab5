"""The examples of docs/source/rewards.md, run as they are printed."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from PIL import Image

from slas_trl import rewards as package
from slas_trl.trainer.scoring import RewardScorer
from tests.trainer.tiny_trainers import logged, trained


TEXT = (Path(__file__).parents[2] / "docs" / "source" / "rewards.md").read_text(encoding="utf-8")
OWN = TEXT[TEXT.index("## Your own") : TEXT.index("## While training samples")]
EXAMPLES = re.findall(r"```python\n(.*?)```", OWN, re.DOTALL)[1:]  # the first is the signature
PROMPTS, COLORS = ["a red car", "the sky", "grass", "a"], ["red", "blue", "green", "pink"]
DATA = Dataset.from_dict({"prompt": PROMPTS, "color": COLORS})


@pytest.fixture(scope="module")
def names() -> dict:
    """What the examples define, one after the other, as in a notebook."""
    namespace: dict = {}
    for block in EXAMPLES:
        exec(compile(block, "rewards.md", "exec"), namespace)
    return namespace


@pytest.fixture(scope="module")
def rewards(names):
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, 4, 8, stride=8)
    closeness = names["Closeness"](network, Image.new("RGB", (8, 8), "red"))
    return [names[name] for name in ("sharpness", "wanted_color", "exposure", "asked_elsewhere")] + [closeness]


def test_their_scores(rewards):
    images = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "white", "black")]
    stripes = Image.new("L", (8, 8))
    stripes.putdata([255 * (x % 2) for _ in range(8) for x in range(8)])
    scores = RewardScorer(rewards).score(PROMPTS, images, {"color": COLORS})
    sharp, color, exposed, elsewhere, close = scores.T.tolist()
    assert sharp == [0, 0, 0, 0] and rewards[0](["x"], [stripes]) == [1.0]
    assert color[:2] == [0, 0] and color[2] == pytest.approx(-(2**0.5)) and color[3] != color[3]  # NaN: no pink
    assert exposed == [1, 1, 0, 0] and elsewhere == [17, 15, 13, 9]
    assert close[0] == pytest.approx(1) and max(close[1:]) < 1


def test_they_train(tmp_path, rewards):
    trained(tmp_path, reward_funcs=rewards, train_dataset=DATA, max_steps=1)
    [line] = logged(tmp_path)
    assert line["rewards/exposure/burnt/mean"] >= 0 and line["rewards/Closeness/std"] > 0
    assert 0 <= line["rewards/wanted_color/nan_share"] < 1 and line["rewards/asked_elsewhere/mean"] > 0


def test_every_reward_of_the_package_is_in_the_table():
    table = TEXT[: TEXT.index("## Your own")]
    missing = [name for name in package.NAMES if f"`{name}`" not in table]
    assert not missing
