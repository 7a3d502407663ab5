"""Which rewards there are by name, with which options, and what is said of one that there is not."""

import functools
import inspect
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from slas_trl import rewards
from slas_trl.rewards.base import Reward
from slas_trl.rewards.remote_reward import ProcessReward
from slas_trl.rewards.resolve import masked, resolve_reward, reward_name


HERE = "tests.rewards.test_resolve"
PROMPTS, IMAGES = ["a cat"], [None]


def red(prompts, images, scale=1, **columns):
    return [scale] * len(images)


def shown(prompts, images, plain=None, whole: "int | None" = None, part: float = 0.0, text: str | None = "", **rest):
    return [f"{plain!r} {whole!r} {part!r} {text!r}"]


class Sharpness:
    def __init__(self, level: float = 0.5):
        self.level = level

    def __call__(self, prompts, images, **columns):
        return [self.level] * len(images)


@dataclass(frozen=True)
class Versioned(Reward):
    default_name = "versioned"
    version: str = "2"
    size: int | None = None

    def __call__(self, prompts, images, **columns):
        return [f"{self.version!r} {self.size!r}"]


versioned = Versioned()


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        *((red, "red"), (functools.partial(red, scale=2), "red"), (f"{HERE}:red", "red"), (f"{HERE}.red", "red")),
        *((Sharpness(), "Sharpness"), (Sharpness().__call__, "__call__"), ("shapes_verifier", "shapes_verifier")),
        *((versioned, "versioned"), (Versioned(name="other"), "other")),
    ],
)
def test_a_reward_has_a_name(reward, name):
    assert reward_name(resolve_reward(reward)) == name


@pytest.mark.parametrize(
    ("reward", "name", "score"),
    [
        (f"{HERE}:red:scale=3", "red", 3),
        (f"{HERE}:Sharpness:level=2", "Sharpness", 2),
        (f"{HERE}:versioned:version=2.10,size=7", "versioned", "'2.10' 7"),  # a version is text, a size a number
        (f"{HERE}:shown:plain=1e-3,whole=7,part=1e2,text=2", "shown", "0.001 7 100.0 '2'"),
        (f"{HERE}:shown:plain=False,whole=none,part=3,text=none", "shown", "False None 3 'none'"),
        (f"{HERE}:shown:plain=on", "shown", "'on' None 0.0 ''"),  # which YAML takes for true
        (f"{HERE}:versioned:name=other,version=cuda:1", "other", "'cuda:1' None"),
    ],
)
def test_a_reward_has_options(reward, name, score):
    function = resolve_reward(reward)
    assert reward_name(function) == name and versioned.size is None  # the reward itself is as it was
    assert function(prompts=PROMPTS, images=IMAGES) == [score]


def test_a_reward_in_a_process_of_its_own():
    assert resolve_reward(f"{HERE}:red:process=false") is red
    there = resolve_reward(f"{HERE}:red:process=true,scale=2")
    assert there == ProcessReward(f"{HERE}:red:scale=2") and reward_name(there) == "red"
    with pytest.raises(ValueError, match="'scael'"):
        resolve_reward(f"{HERE}:red:process=true,scael=1")


