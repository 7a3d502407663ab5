"""A reward on a server, or in a process: the same scores, whatever is sent, and through the death of either."""

import contextlib
import copy
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from PIL import Image


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from slas_trl.images import to_rgb  # noqa: E402
from slas_trl.rewards import ProcessReward, RemoteReward, remote  # noqa: E402
from slas_trl.rewards.base import RewardUnavailableError  # noqa: E402
from slas_trl.rewards.resolve import resolve_reward, reward_name  # noqa: E402
from tests.rewards.served_rewards import later, numbers, picture, with_columns  # noqa: E402
from tests.rewards.serving import HERE, ROOT, ServedProcess, answering, served  # noqa: E402


pytestmark = pytest.mark.rewards


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("slas_trl.rewards.http._FIRST_WAIT", 0.02)
    monkeypatch.setattr("slas_trl.rewards.http._LONGEST_WAIT", 0.2)


@pytest.fixture(scope="module")
def url():
    with served(numbers, max_batch_size=4) as url:
        yield url


# What it returns


def test_scores_are_those_of_the_reward_itself(url):
    images = [picture(number) for number in (0, 1, 77777, 2**24 - 1)]
    prompts = ["a", "b", "none", "d"]
    assert RemoteReward(url)(prompts, images) == numbers(prompts, images, images) == [0.0, 0.125, None, 2097151.875]
    assert RemoteReward(url)([], []) == []
    with pytest.raises(ValueError, match="remote: .* answered 500: ValueError: the prompt is bad"):
        RemoteReward(url)(["a", "bad"], images[:2])
    with served(later) as other:  # an asynchronous one
        assert RemoteReward(other)(["a"], [picture(3)]) == [3.0]


def test_more_images_than_the_server_takes_at_a_time(url):
    images = [picture(number) for number in range(11)]
    assert RemoteReward(url)(["a"] * 11, images) == [number / 8 for number in range(11)]
    images = [Image.effect_noise((64, 64), 50) for _ in range(5)]
    with served(numbers, max_request_bytes=24_000) as other:
        assert RemoteReward(other)(["a"] * 5, images, before=images) == numbers(["a"] * 5, images, images)


