"""What a reward is blind to: the model card and the documentation say the same."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from slas_trl.rewards import NAMES
from slas_trl.rewards.blind_spots import BLIND_SPOTS, MEASURES


ROOT = Path(__file__).parents[2]


def documented() -> dict[str, str]:
    """The column "blind to" by reward; the first row of a reward is that of its default options."""
    text = (ROOT / "docs" / "source" / "rewards.md").read_text(encoding="utf-8")
    table = text[text.index("| reward | score |") :].split("\n\n")[0].splitlines()
    assert table[0].endswith("| blind to |")
    spots: dict[str, str] = {}
    for row in table[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        for name in re.findall(r"`(\w+)`", cells[0]):
            spots.setdefault(name, re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cells[-1]))
    return spots


def test_every_reward_has_one():
    assert list(BLIND_SPOTS) == list(MEASURES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_documentation_says_the_same(name):
    assert documented()[name] == BLIND_SPOTS[name]


def test_they_are_read_without_anything_heavy():
    code = "import sys, slas_trl.rewards.blind_spots; assert not {'torch', 'numpy', 'PIL'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