def test_a_function_of_a_file(tmp_path, monkeypatch):
    """The file may import what is beside it, also later; one that failed is read again."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_it.py").write_text("LEVEL = 0.5")
    (tmp_path / "lazily.py").write_text("FACTOR = 2")
    (file := tmp_path / "my_rewards.py").write_text("1 / 0")
    with pytest.raises(ValueError, match="division by zero"):
        resolve_reward(f"{file}:sharpness")
    file.write_text(
        "from beside_it import LEVEL\n"
        "def sharpness(prompts, images, level=LEVEL, **columns):\n"
        "    from lazily import FACTOR\n"
        "    return [level * FACTOR] * len(images)\n"
    )
    assert resolve_reward(f"{file}:sharpness:level=2.5")(PROMPTS, IMAGES) == [5]
    assert resolve_reward(f"{file}:sharpness") is resolve_reward(f"{file}:sharpness")


def test_a_class_of_a_file(tmp_path):
    file = tmp_path / "json.py"  # the name of another module
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Sharpness:\n"
        "    level: str = 'high'\n"
        "    def __call__(self, prompts, images, **columns):\n"
        "        return [self.level] * len(images)\n"
    )
    sharpness = resolve_reward(f"{file}:Sharpness:level=2.10")
    assert sharpness(PROMPTS, IMAGES) == ["2.10"]
    assert pickle.loads(pickle.dumps(sharpness)) == sharpness
    assert "level: str" in inspect.getsource(type(sharpness))
    assert hasattr(sys.modules["json"], "dumps")


@pytest.mark.parametrize(
    ("reward", "kind", "message"),
    [
        *((name, ValueError, f"'{name}'") for name in ("hpsv9", "no_such_module:red", "no.py:red", "")),
        *((f"{HERE}:{name}", ValueError, "There is no reward") for name in ("", "blueness")),
        ("shape_clip:name=a,batch_size=2", ValueError, "Did you mean 'shapes_clip'"),
        *((file, ValueError, "file.py:function") for file in ("folder/my.py", "folder/my.py:")),
        *((several, ValueError, "YAML") for several in ("hpsv2,ocr", "hpsv2:version=v2.0,ocr", "a.py:r,b.py:r")),
        *((nothing, TypeError, "reward") for nothing in (3, None, "math:pi", Sharpness)),
        (f"{HERE}:red:color=1", ValueError, "no option 'color'; it has scale"),
        (f"{HERE}:Sharpness:level=high", ValueError, "level must be .*, but got level=high"),
    ],
)
def test_what_is_refused(reward, kind, message):
    with pytest.raises(kind, match=message):
        resolve_reward(reward)


SECRET = "pa55w0rd"


@pytest.mark.parametrize(
    ("reward", "kept"),
    [
        (f"remote:url=http://user:a%40{SECRET}@host", "'remote'"),
        (f"remote:url=http://user:a,{SECRET}@host,retries=3", "option=value"),
        (f"vlm_judge:url=http://host/v1?key={SECRET},model=x,answer=maybe", "url"),
        (f"remote:url=http://host, token = {SECRET},retries=x", "retries=x"),
        (f"remote:tokne={SECRET},url=http://host", "no option 'tokne'"),
        (f"remote:url=http://host,token=a {SECRET},retries=3", "'remote'"),
        (f"token={SECRET}.py", "token="),
        (f"{HERE}:red:Authorization=Bearer {SECRET}", "option"),
        (f"{HERE}:shown:whole=token:{SECRET}@x", "option whole"),
        ({"remote": {"token": SECRET}}, "remote"),
    ],
)
def test_secrets_are_not_shown(reward, kept):
    with pytest.raises((ValueError, TypeError)) as error:
        resolve_reward(reward)
    assert SECRET not in str(error.value) and kept in str(error.value)


def test_what_is_no_secret_is_shown():
    for plain in ("me@host/a.py:taste", "vlm_judge:max_tokens=3,api_key_env=KEY", "--adapter=user/name@branch"):
        assert masked(plain) == plain
    assert masked(f"--hub_token {SECRET} --seed 3") == "--hub_token *** --seed 3"
    assert SECRET not in repr(ProcessReward(f"remote:url=http://host,token={SECRET}"))


@pytest.mark.parametrize("name", rewards.NAMES)
def test_every_name_is_a_reward(name):
    reward = getattr(rewards, name)
    assert callable(reward) and name in dir(rewards)
    assert reward.measures and reward.blind_to  # for the model card
    assert not getattr(reward, "sees_videos", True) or name == "remote"
    assert not Path(rewards.__file__).with_name(f"{name}.py").exists()  # which importing it would put in its place
    with pytest.raises(AttributeError, match="shapes_clip"):
        rewards.no_such_reward  # noqa: B018
