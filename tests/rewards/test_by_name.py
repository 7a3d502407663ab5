"""Which rewards there are by name, with which options, and what is said of one that there is not."""

import functools
import inspect
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from slas_trl import rewards
from slas_trl.rewards.base import Reward
from slas_trl.rewards.by_name import masked, resolve_reward, reward_name
from slas_trl.rewards.process import ProcessReward


ROOT = Path(__file__).parents[2]
HERE = "tests.rewards.test_by_name"
PROMPTS, IMAGES = ["a cat"], [None]


def red(prompts, images, scale=1, **columns):
    return [scale] * len(images)


def shown(prompts, images, plain=None, whole: "int | None" = None, part: float = 0.0, mixed: int | str = 0, **columns):
    return [f"{plain!r} {whole!r} {part!r} {mixed!r}"]


def where_am_i(prompts, images, shift=0, **columns):
    return [os.getpid() + shift for _ in images]


class Sharpness:
    def __init__(self, level: float = 0.5):
        self.level = level

    def __call__(self, prompts, images, **columns):
        return [self.level] * len(images)

    def method(self, prompts, images, **columns):
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
        (red, "red"),
        (functools.partial(red, scale=2), "red"),
        (Sharpness(), "Sharpness"),
        (Sharpness().method, "method"),
        (versioned, "versioned"),
        (Versioned(name="other"), "other"),
        (f"{HERE}:red", "red"),
        (f"{HERE}.red", "red"),
        ("shapes_verifier", "shapes_verifier"),
    ],
)
def test_a_reward_has_a_name(reward, name):
    assert reward_name(resolve_reward(reward)) == name


@pytest.mark.parametrize(
    ("reward", "name", "score"),
    [
        (f"{HERE}:red:scale=3", "red", 3),
        (f"{HERE}:Sharpness:level=2", "Sharpness", 2),
        (f"{HERE}:versioned", "versioned", "'2' None"),
        (f"{HERE}:versioned:version=2.10,size=7", "versioned", "'2.10' 7"),  # a version is text, a size a number
        (f"{HERE}:shown:plain=1e-3,whole=7,part=1e2,mixed=2", "shown", "0.001 7 100.0 2"),
        (f"{HERE}:shown:plain=False,whole=none,part=3,mixed=none", "shown", "False None 3.0 'none'"),
        (f"{HERE}:shown:plain=null", "shown", "None None 0.0 0"),
        (f"{HERE}:shown:plain=v2.0", "shown", "'v2.0' None 0.0 0"),
        (f"{HERE}:versioned:name=other,version=cuda:1", "other", "'cuda:1' None"),
    ],
)
def test_a_reward_has_options(reward, name, score):
    function = resolve_reward(reward)
    assert reward_name(function) == name
    assert function(prompts=PROMPTS, images=IMAGES) == [score]


def test_a_reward_in_a_process_of_its_own():
    here = resolve_reward(f"{HERE}:where_am_i:process=false")
    there = resolve_reward(f"{HERE}:where_am_i:process=true,shift=0.5")
    assert reward_name(there) == "where_am_i"
    assert here(prompts=["a"], images=[None]) == [os.getpid()]
    [pid] = there(prompts=["a"], images=[Image.new("RGB", (2, 2))])
    assert pid % 1 == 0.5 and int(pid) != os.getpid()
    with pytest.raises(ValueError, match="no option 'shfit'; it has shift"):
        resolve_reward(f"{HERE}:where_am_i:process=true,shfit=1")


def test_options_leave_the_reward_itself_as_it_is():
    resolve_reward(f"{HERE}:versioned:size=7")
    assert versioned.size is None


def test_a_function_of_a_file(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text("def sharpness(prompts, images, level=1, **columns):\n    return [level] * len(images)\n")
    assert resolve_reward(f"{file}:sharpness")(PROMPTS, IMAGES) == [1]
    assert resolve_reward(f"{file}:sharpness:level=2.5")(PROMPTS, IMAGES) == [2.5]
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


def test_a_file_imports_what_is_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_it.py").write_text("LEVEL = 0.5")
    (tmp_path / "lazily.py").write_text("FACTOR = 2")
    file = tmp_path / "my_rewards.py"
    file.write_text(
        "from beside_it import LEVEL\n"
        "def red(prompts, images, **columns):\n"
        "    from lazily import FACTOR\n"
        "    return [LEVEL * FACTOR] * len(images)\n"
    )
    assert resolve_reward(f"{file}:red")(PROMPTS, IMAGES) == [1]
    file = tmp_path / "relative.py"
    file.write_text("from .beside_it import LEVEL as red")
    with pytest.raises(ValueError, match="relative import.*without its dot"):
        resolve_reward(f"{file}:red")


def test_a_file_that_fails_is_read_again(tmp_path):
    file = tmp_path / "my_rewards.py"
    file.write_text("1 / 0")
    before = set(sys.modules)
    with pytest.raises(ValueError, match="division by zero"):
        resolve_reward(f"{file}:red")
    assert set(sys.modules) == before
    file.write_text("def red(prompts, images, **columns):\n    return [1.0] * len(images)\n")
    assert resolve_reward(f"{file}:red")(PROMPTS, IMAGES) == [1]


@pytest.mark.parametrize(
    "name",
    ["hpsv9", "no_such_module:red", f"{HERE}:blueness", f"{HERE}:", f"{HERE}.blueness", "no_such_file.py:red", ""],
)
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match=f"There is no reward '{name}'.*package.module:function"):
        resolve_reward(name)


