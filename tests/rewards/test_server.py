"""The server of rewards, as a process that is sent what nobody should send; it says what is wrong, and lives on."""

import asyncio
import base64
import gzip
import io
import json
import logging
import os
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
from slas_trl.rewards import server as server_module  # noqa: E402
from slas_trl.rewards.base import RewardUnavailableError  # noqa: E402
from slas_trl.rewards.wire import encode_base64  # noqa: E402
from tests.rewards.served_rewards import numbers, picture  # noqa: E402
from tests.rewards.serving import HERE, ServedProcess, served  # noqa: E402


pytestmark = pytest.mark.rewards

TOKEN = "a-token-of-the-test"
OPTIONS = (
    "--max_batch_size",
    "4",
    "--max_image_pixels",
    "4096",
    "--max_request_bytes",
    "100000",
    "--max_waiting",
    "1",
)


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
    assert answer.status_code == 200
    assert answer.json() == {"id": "x", "scores": [1.0, 2.0], "components": None, "errors": [None, None]}
    assert server.process.poll() is None


def request(prompts, images, **more):
    return {"id": "x", "prompts": prompts, "images": [encode_base64(image) for image in images], **more}


GOOD = request(["a"], [picture(8)])
JSON = {"Content-Type": "application/json"}


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
    assert (answer["status"], answer["name"], answer["version"]) == ("ok", "numbers", __version__)
    assert answer["limits"] == {
        "max_batch_size": 4,
        "max_image_pixels": 4096,
        "max_request_bytes": 100000,
        "max_waiting": 1,
    }


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer é"]
)
def test_without_the_token(post, given):
    answer = post(GOOD, Authorization=given.encode())
    refused(answer, 401, "token is missing or wrong")
    assert TOKEN not in answer.text


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/octet-stream"])
def test_other_kinds_of_bodies(post, kind):
    refused(post(GOOD, **{"Content-Type": kind}), 415, "must be JSON")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br, GZIP"])
def test_compressed_bodies(post, encoding):
    refused(post(gzip.compress(json.dumps(GOOD).encode()), **{"Content-Encoding": encoding}), 415, "Content-Encoding")
    assert post(GOOD, **{"Content-Encoding": "Identity"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("GET", "/score", 405), ("PUT", "/score", 405), ("DELETE", "/health", 405), ("POST", "/", 404)),
        *(("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("GET", "/../../etc/passwd", 404)),
    ],
)
def test_other_paths_and_methods(server, post, method, path, status):
    assert httpx2.request(method, server.url + path).status_code == status


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"\x80\x04]\x94.", "not JSON"),  # a pickle
        (b"\xff\xfe{}", "not JSON"),
        (json.dumps(GOOD).encode()[:-5], "not JSON"),
        (b'{"id": NaN}', "NaN is no number"),
        (b'{"id": -Infinity}', "-Infinity is no number"),
        (b'{"id": 1e999}', "1e999 is no number"),
        (b"[" * 50_000, "nested too deeply"),
        (b'{"columns":' * 8_000, "nested too deeply"),
        (b"9" * 50_000, "not JSON"),
        ({**GOOD, "columns": {"x": [json.loads("[" * 70 + "]" * 70)]}}, "Column 'x' is nested too deeply"),
        ({**GOOD, "id": "\ud800"}, "half a character"),
        ({**GOOD, "prompts": ["\udfff"]}, "half a character"),
        (b"[]", "is a list; expected an object"),
        (b"null", "is a NoneType"),
        ({**GOOD, "more": 1}, "'more'; expected id"),
        ({**GOOD, "id": 1}, "id must be a text"),
        ({**GOOD, "id": "x" * 201}, "id must be a text"),
        ({**GOOD, "prompts": "a"}, "prompts must be a list of texts"),
        ({**GOOD, "prompts": [1]}, "prompts must be a list of texts"),
        ({**GOOD, "prompts": ["a", "b"]}, "one for each prompt"),
        ({"id": "x", "prompts": [], "images": []}, "not empty"),
        ({"id": "x"}, "prompts must be"),
        ({**GOOD, "images": "x"}, "images must be a list"),
        ({**GOOD, "images": [7]}, "Image 0 is a int; expected a PNG"),
        ({**GOOD, "images": ["é"]}, "not in base64"),
        ({**GOOD, "images": ["http://127.0.0.1/a.png"]}, "not in base64"),
        ({**GOOD, "images": [""]}, "not a PNG file"),
        ({**GOOD, "images": [GOOD["images"][0][:60]]}, "not a whole PNG file"),
        ({**GOOD, "columns": []}, "columns must be"),
        ({**GOOD, "columns": {"x": 1}}, "'x' must be a list with one value"),
        ({**GOOD, "columns": {"x": [1, 2]}}, "'x' must be a list with one value"),
        ({**GOOD, "columns": {"images": [1]}}, "cannot have the name 'images'"),
        ({**GOOD, "columns": {"x": [{"image/png": 1}]}}, "Column 'x' is a int"),
        ({**GOOD, "columns": {"x": [[{"image/png": "aaaa"}]]}}, "Column 'x' is not a PNG"),
        ({**GOOD, "columns": {"x": [{"image/png": "aaaa", "y": 1}]}}, "other keys"),
    ],
)
def test_garbage(post, body, message):
    answer = post(body)
    refused(answer, 400, message)
    assert " object at 0x" not in answer.text


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "GIF", "TIFF", "WEBP", "EPS"])
def test_other_files_than_png(post, kind):
    data = base64.b64encode(file_of(picture(8), kind)).decode()
    refused(post({**GOOD, "images": [data]}), 400, "not a PNG file")


