"""The server of rewards, as a process that is sent what nobody should send; it says what is wrong, and lives on."""

import base64
import io
import json
import logging
import signal
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from PIL import Image


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from slas_trl import __version__  # noqa: E402
from slas_trl.rewards.base import RewardUnavailableError  # noqa: E402
from slas_trl.rewards.wire import encode_picture  # noqa: E402
from tests.rewards.served_rewards import picture  # noqa: E402
from tests.rewards.serving import HERE, ServedProcess, served  # noqa: E402


pytestmark = pytest.mark.rewards

TOKEN = "a-token-of-the-test"
LIMITS = {"max_batch_size": 4, "max_image_pixels": 4096, "max_request_bytes": 100000, "max_waiting": 1}
OPTIONS = [word for name, value in LIMITS.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with ServedProcess(f"{HERE}:numbers", *OPTIONS, log=log, SLAS_TRL_REWARD_TOKEN=TOKEN) as server:
        yield server


@pytest.fixture
def post(server):
    """Sends a body; and when the test is over, a good request has to be answered."""

    def send(body, **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}", **headers}
        return httpx2.post(f"{server.url}/score", content=content, headers=given, timeout=20)

    yield send
    answer = send(request(["a", "b"], [picture(8), picture(16)]))
    assert (answer.status_code, answer.json()) == (200, {"id": "x", "scores": [1.0, 2.0]})
    assert server.process.poll() is None


def request(prompts, images, **more):
    return {"id": "x", "prompts": prompts, "images": [encode_picture(image) for image in images], **more}


GOOD = request(["a"], [picture(8)])


def refused(answer: httpx2.Response, status: int, message: str) -> None:
    assert answer.status_code == status, answer.text
    assert message in answer.json()["detail"]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width: int, height: int) -> str:
    """A PNG file of few bytes, that says to have many pixels and has them."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * ((width // 8 + 2) * height), 9)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def test_health_needs_no_token(server):
    answer = httpx2.get(f"{server.url}/health").json()
    assert answer == {"status": "ok", "name": "numbers", "version": __version__, "limits": LIMITS}
    assert httpx2.get(f"{server.url}/docs").status_code == 404


@pytest.mark.parametrize("given", ["", f"Bearer {TOKEN}x", "Bearer é"])
def test_without_the_token(post, given):
    refused(post(GOOD, Authorization=given.encode()), 401, "token")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"\x80\x04]\x94.", json.dumps(GOOD).encode()[:-5], b"null", b'{"id": NaN}', b"[" * 50_000),
        *({**GOOD, "id": "\ud800"}, {**GOOD, "prompts": ["\udfff"]}),
        *({**GOOD, "more": 1}, {**GOOD, "id": 1}, {**GOOD, "id": "x" * 201}, {**GOOD, "prompts": ["a", "b"]}),
        *({"id": "x", "prompts": [], "images": []}, {**GOOD, "images": [7]}),
        {**GOOD, "images": [base64.b64encode(file_of(picture(8), "JPEG")).decode()]},
        *({**GOOD, "images": [text]} for text in ("é", "", GOOD["images"][0][:60])),
        *({**GOOD, "columns": columns} for columns in ([], {"x": 1}, {"x": [1, 2]})),
        *({**GOOD, "columns": {"x": [value]}} for value in ({"image/png": 1}, [{"image/png": "aaaa"}])),
        json.dumps({**GOOD, "columns": {"x": [0.5]}}).encode().replace(b"0.5", b"1e999"),
    ],
)
def test_garbage(post, body):
    refused(post(body), 400, "not understood")
    refused(post(GOOD, **{"Content-Type": "text/plain"}), 415, "must be JSON")
    refused(post(GOOD, **{"Content-Encoding": "gzip"}), 415, "compressed")


def test_lengths(server, post):
    refused(post(b" " * 100_001), 413, "--max_request_bytes")
    # In pieces, without its length, and for ever.
    pieces = (b" " * 10_000 for _ in range(5_000))
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    answer = httpx2.post(f"{server.url}/score", content=pieces, headers=headers, timeout=20)
    refused(answer, 413, "--max_request_bytes")
    refused(post(request(["a"] * 5, [picture(8)] * 5)), 413, "--max_batch_size")


def test_bombs(post):
    start = time.monotonic()
    refused(post({**GOOD, "images": [bomb(20_000, 20_000)]}), 400, "not a PNG file")
    refused(post({**GOOD, "images": [bomb(8_000, 8_000)]}), 413, "--max_image_pixels")
    refused(post({**GOOD, "columns": {"x": [{"image/png": bomb(65, 64)}]}}), 413, "--max_image_pixels")
    refused(post({**GOOD, "columns": {"x": [[{"image/png": bomb(64, 64)}] * 4]}}), 413, "all too many")
    # What is packed into a text, or a color profile.
    image = file_of(picture(8), "PNG")
    for kind in (b"zTXt", b"iCCP"):
        extra = chunk(kind, b"a\0\0" + zlib.compress(b"\0" * 60_000_000, 9))
        packed = base64.b64encode(image[:33] + extra + image[33:]).decode()
        assert post({**GOOD, "images": [packed]}).status_code in (200, 400)
    assert time.monotonic() - start < 10


def test_a_full_queue(server, post):
    slow = request(["slow"], [picture(8)])
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(post, [slow] * 4))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200, 200, 503, 503]  # one is scored, one waits
    full = next(answer for answer in answers if answer.status_code == 503)
    refused(full, 503, "1 requests are waiting already")
    assert full.headers["Retry-After"] == "1"


def test_what_nobody_waits_for_is_not_scored():
    scored, release = [], threading.Event()

    def reward(prompts, images, **columns):
        scored.extend(prompts)
        release.wait(10)
        return [0.0] * len(images)

    with served(reward) as url:
        with ThreadPoolExecutor(1) as client:
            first = client.submit(httpx2.post, f"{url}/score", json={**GOOD, "prompts": ["first"]})
            while not scored:
                time.sleep(0.01)
            with pytest.raises(httpx2.ReadTimeout):
                httpx2.post(f"{url}/score", json={**GOOD, "prompts": ["gone"]}, timeout=0.2)
            release.set()
            assert first.result().status_code == 200
        assert httpx2.post(f"{url}/score", json={**GOOD, "prompts": ["last"]}).status_code == 200
    assert scored == ["first", "last"]


# What a reward may do


@pytest.mark.parametrize(
    ("values", "status", "expected"),
    [
        ([True, None, float("nan")], 200, [1.0, None, None]),
        ({"a": [1, 2, 3], "b": [None] * 3}, 200, {"a": [1.0, 2.0, 3.0], "b": [None] * 3}),
        ([1, 2], 500, "2 values for 3 images"),
    ],
)
def test_what_a_reward_may_return(values, status, expected):
    with served(lambda prompts, images, **columns: values) as url:
        answer = httpx2.post(f"{url}/score", json=request(["a"] * 3, [picture(8)] * 3))
    assert answer.status_code == status
    assert expected in answer.json()["detail"] if status == 500 else answer.json()["scores"] == expected


@pytest.mark.parametrize(("error", "status"), [(SystemExit, 500), (RewardUnavailableError, 503)])
def test_whatever_it_raises(error, status, caplog):
    """It is called once, and not again image by image."""
    calls = []
    caplog.set_level(logging.CRITICAL, "slas_trl.rewards.server")  # xdist cannot send half a character on

    def reward(prompts, images, **columns):
        calls.append(prompts)
        if "bad" in prompts:
            raise error("half a character, \ud800")
        return [1] * len(images)

    with served(reward) as url:
        answer = httpx2.post(f"{url}/score", json=request(["a", "bad"], [picture(8)] * 2))
        refused(answer, status, f"{error.__name__}: half a character, ?")
        assert ("Retry-After" in answer.headers) == (status == 503) and len(calls) == 1
        assert httpx2.post(f"{url}/score", json=GOOD).json()["scores"] == [1]


def test_what_is_not_answered_when_it_stops_is_to_be_asked_again(tmp_path):
    """What is being scored, what waits for it, and what is still on its way."""
    with ServedProcess(f"{HERE}:numbers", log=tmp_path / "log", grace=0.5) as server, ThreadPoolExecutor(3) as clients:
        slow = request([str(tmp_path / "begun")], [picture(8)])
        answers = [clients.submit(httpx2.post, f"{server.url}/score", json=slow, timeout=20) for _ in range(3)]
        with socket.create_connection((httpx2.URL(server.url).host, server.port)) as half:
            lines = ["POST /score HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 9", "", "{"]
            half.sendall("\r\n".join(lines).encode())
            while not (tmp_path / "begun").exists():
                time.sleep(0.05)
            time.sleep(0.5)
            start = time.monotonic()
            server.process.terminate()
            assert server.process.wait(20) == 143
            assert time.monotonic() - start < 6  # rather than when the reward is done
            assert half.recv(100).startswith(b"HTTP/1.1 503")
        for answer in answers:
            refused(answer.result(), 503, "being stopped")
            assert "Retry-After" in answer.result().headers
    assert "Traceback" not in server.log.read_text()


def test_ctrl_c(tmp_path):
    with ServedProcess(f"{HERE}:numbers", log=tmp_path / "log") as server:
        with ThreadPoolExecutor(1) as client:
            answer = client.submit(httpx2.post, f"{server.url}/score", json=request(["slow"], [picture(8)]))
            time.sleep(0.5)
            server.process.send_signal(signal.SIGINT)
            assert answer.result().json()["scores"] == [1.0]  # what has begun is finished
        assert server.process.wait(20) == 130
    assert server.log.read_text() == "slas-trl serve-reward: interrupted.\n"