def test_the_nearest_name_is_offered():
    with pytest.raises(ValueError, match="Did you mean 'shapes_clip'"):
        resolve_reward("shape_clip:name=a,batch_size=2")
    for own in ("./ocr.py:red", "shapes.clip:red"):
        with pytest.raises(ValueError) as error:
            resolve_reward(own)
        assert "Did you mean" not in str(error.value)


def test_a_file_needs_a_function():
    for name in ("folder/my_rewards.py", "folder/my_rewards.py:"):
        with pytest.raises(ValueError, match='is a file; expected .* "folder/my_rewards.py:function"'):
            resolve_reward(name)


@pytest.mark.parametrize("name", ["hpsv2,ocr", "hpsv2:version=v2.0,ocr", "a.py:red,b.py:red", "ocr,hpsv2:name=a"])
def test_several_names_in_one(name):
    with pytest.raises(ValueError, match="separated by spaces on the command line, and are a list in YAML"):
        resolve_reward(name)


@pytest.mark.parametrize("reward", [3, None, "math:pi"])
def test_what_cannot_be_called_is_refused(reward):
    with pytest.raises(TypeError, match="reward"):
        resolve_reward(reward)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("red:scale", "must be of the form option=value"),
        ("red:colour=1", "no option 'colour'; it has scale"),
        ("versioned:versoin=1", "no option 'versoin'; it has .*version"),
        ("Sharpness:blur=1", "no option 'blur'; it has level"),
        ("Sharpness:level=high", "option level .* must be a number, but got \\w+=high"),
        ("versioned:size=1e2", "option size .* must be a whole number or none, but got \\w+=1e2"),
        ("shown:whole=x", "option whole .* must be a whole number or none, but got \\w+=x"),
        ("where_am_i:process=1", "option process .* must be true or false, but got \\w+=1"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resolve_reward(f"{HERE}:{options}")


SECRET = "pa55w0rd"


@pytest.mark.parametrize(
    ("reward", "kept"),
    [
        (f"remote:url=http://user:{SECRET}@host:9/", "'remote'"),
        (f"remote:url=http://{SECRET}@host,retries=-1", "url with an @"),
        (f"remote:url=http://user:{SECRET}@@host", "'remote'"),
        (f"remote:url=http://user:a%40{SECRET}@host", "'remote'"),
        (f"remote:url=http://user:a/{SECRET}@host", "'remote'"),
        (f"remote:url=http://user:a,{SECRET}@host,retries=3", "option=value"),
        (f"remote:url=user:{SECRET}@host", "'remote'"),
        (f"vlm_judge:url=http://host/v1?key={SECRET},model=x,answer=maybe", "http://host/v1'"),
        (f"remote:token={SECRET},url=ftp://host", "ftp://host"),
        (f"remote:url=http://host, token = {SECRET},retries=x", "retries=x"),
        (f"remote:token=a,{SECRET},url=http://host", "option=value"),
        (f"remote:tokne={SECRET},url=http://host", "no option 'tokne'"),
        (f"remote:url=http://host?sig={SECRET},retries=-1", "http://host'"),
        (f"remote:url=http://host,token=a {SECRET},retries=-1", "'remote'"),
        (f"vlm_judge:url=http://host,api_key={SECRET},max_tokens=x", "max_tokens=x"),
        (f"process:reward=remote:token={SECRET}", "process"),
        (f"remot:token={SECRET}", "remote"),
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
    for plain in (
        "me@host/a.py:taste",
        "vlm_judge:max_tokens=3,api_key_env=KEY",
        "--adapter=user/name@branch",
    ):
        assert masked(plain) == plain
    assert masked(f"--hub_token {SECRET} --seed 3") == "--hub_token *** --seed 3"
    assert SECRET not in repr(ProcessReward(f"remote:url=http://host,token={SECRET}"))


def test_every_name_is_a_reward():
    for name in rewards.NAMES:
        assert callable(getattr(rewards, name))
    with pytest.raises(AttributeError, match="shapes_clip"):
        rewards.no_such_reward  # noqa: B018


def test_a_reward_is_not_hidden_by_the_file_of_its_name():
    # In a process of its own: this one has long imported everything.
    code = """
import slas_trl.rewards.ocr
from slas_trl import rewards
from slas_trl.rewards import ocr
assert type(ocr).__name__ == "OCR", ocr
assert rewards.ocr is ocr is slas_trl.rewards.ocr
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