def test_lengths(server, post):
    refused(post(b" " * 100_001), 413, "longer than the 100000 bytes")
    # In pieces, without its length, and for ever.
    sent = 0

    def pieces():
        nonlocal sent
        while sent < 50_000_000:
            sent += 10_000
            yield b" " * 10_000

    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    refused(httpx2.post(f"{server.url}/score", content=pieces(), headers=headers, timeout=20), 413, "longer than")
    refused(post(request(["a"] * 5, [picture(8)] * 5)), 413, "5 images are more than the 4")


def test_a_body_that_is_shorter_than_said(server, post):
    address = (httpx2.URL(server.url).host, server.port)
    lines = ["POST /score HTTP/1.1", "Host: x", f"Authorization: Bearer {TOKEN}", "Content-Type: application/json"]
    with socket.create_connection(address) as connection:
        connection.sendall("\r\n".join([*lines, "Content-Length: 1000", "", "{"]).encode())
    with socket.create_connection(address) as connection:
        connection.sendall("\r\n".join([*lines, "Content-Length: -1", "", "{"]).encode())
        assert b" 400 " in connection.recv(1000)
    with socket.create_connection(address) as connection:
        connection.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100)  # the beginning of TLS
        assert b" 400 " in connection.recv(1000)
    assert b"Traceback" not in server.log.read_bytes()


def test_a_body_that_does_not_arrive(monkeypatch):
    monkeypatch.setattr("slas_trl.rewards.server._BODY_SECONDS", 0.1)
    with served(numbers, max_waiting=0) as url:
        address = (httpx2.URL(url).host, httpx2.URL(url).port)
        with socket.create_connection(address) as connection:
            lines = ["POST /score HTTP/1.1", "Host: x", "Content-Type: application/json", "Content-Length: 9", "", "{"]
            connection.sendall("\r\n".join(lines).encode())
            assert b" 408 " in connection.recv(1000)
            assert httpx2.post(f"{url}/score", json=GOOD).json()["scores"] == [1.0]  # nobody is in its way


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["first", "second"])
def test_connections_over_which_nothing_is_asked(monkeypatch, before):
    monkeypatch.setattr("slas_trl.scripts.serve_reward._HEADER_SECONDS", 0.3)
    with served(numbers) as url, httpx2.Client() as honest:
        assert honest.get(f"{url}/health").status_code == 200
        address = (httpx2.URL(url).host, httpx2.URL(url).port)
        silent = [socket.create_connection(address, timeout=10) for _ in range(30)]
        for connection in silent:
            connection.sendall(before)
            assert not before or connection.recv(10_000).startswith(b"HTTP/1.1 200")
            connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\n")
        slow = {**GOOD, "prompts": ["slow"]}  # for longer than that
        assert honest.post(f"{url}/score", json=slow).json()["scores"] == [1.0]
        for connection in silent:
            assert connection.recv(10) == b""
            connection.close()


