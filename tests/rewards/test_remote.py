"""A reward on another machine: its scores are those of here, whatever happens to the server in between."""

import copy
import itertools
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from slas_trl.images import to_rgb
from slas_trl.rewards import RemoteReward, remote
from slas_trl.rewards.base import RewardUnavailableError
from slas_trl.rewards.by_name import resolve_reward, reward_name


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from tests.rewards.served_rewards import later, numbers, picture, redness, with_columns  # noqa: E402
from tests.rewards.serving import HERE, ROOT, ServedProcess, served  # noqa: E402
from tests.trainer.tiny_trainers import logged, tiny_trainer  # noqa: E402


pytestmark = pytest.mark.rewards


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses between attempts."""
    monkeypatch.setattr("slas_trl.rewards.http_client._FIRST_WAIT", 0.02)
    monkeypatch.setattr("slas_trl.rewards.http_client._LONGEST_WAIT", 0.2)


@pytest.fixture(scope="module")
def url():
    with served(numbers, max_batch_size=4) as url:
        yield url


# What it returns


def test_scores_are_those_of_the_reward_itself(url):
    images = [picture(number) for number in (0, 1, 77777, 2**24 - 1)]
    prompts = ["a", "b", "c", "d"]
    assert (
        RemoteReward(url)(prompts, images) == numbers(prompts, images, images) == [0.0, 0.125, 9722.125, 2097151.875]
    )
    assert RemoteReward(url)([], []) == []


def test_more_images_than_the_server_takes_at_a_time(url):
    images = [picture(number) for number in range(11)]
    assert RemoteReward(url)(["a"] * 11, images) == [number / 8 for number in range(11)]


def test_many_large_images_are_sent_in_several_requests():
    images = [Image.effect_noise((64, 64), 50) for _ in range(5)]
    # Of bytes, and of pixels: of the column's pictures too.
    for limits in ({"max_request_bytes": 12_000}, {"max_batch_size": 3, "max_image_pixels": 64 * 64}):
        with served(numbers, **limits) as url:
            scores = RemoteReward(url)(["a"] * 5, images, before=images)
        assert scores == numbers(["a"] * 5, images, images)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "HSV", "I;16", "I", "F"])
def test_pictures_arrive_with_their_pixels(mode):
    arrived = []

    def keep(prompts, images, **columns):
        arrived.extend(images)
        return [0.0] * len(images)

    noise = Image.merge("RGB", [Image.effect_noise((7, 5), 90) for _ in range(3)])
    image = Image.new(mode, (7, 5), 40000) if mode[0] in "IF" else noise.convert(mode)
    with served(keep) as url:
        RemoteReward(url)(["a"], [image])
    assert arrived[0].size == (7, 5)
    if mode in ("CMYK", "HSV", "I", "F"):
        image = to_rgb(image)
    assert arrived[0].mode == image.mode and arrived[0].tobytes() == image.tobytes()


def test_columns_and_components():
    images = [picture(number) for number in (5, 6)]
    columns = {
        "offset": [{"by": [1, "é", None]}, {"by": (2.5,)}],
        "reference": [picture(9), None],
        "trainer_state": object(),  # not one value for each image: no column
    }
    with served(with_columns, max_batch_size=1) as url:
        scores = RemoteReward(url)(["a", "b"], images, completions=images, **columns)
    assert scores == {"own": [6, 8.5], "reference": [9, None]}


def test_an_asynchronous_reward():
    with served(later) as url:
        assert RemoteReward(url)(["a"], [picture(3)]) == [3.0]


def test_an_image_that_fails_is_none(url, caplog):
    images = [picture(number) for number in (8, 16, 24)]
    assert RemoteReward(url)(["a", "bad", "none"], images) == [1.0, None, None]
    (record,) = (record for record in caplog.records if record.name == "slas_trl.rewards.remote")
    assert record.levelno == logging.WARNING
    assert "1 of 3 images" in record.message and "ValueError: the prompt is bad" in record.message


def test_an_image_that_fails_is_none_in_any_company(url, caplog):
    """However many images a call has, and a request."""
    reward, bad, good = RemoteReward(url), picture(1), picture(8)
    assert reward(["bad"], [bad]) == [None]
    assert reward(["bad"] * 5 + ["a"], [bad] * 5 + [good]) == [None] * 5 + [1.0]  # four in a request
    assert "5 of 6 images" in caplog.records[-1].message
    assert copy.deepcopy(reward)(["bad"], [bad]) == [None]

    def parts(prompts, images, **columns):
        return {"a": numbers(prompts, images, images), "b": [2] * len(images)}

    with served(parts, max_batch_size=1) as others:
        assert RemoteReward(others)(["bad", "a"], [bad, good]) == {"a": [None, 1.0], "b": [None, 2.0]}
        assert RemoteReward(others)(["bad"], [bad]) == [None]


def test_a_reward_that_always_fails_is_not_silent(url):
    reward, bad = RemoteReward(url), [picture(1), picture(2)]
    for _ in range(2):
        for _ in range(4):
            assert reward(["bad", "bad"], bad) == [None, None]
        assert reward(["a"], [picture(8)]) == [1.0]  # it begins anew
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: reward(["bad"], bad[:1]), range(4)))
    for _ in range(2):
        with pytest.raises(ValueError, match="no image in 5 calls in a row.*ValueError: the prompt is bad"):
            reward(["bad", "bad"], bad)
    assert reward(["a"], [picture(8)]) == [1.0]


# What it sends


def test_columns_that_json_cannot_say(url):
    reward, images = RemoteReward(url), [picture(8), picture(8)]
    for value in (object(), float("nan"), {1: 2}, {"image/png": "text"}, [b"bytes"]):
        with pytest.raises(ValueError, match="column 'strange' holds .*columns=first"):
            reward(["a", "b"], images, strange=[1, value], usual=[1, 2])
    for columns in ("usual", ["usual"], ""):
        assert RemoteReward(url, columns=columns)(["a", "b"], images, strange=[1, object()], usual=[1, 2]) == [1, 1]
    with pytest.raises(ValueError, match="no column 'usal' to send; there are usual"):
        RemoteReward(url, columns="usal")(["a", "b"], images, usual=[1, 2])
    with pytest.raises(ValueError, match="'usual' has 3 values for 2 images"):
        reward(["a", "b"], images, usual=[1, 2, 3])
    with pytest.raises(ValueError, match="1 prompts and 2 images"):
        reward(["a"], images)


def test_by_name(url):
    reward = resolve_reward(f"remote:url={url},name=hps,timeout=20,columns=first+second")
    assert reward == remote(url, timeout=20, columns="first+second", name="hps")
    assert reward_name(reward) == "hps"
    with pytest.raises(ValueError, match="url"):
        resolve_reward("remote")


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://x", "http://", "http://x:port", "http://x?a=b", "", None])
def test_what_is_no_url(url):
    with pytest.raises(ValueError, match="url"):
        RemoteReward(url)


@pytest.mark.parametrize(("options", "message"), [({"timeout": 0}, "timeout"), ({"retries": -1}, "retries")])
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=f"{message} of remote"):
        RemoteReward("http://127.0.0.1:1", **options)


# Tokens


def test_tokens(monkeypatch, caplog, url):
    caplog.set_level(logging.DEBUG)
    secret = "s3cret-s3cret"
    with served(numbers, token=secret) as locked:
        reward = RemoteReward(locked, token=secret)
        assert reward(["a"], [picture(8)]) == [1.0]
        monkeypatch.setenv("SLAS_TRL_REWARD_TOKEN", secret)
        assert RemoteReward(locked)(["a"], [picture(8)]) == [1.0]
        wrong = RemoteReward(locked, token="wr0ng-wr0ng")
        with pytest.raises(ValueError, match="answered 401: The token is missing or wrong") as error:
            wrong(["a"], [picture(8)])
    said = repr([reward, wrong, error.value]) + str(error.value) + caplog.text
    assert secret not in said and "wr0ng" not in said
    for strange in (
        "http://user:passw0rd@host",
        "http://user:a/passw0rd@host",
        "//passw0rd@host",
        "ftp://h?key=passw0rd",
    ):
        with pytest.raises(ValueError, match="url") as error:
            RemoteReward(strange)
        assert "passw0rd" not in str(error.value)
    with pytest.raises(ValueError, match="visible ASCII") as error:
        RemoteReward(url, token="two words")
    assert "two words" not in str(error.value)


# Servers that are away, or are not what they seem


@pytest.fixture
def nobody():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


def test_the_end_of_the_program_is_not_held(nobody, tmp_path):
    """By a call in a thread that would wait for two minutes."""
    (script := tmp_path / "script.py").write_text(
        "import time\nfrom concurrent.futures import ThreadPoolExecutor\nfrom PIL import Image\n"
        f"from slas_trl.rewards import remote\nreward = remote('{nobody}')\n"
        "call = ThreadPoolExecutor(1).submit(reward, ['a'], [Image.new('RGB', (2, 2))])\n"
        "time.sleep(0.5)\nprint(call.running())"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


def test_nobody_answers(nobody):
    with pytest.raises(
        RewardUnavailableError, match=f"{nobody}/health did not answer in 3 attempts.*ConnectError.*serve"
    ):
        RemoteReward(nobody, retries=2)(["a"], [picture(8)])


class Strange(BaseHTTPRequestHandler):
    """Answers what the test tells it to."""

    def do_GET(self):
        self.server.seen += 1
        status, body, *headers = self.server.answers[min(self.server.seen, len(self.server.answers)) - 1]
        if status is None:
            time.sleep(body)
            return
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def strange():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Strange)
    server.seen, server.url = 0, f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


LIMITS = (200, b'{"limits": {"max_batch_size": 4, "max_image_pixels": 1000, "max_request_bytes": 10000}}')


@pytest.mark.parametrize("status", [502, 503, 504])
def test_it_is_asked_again_where_there_is_hope(strange, status):
    strange.answers = [(status, b"<html>busy</html>", ("Retry-After", "1"))]
    start = time.monotonic()
    with pytest.raises(RewardUnavailableError, match=f"2 attempts.*{status}: <html>busy"):
        RemoteReward(strange.url, retries=1)(["a"], [picture(8)])
    assert strange.seen == 2
    assert time.monotonic() - start >= 1  # the second that it asks for


@pytest.mark.parametrize("status", [307, 400, 404, 413, 500])
def test_it_is_not_asked_again_where_there_is_none(strange, status):
    strange.answers = [LIMITS, (status, b'{"detail": "its own words"}', ("Location", "http://127.0.0.1:1"))]
    with pytest.raises(ValueError, match=f"answered {status}: its own words"):
        RemoteReward(strange.url)(["a"], [picture(8)])
    assert strange.seen == 2


def test_it_does_not_wait_for_ever(strange):
    strange.answers = [(None, 1.0)]
    with pytest.raises(RewardUnavailableError, match="2 attempts; the last one: no answer in 0.1 s"):
        RemoteReward(strange.url, timeout=0.1, retries=1)(["a"], [picture(8)])


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"id": "of another"}',
        b'{"scores": [NaN]}',
        b" " * (16 * 2**20 + 1),
    ],
)
def test_answers_that_are_none(strange, answer):
    strange.answers = [LIMITS, (200, answer)]
    with pytest.raises(ValueError, match="answered something else than expected.*serve-reward"):
        RemoteReward(strange.url)(["a"], [picture(8)])


@pytest.mark.parametrize("scores", ["[1, 2]", "[]", '["1"]', "[true]", "1", "null", '{"a": 1}', "[[1]]"])
def test_scores_that_are_none(strange, monkeypatch, scores):
    monkeypatch.setattr("uuid.uuid4", lambda: type("Known", (), {"hex": "known"}))
    whole = '{"id": "known", "errors": [null], "scores": %s}'
    strange.answers = [LIMITS, (200, (whole % scores).encode())]
    with pytest.raises(ValueError, match="scores are|scores hold"):
        RemoteReward(strange.url)(["a"], [picture(8)])
    strange.seen = 0
    strange.answers[1] = (200, (whole % "[0.5]").encode())
    assert RemoteReward(strange.url)(["a"], [picture(8)]) == [0.5]


def test_the_generator_of_the_training_is_left_alone(strange):
    before = random.getstate()
    strange.answers = [(503, b"")]
    with pytest.raises(RewardUnavailableError):
        RemoteReward(strange.url, retries=1)(["a"], [picture(8)])
    assert random.getstate() == before


# Kills


@pytest.mark.parametrize(
    "signals", [[], [signal.SIGTERM], [signal.SIGINT] * 2], ids=["kill", "SIGTERM", "Ctrl-C twice"]
)
def test_a_thousand_requests_through_a_kill(tmp_path, signals):
    """Of eight clients, while the server ends and is started again: every score is there, once, and in its place."""
    done, ids = itertools.count(1), itertools.count(1)
    numbered = [[next(ids) for _ in range(1 + request % 3)] for request in range(1000)]
    middle = threading.Event()

    def ask(request: int) -> list[float | None]:
        own = numbered[request]
        scores = reward([f"prompt {number}" for number in own], [picture(number) for number in own])
        if next(done) == 400:
            middle.set()
        return scores

    with ServedProcess(f"{HERE}:numbers", "--max_batch_size", "2", log=tmp_path / "log", grace=0.01) as server:
        reward = RemoteReward(server.url, retries=100)
        assert server.name == "numbers"
        with ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(ask, request) for request in range(1000)]
            while not middle.is_set():
                time.sleep(0.01)
            server.stop(*signals) if signals else server.kill()
            before = sum(answer.done() for answer in answers)
            server.start()
            scores = [answer.result() for answer in answers]
    assert before < 900
    assert scores == [[number / 8 for number in own] for own in numbered]


def test_training_through_a_kill(tmp_path):
    """The rewards, and so the run, are those of the reward in the trainer's own process."""
    local = tiny_trainer(tmp_path / "local", max_steps=3, reward_funcs=redness)
    local.train()

    with ServedProcess(f"{HERE}:redness", log=tmp_path / "log") as server:
        far = RemoteReward(server.url, retries=100, name="redness")
        calls = itertools.count(1)

        def killed_before_the_third_call(prompts, images, **columns):
            if next(calls) == 3:
                server.kill()
                threading.Timer(0.2, server.start).start()
            return far(prompts, images, **columns)

        killed_before_the_third_call.__name__ = "redness"
        trainer = tiny_trainer(tmp_path / "far", max_steps=3, reward_funcs=killed_before_the_third_call)
        trainer.train()
    keys = ("loss", "reward", "reward_std", "rewards/redness/mean", "grad_norm")
    expected = [[line[key] for key in keys] for line in logged(tmp_path / "local")]
    assert [[line[key] for key in keys] for line in logged(tmp_path / "far")] == expected
    assert len(expected) == 3 and next(calls) > 3
