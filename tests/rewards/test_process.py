"""A reward in a process of its own: the same scores, its errors, and what happens when it dies."""

import copy
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from slas_trl.rewards import ProcessReward
from slas_trl.rewards.base import RewardUnavailableError
from slas_trl.rewards.by_name import reward_name
from tests.rewards.served_rewards import number_of, numbers, picture


ROOT = Path(__file__).parents[2]
NAME = "tests.rewards.served_rewards:in_process"
IMAGES = [picture(number) for number in (1, 2, 77777)]


@pytest.fixture(scope="module")
def reward():
    """The process finds modules where this one does, wherever it is started."""
    sys.path.append(str(ROOT))
    yield ProcessReward(NAME)
    sys.path.remove(str(ROOT))


def test_scores_are_those_of_the_reward_itself(reward):
    assert reward(["a", "b", "c"], IMAGES) == [1, 2, 77777]
    noise = [Image.effect_noise((9, 7), 90).convert(mode) for mode in ("L", "RGBA", "CMYK")]
    columns = {"by": [{"by": (1,)}] * 3, "reference": noise, "completions": noise, "trainer_state": object()}
    assert reward(["a", "b", "c"], noise, **columns) == {"own": list(map(number_of, noise)), "by": [1, 1, 1]}
    assert reward([], []) == []


def test_it_is_one_process_of_its_own(reward, capfd):
    (first,) = reward(["process"], IMAGES[:1])
    assert first != os.getpid()
    with ThreadPoolExecutor(4) as threads:
        scores = threads.map(lambda _: reward(["process", "b"], IMAGES[:2]), range(20))
        assert all(score == [first, 2] for score in scores)
    assert capfd.readouterr().out == ""  # what it prints is on stderr
    other = copy.deepcopy(reward)
    assert other == reward and other._worker is not reward._worker


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


def test_names(reward):
    assert reward_name(reward) == "in_process"
    assert reward_name(ProcessReward("remote:url=http://127.0.0.1:1,name=hps")) == "hps"
    assert reward_name(ProcessReward(f"{NAME}:scale=2", name="other")) == "other"
    with pytest.raises(ValueError, match="There is no reward 'shapes_klip'"):
        ProcessReward("shapes_klip")
    with pytest.raises(ValueError, match="no option 'size'"):
        ProcessReward(f"{NAME}:size=1")
    with pytest.raises(TypeError, match="by name"):
        ProcessReward(numbers)


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("value", ValueError, "^of a kind"),
        ("import", ImportError, "^of a kind"),
        ("key", RuntimeError, "^KeyError: 'of a kind'"),
        ("exit", RuntimeError, "^SystemExit: of a kind"),
    ],
)
def test_its_errors_are_raised_here(reward, what, kind, message):
    (before,) = reward(["process"], IMAGES[:1])
    with pytest.raises(kind, match=message) as error:
        reward([f"raise {what}"], IMAGES[:1])
    assert "served_rewards.py" in error.value.__notes__[0]  # where it was raised
    assert reward(["process"], IMAGES[:1]) == [before]


def test_columns_that_cannot_be_sent(reward):
    with pytest.raises(TypeError, match="Column 'strange' cannot be sent"):
        reward(["a"], IMAGES[:1], usual=[1], strange=[lambda: 1])
    with pytest.raises(ValueError, match="'usual' has 2 values for 1 images"):
        reward(["a"], IMAGES[:1], usual=[1, 2])
    assert reward(["a"], IMAGES[:1], usual=[1]) == [1]


def test_it_is_started_again_when_it_dies(reward, tmp_path):
    (before,) = reward(["process"], IMAGES[:1])
    (file := tmp_path / "once").touch()
    assert reward(["a", str(file), "b"], IMAGES) == [1, 2, 77777]
    assert not file.exists()
    assert reward(["process"], IMAGES[:1]) != [before]


def test_not_for_ever(reward):
    with pytest.raises(RewardUnavailableError, match="ended twice on the same 2 images, with status 3"):
        reward(["a", "exit"], IMAGES[:2])


def test_an_interrupted_call_leaves_no_answer_behind(reward):
    reward(["a"], IMAGES[:1])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            reward(["slow"], IMAGES[:1])
    finally:
        signal.signal(signal.SIGINT, before)
    assert reward(["b"], IMAGES[1:2]) == [2]
    assert reward(["c"], IMAGES[2:]) == [77777]


def test_one_that_hangs():
    with pytest.raises(RewardUnavailableError, match="did not answer within 0.5 s .* twice on the same 1 images"):
        ProcessReward(NAME, timeout=0.5)(["hang"], IMAGES[:1])
    with pytest.raises(ValueError, match="timeout of .* must be above 0"):
        ProcessReward(NAME, timeout=0)


def test_a_reward_that_is_gone_has_no_process(reward):
    own = copy.copy(reward)
    (process,) = map(int, own(["process"], IMAGES[:1]))
    assert psutil.pid_exists(process)
    del own
    gc.collect()
    assert is_gone(process)


def test_what_is_printed_before_it_begins(reward, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text("print('hello from an unrelated package')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert copy.copy(reward)(["a"], IMAGES[:1]) == [1]


def test_columns_of_classes_of_the_script(reward, monkeypatch):
    own = type("Own", (), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "Own", own, raising=False)
    (before,) = reward(["process"], IMAGES[:1])
    with pytest.raises(TypeError, match="Column 'strange' cannot be had in another process: .*'Own'.*__main__"):
        reward(["a"], IMAGES[:1], usual=[1], strange=[own()])
    assert reward(["process"], IMAGES[:1]) == [before]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_its_gpu_is_that_of_the_caller(reward):
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        torch.cuda.init()
        assert copy.copy(reward)(["gpu"], IMAGES[:1]) == [last]


def run_script(tmp_path, *lines: str) -> int:
    """What the script prints, a process's id."""
    script = tmp_path / "script.py"
    imports = "import os, threading", "from PIL import Image", "from slas_trl.rewards import ProcessReward"
    first = f"reward = ProcessReward('{NAME}')", "images = [Image.new('RGB', (2, 2))]"
    tell = ("print(int(reward(['process'], images)[0]), flush=True)",)
    script.write_text("\n".join([*imports, *first, *tell, *lines]))
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60
    )
    return int(done.stdout)


def test_it_ends_with_its_parent(tmp_path):
    """However that ends. And a script need not be guarded: it is not run again."""
    assert is_gone(run_script(tmp_path, "os.kill(os.getpid(), 9)"))


def test_calls_that_hang_do_not_hold_their_parent(tmp_path):
    """In a thread of a pool, which is waited for at the end, and in one of its own, which is too."""
    own = "hang = lambda: copy.copy(reward)(['hang'], images)"
    pool = "ThreadPoolExecutor(1).submit(reward, ['hang'], images)"
    lines = "import copy", "from concurrent.futures import ThreadPoolExecutor", own, pool
    assert is_gone(run_script(tmp_path, *lines, "threading.Thread(target=hang).start()"))