@pytest.mark.parametrize("line", [b"X: " + b"x" * 60_000 + b"\r\n", b"x" * 10_000, b"X: x\r\n" * 1000])
def test_a_header_without_end(server, post, line):
    """Ends the connection; its answer may be lost with it, since not all that was sent is read."""
    connection = socket.create_connection((httpx2.URL(server.url).host, server.port), timeout=10)
    with connection, pytest.raises(ConnectionError):
        for _ in range(1000):
            connection.sendall(b"GET /health HTTP/1.1\r\n" + line)


def test_bombs(post):
    start = time.monotonic()
    refused(post({**GOOD, "images": [bomb(20_000, 20_000)]}), 413, "Image 0 is too large")
    refused(post({**GOOD, "images": [bomb(8_000, 8_000)]}), 413, "8000 x 8000 pixels, more than the 4096")
    refused(post({**GOOD, "columns": {"x": [{"image/png": bomb(65, 64)}]}}), 413, "65 x 64 pixels")
    many = [{"image/png": bomb(64, 64)}] * 4
    refused(post({**GOOD, "columns": {"x": [many]}}), 413, "in all, more than 16384")
    # What is packed into a text, or a colour profile.
    image = file_of(picture(8), "PNG")
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 60_000_000, 9))
    profile = chunk(b"iCCP", b"a\0\0" + zlib.compress(b"\0" * 60_000_000, 9))
    for extra in (text, profile):
        packed = base64.b64encode(image[:33] + extra + image[33:]).decode()
        assert post({**GOOD, "images": [packed]}).status_code in (200, 400)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("value", [b"[]", b"{}", b"0"])
def test_values_beyond_number(value):
    """A body of 3 MB could take 100, and seconds to read."""
    many = json.dumps({**GOOD, "columns": {"x": [[]]}}).encode().replace(b"[]", b"[" + value + b"," + value + b"]")
    with served(numbers) as url:
        assert httpx2.post(f"{url}/score", content=many, headers=JSON).status_code == 200
        many = many.replace(b"," + value, (b"," + value) * 1_000_000)
        refused(httpx2.post(f"{url}/score", content=many, headers=JSON), 413, "lists, objects and commas, more than")
        honest = {**GOOD, "prompts": ["one, two, " * 40_000], "columns": {"boxes": [[[0.5, 1, 2, 3]] * 10_000]}}
        assert httpx2.post(f"{url}/score", json=honest).json()["scores"] == [1.0]


def test_two_are_parsed_at_a_time(monkeypatch):
    running, most, parse = 0, 0, server_module.parse_request

    def watched(body, limits):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.05)
        running -= 1
        return parse(body, limits)

    monkeypatch.setattr(server_module, "parse_request", watched)
    with served(numbers) as url, ThreadPoolExecutor(8) as clients:
        for answer in clients.map(lambda _: httpx2.post(f"{url}/score", json=GOOD), range(16)):
            assert answer.status_code == 200
    assert most == 2


def test_a_full_queue(server, post):
    slow = request(["slow"], [picture(8)])
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(post, [slow] * 4))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [200, 200, 503, 503]  # one is scored, one waits
    full = next(answer for answer in answers if answer.status_code == 503)
    refused(full, 503, "1 requests are waiting already")
    assert full.headers["Retry-After"] == "1"


def test_one_batch_at_a_time():
    running, most = 0, 0

    def watched(prompts, images, **columns):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.02)
        running -= 1
        return [0.0] * len(images)

    with served(watched) as url, ThreadPoolExecutor(8) as clients:
        headers = {"Content-Type": "application/json"}
        for answer in clients.map(lambda _: httpx2.post(f"{url}/score", json=GOOD, headers=headers), range(16)):
            assert answer.status_code == 200
    assert most == 1


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
        ([1, None, float("nan")], 200, [1.0, None, None]),
        ([True, False, 2], 200, [1.0, 0.0, 2.0]),
        ([1, 2], 500, "2 values for 3 images"),
        (["1", "2", "3"], 500, "'1' (str)"),
        ("abc", 500, "returned a str"),
        (None, 500, "returned a NoneType"),
        ([1, 2, float("inf")], 500, "returned inf for image 2"),
        ([1, 2, 10**400], 500, "OverflowError"),
        ({"a": [1, 2, 3], "b": [None] * 3}, 200, {"a": [1.0, 2.0, 3.0], "b": [None] * 3}),
    ],
)
def test_what_a_reward_may_return(values, status, expected):
    with served(lambda prompts, images, **columns: values) as url:
        answer = httpx2.post(f"{url}/score", json=request(["a"] * 3, [picture(8)] * 3))
    assert answer.status_code == status
    if status == 500:
        assert expected in answer.json()["detail"]
    else:
        assert answer.json()["components" if isinstance(values, dict) else "scores"] == expected