@pytest.mark.parametrize("mode", ["1", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_pictures_arrive_with_their_pixels(mode):
    arrived = []

    def keep(prompts, images, **columns):
        arrived.extend(images)
        return [0.0] * len(images)

    noise = Image.merge("RGB", [Image.effect_noise((7, 5), 90) for _ in range(3)])
    image = Image.new(mode, (7, 5), 40000) if mode[0] in "IF" else noise.convert(mode)
    with served(keep) as url:
        RemoteReward(url)(["a", "b"], [image, [image, image]])  # the second is a video
    if mode in ("CMYK", "F"):
        image = to_rgb(image)
    for found in (arrived[0], *arrived[1]):
        assert (found.size, found.mode, found.tobytes()) == (image.size, image.mode, image.tobytes())
    assert len(arrived[1]) == 2


def test_columns_and_components():
    images = [picture(number) for number in (5, 6)]
    columns = {"offset": [{"by": [1, "é", None]}, {"by": (2.5,)}], "reference": [picture(9), None]}
    with served(with_columns, max_batch_size=1) as url:
        # The state is not one value for each image: no column.
        scores = RemoteReward(url)(["a", "b"], images, completions=images, trainer_state=object(), **columns)
    assert scores == {"own": [6, 8.5], "reference": [9, None]}


LIMITS = (200, b'{"limits": {"max_batch_size": 4, "max_image_pixels": 1000, "max_request_bytes": 10000}}')


@pytest.mark.parametrize("scores", ["[1, 2]", '["1"]', "[1e999]", "null", "{}", '{"a": 1}'])
def test_scores_that_are_none(monkeypatch, scores):
    monkeypatch.setattr("uuid.uuid4", lambda: type("Known", (), {"hex": "known"}))
    answer = (200, f'{{"id": "known", "scores": {scores}}}'.encode())
    other = (200, b'{"id": "other", "scores": [1]}')
    for answers in ((LIMITS, answer), (LIMITS, other), ((200, b"{}"),)):
        with answering(*answers) as server, pytest.raises(ValueError, match="something else than expected"):
            RemoteReward(server.url)(["a"], [picture(8)])


# What it sends


def test_columns_that_json_does_not_have(url):
    reward, images = RemoteReward(url), [picture(8), picture(8)]
    for value in (object(), float("nan"), [b"bytes"]):
        with pytest.raises(ValueError, match="'strange': .*columns=first"):
            reward(["a", "b"], images, strange=[1, value], usual=[1, 2])
    for columns in ("usual", ["usual"], ""):
        assert RemoteReward(url, columns=columns)(["a", "b"], images, strange=[1, object()], usual=[1, 2]) == [1, 1]
    with pytest.raises(ValueError, match="'usal': .*columns=first"):
        RemoteReward(url, columns="usal")(["a", "b"], images, usual=[1, 2])
    with pytest.raises(ValueError, match="longer"):
        reward(["a", "b"], images, usual=[1, 2, 3])


def test_by_name(url):
    reward = resolve_reward(f"remote:url={url},name=hps,timeout=20,columns=first+second")
    assert reward == remote(url, timeout=20, columns="first+second", name="hps") and reward_name(reward) == "hps"
    for wrong in ("", ":url=x", f":url={url},token=two words"):
        with pytest.raises(ValueError, match="remote"):
            resolve_reward(f"remote{wrong}")


def test_tokens(monkeypatch):
    with served(numbers, token="s3cret-s3cret") as locked:
        reward = RemoteReward(locked, token="s3cret-s3cret")
        assert reward(["a"], [picture(8)]) == [1.0]
        monkeypatch.setenv("SLAS_TRL_REWARD_TOKEN", "s3cret-s3cret")
        assert RemoteReward(locked)(["a"], [picture(8)]) == [1.0]
        wrong = RemoteReward(locked, token="wr0ng-wr0ng")
        with pytest.raises(ValueError, match="answered 401: The token is missing or wrong") as error:
            wrong(["a"], [picture(8)])
    assert not {"s3cret", "wr0ng"} & set(repr([reward, wrong, error.value]).split("-"))


# Kills


def test_many_requests_through_a_kill(tmp_path):
    """Of eight clients, while the server ends and is started again: every score is there, once, and in its place."""
    done, middle = itertools.count(1), threading.Event()
    numbered = [[3 * request + i for i in range(1 + request % 3)] for request in range(400)]

    def ask(request: int) -> list[float | None]:
        own = numbered[request]
        scores = reward([f"prompt {number}" for number in own], [picture(number) for number in own])
        if next(done) == 150:
            middle.set()
        return scores

    with ServedProcess(f"{HERE}:numbers", "--max_batch_size", "2", log=tmp_path / "log", grace=0.01) as server:
        reward = RemoteReward(server.url, retries=2000)
        assert server.name == "numbers"
        with ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(ask, request) for request in range(400)]
            while not middle.is_set():
                time.sleep(0.01)
            server.kill()
            before = sum(answer.done() for answer in answers)
            server.start()
            scores = [answer.result() for answer in answers]
    assert before < 360
    assert scores == [[number / 8 for number in own] for own in numbered]


# In a process of its own


NAME = f"{HERE}:in_process"
IMAGES = [picture(number) for number in (1, 2, 77777)]


@pytest.fixture(scope="module")
def reward():
    """The process finds modules where this one does, wherever it is started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        yield ProcessReward(NAME)


def test_a_process_of_its_own(reward, capfd):
    assert reward(["a", "b", "c"], IMAGES, usual=[1, IMAGES[0], None], trainer_state=object()) == [1, 2, 77777]
    (first,) = reward(["process"], IMAGES[:1])
    assert first != os.getpid()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda _: reward(["process", "b"], IMAGES[:2]), range(8))) == [[first, 2]] * 8
    printed = capfd.readouterr()
    assert printed.out == "" and "a line that is printed" in printed.err
    with pytest.raises(ValueError, match="in_process.*KeyError: 'of a kind'"):
        reward(["raise"], IMAGES[:1])
    with pytest.raises(ValueError, match="strange"):
        reward(["a"], IMAGES[:1], strange=[object()])
    assert reward(["process"], IMAGES[:1]) == [first]
    assert copy.deepcopy(reward)(["process"], IMAGES[:1]) != [first]


def test_names_of_processes(reward):
    assert reward_name(reward) == "in_process"
    assert reward_name(ProcessReward("remote:url=http://127.0.0.1:1,name=hps")) == "hps"
    assert reward_name(ProcessReward(f"{NAME}:scale=2", name="other")) == "other"
    assert ProcessReward("ocr").blind_to == resolve_reward("ocr").blind_to
    with pytest.raises(ValueError, match="size"):
        ProcessReward(f"{NAME}:size=1")


def test_it_is_started_again_when_it_dies(tmp_path):
    (file := tmp_path / "once").touch()
    reward = resolve_reward(f"{NAME}:process=true,scale=3")
    assert reward(["a", str(file), "b"], IMAGES) == [3, 6, 233331]
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
    """Within 10 seconds."""
    for _ in range(100):
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.1)
                continue
        return True
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
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, timeout=60)
    assert is_gone(int(done.stdout))
