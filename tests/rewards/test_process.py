"""A reward in a process of its own: the same scores, its errors, and what happens when it dies."""

import copy
import gc
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from slas_trl.rewards import ProcessReward  # noqa: E402
from slas_trl.rewards.base import RewardUnavailableError  # noqa: E402
from slas_trl.rewards.resolve import resolve_reward, reward_name  # noqa: E402
from tests.rewards.served_rewards import picture  # noqa: E402


pytestmark = pytest.mark.rewards

ROOT = Path(__file__).parents[2]
HERE = "tests.rewards.served_rewards"
NAME = f"{HERE}:in_process"
IMAGES = [picture(number) for number in (1, 2, 77777)]


@pytest.fixture(scope="module")
def reward():
    """The process finds modules where this one does, wherever it is started."""
    sys.path.append(str(ROOT))
    yield ProcessReward(NAME)
    sys.path.remove(str(ROOT))


def test_scores_are_those_of_the_reward_itself(reward, capfd):
    assert reward(["a", "b", "c"], IMAGES, usual=[1, IMAGES[0], None], trainer_state=object()) == [1, 2, 77777]
    (first,) = reward(["process"], IMAGES[:1])
    assert first != os.getpid()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: reward(["process", "b"], IMAGES[:2]), range(8))) == [[first, 2]] * 8
    printed = capfd.readouterr()
    assert printed.out == "" and "a line that is printed" in printed.err
    assert copy.deepcopy(reward)(["process"], IMAGES[:1]) != [first]


def test_names(reward):
    assert reward_name(reward) == "in_process"
    assert reward_name(ProcessReward("remote:url=http://127.0.0.1:1,name=hps")) == "hps"
    assert reward_name(ProcessReward(f"{NAME}:scale=2", name="other")) == "other"
    assert ProcessReward("ocr").blind_to == resolve_reward("ocr").blind_to
    by_name = resolve_reward(f"{NAME}:process=true,scale=3")
    assert isinstance(by_name, ProcessReward) and by_name(["a"], IMAGES[1:2]) == [6]
    with pytest.raises(ValueError, match="size"):
        ProcessReward(f"{NAME}:size=1")


def test_its_errors_are_raised_here(reward):
    (before,) = reward(["process"], IMAGES[:1])
    with pytest.raises(ValueError, match="in_process.*KeyError: 'of a kind'"):
        reward(["raise"], IMAGES[:1])
    with pytest.raises(ValueError, match="strange"):
        reward(["a"], IMAGES[:1], strange=[object()])
    assert reward(["process"], IMAGES[:1]) == [before]


def test_it_is_started_again_when_it_dies(reward, tmp_path):
    (file := tmp_path / "once").touch()
    assert reward(["a", str(file), "b"], IMAGES) == [1, 2, 77777]
    assert not file.exists()
    with pytest.raises(RewardUnavailableError, match="failed twice on the same 2 images"):
        reward(["a", "exit"], IMAGES[:2])


def test_one_that_cannot_be_started(tmp_path, monkeypatch, capfd):
    (file := tmp_path / "own.py").write_text("import os\nassert 'HERE' in os.environ, 'where is it?'\nreward = print")
    monkeypatch.setenv("HERE", "1")
    own = ProcessReward(f"{file}:reward")
    monkeypatch.delenv("HERE")
    with pytest.raises(ValueError, match="cannot be started"):
        own(["a"], IMAGES[:1])
    assert "where is it" in capfd.readouterr().err


def is_gone(process: int) -> bool:
    """Or is about to be."""
    for _ in range(100):
        try:
            if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    os.kill(process, 9)
    return False


def test_a_reward_that_is_gone_has_no_process(reward):
    own = copy.copy(reward)
    (process,) = map(int, own(["process"], IMAGES[:1]))
    assert psutil.pid_exists(process)
    del own
    gc.collect()
    assert is_gone(process)


def test_it_ends_with_its_parent(tmp_path):
    """However that ends. And a script need not be guarded: it is not run again."""
    (script := tmp_path / "script.py").write_text(
        "import os\nfrom PIL import Image\nfrom slas_trl.rewards import ProcessReward\n"
        f"reward = ProcessReward('{NAME}')\n"
        "print(int(reward(['process'], [Image.new('RGB', (2, 2))])[0]), flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60
    )
    assert is_gone(int(done.stdout)), done.stderr