def test_tensors():
    torch = pytest.importorskip("torch")
    for values in (torch.tensor([0.5, 2]), [torch.tensor(0.5), 2], torch.tensor([0.5, 2]).numpy()):
        with served(lambda prompts, images, values=values, **columns: values) as url:
            assert httpx2.post(f"{url}/score", json=request(["a"] * 2, [picture(8)] * 2)).json()["scores"] == [0.5, 2]


def test_components_of_those_that_do_not_fail(caplog):
    caplog.set_level(logging.CRITICAL, logger="slas_trl.rewards.server")  # pytest-xdist cannot report half characters

    def reward(prompts, images, **columns):
        if "bad" in prompts:
            raise ValueError("half a character, \ud800")
        return {"a": [1] * len(images), "b": [2] * len(images)}

    with served(reward) as url:
        answer = httpx2.post(f"{url}/score", json=request(["a", "bad"], [picture(8)] * 2)).json()
    assert answer["components"] == {"a": [1.0, None], "b": [2.0, None]}
    assert answer["errors"] == [None, "ValueError: half a character, ?"]


@pytest.mark.parametrize("error", [ValueError, MemoryError, SystemExit, asyncio.CancelledError, StopIteration])
@pytest.mark.parametrize("count", [1, 3])
def test_whatever_it_raises_is_an_error_of_the_images(error, count):
    def reward(prompts, images, **columns):
        if "bad" in prompts:
            raise error("of its own")
        return [1] * len(images)

    with served(reward) as url:
        answer = httpx2.post(f"{url}/score", json=request(["bad"] * count, [picture(8)] * count))
        assert answer.status_code == 200, answer.text
        assert answer.json()["scores"] == [None] * count
        assert answer.json()["errors"] == [f"{error.__name__}: of its own"] * count
        assert httpx2.post(f"{url}/score", json=GOOD).json()["scores"] == [1]


@pytest.mark.parametrize("error", [ImportError, FileNotFoundError])
def test_no_image_is_to_blame(error):
    calls = []

    def reward(prompts, images, **columns):
        calls.append(prompts)
        raise error("the file x.pt is missing")

    with served(reward) as url:
        for count in (1, 2):
            answer = httpx2.post(f"{url}/score", json=request(["a"] * count, [picture(8)] * count))
            refused(answer, 500, "cannot be used: " + error.__name__ + ": the file x.pt is missing")
    assert len(calls) == 2


def test_a_mistake_that_shows_only_image_by_image():
    def reward(prompts, images, **columns):
        if len(prompts) > 1:
            raise ValueError("too many")
        return ["1"]

    with served(reward) as url:
        refused(httpx2.post(f"{url}/score", json=request(["a"] * 2, [picture(8)] * 2)), 500, "'1' (str)")


def test_a_reward_that_is_unavailable_itself():
    calls = []

    def reward(prompts, images, **columns):
        calls.append(prompts)
        raise RewardUnavailableError("the judge is away")

    with served(reward) as url:
        answer = httpx2.post(f"{url}/score", json=request(["a", "b"], [picture(8)] * 2))
    refused(answer, 503, "the judge is away")
    assert "Retry-After" in answer.headers
    assert len(calls) == 1  # another image would fare no better


@pytest.mark.parametrize(
    ("signals", "status"), [([signal.SIGTERM], 143), ([signal.SIGINT] * 2, 130)], ids=["grace", "second Ctrl-C"]
)
def test_what_is_not_answered_when_it_stops_is_to_be_asked_again(tmp_path, signals, status):
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
            assert server.stop(*signals) == status
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
            os.kill(server.process.pid, signal.SIGINT)
            assert answer.result().json()["scores"] == [1.0]  # what has begun is finished
        assert server.process.wait(20) == 130
    assert server.log.read_text() == "slas-trl serve-reward: interrupted.\n"
    assert numbers(["a"], [picture(8)], [picture(8)]) == [1.0]
