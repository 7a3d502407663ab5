"""Requests that are made again while there is hope, and what is said when there is none."""

import logging
import random
import socket
import time

import pytest

from slas_trl.rewards.base import RewardUnavailableError
from slas_trl.rewards.http import AnswerError, Endpoint, check_url, is_loopback
from tests.rewards.serving import answering


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("slas_trl.rewards.http._FIRST_WAIT", 0.01)


def ask(url, retries=1, **options):
    return Endpoint(url, "taste", "Does it run?", retries=retries, **options).request(lambda answer: answer)


@pytest.mark.parametrize("status", [502, 504])
def test_it_is_asked_again_where_there_is_hope(status):
    before = random.getstate()  # the training's
    with answering((status, b"<html>busy</html>", ("Retry-After", "1"))) as server:
        start = time.monotonic()
        with pytest.raises(RewardUnavailableError, match=f"taste: .* 2 attempts.*{status}: <html>busy.*Does it run"):
            ask(server.url)
        assert server.seen == 2 and time.monotonic() - start >= 1
    assert random.getstate() == before


@pytest.mark.parametrize("status", [307, 404, 500])
def test_it_is_not_asked_again_where_there_is_none(status):
    answer = (status, b'{"detail": "its own words"}', ("Location", "http://127.0.0.1:1"))
    with answering(answer) as server, pytest.raises(AnswerError, match=f"answered {status}: its own words") as error:
        ask(server.url)
    assert server.seen == 1 and error.value.status == status


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[" * 50_000])
def test_answers_that_are_no_json(answer):
    with answering((200, answer)) as server, pytest.raises(ValueError, match=f"{server.url} answered something else"):
        ask(server.url)
    assert server.seen == 1


def test_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(RewardUnavailableError, match=f"{url} did not answer in 3 attempts.*ConnectError.*Refused"):
        ask(url, retries=2)
    with answering((None, 1.0)) as server, pytest.raises(RewardUnavailableError, match="TimeoutError, timeout=0.1"):
        ask(server.url, timeout=0.1)


def test_secrets_are_not_shown(caplog):
    """Servers may repeat what they were sent."""
    caplog.set_level(logging.DEBUG)
    for status, kind in ((401, AnswerError), (503, RewardUnavailableError)):
        with answering((status, b"wrong key: s3cret")) as server, pytest.raises(kind, match=r"\*\*\*") as error:
            ask(server.url, secret="s3cret")
        assert "s3cret" not in str(error.value) + caplog.text


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80", "ftp://x?key=pa55", "http://", "http://x:port", "http://x?a=pa55", "", None, "//pa55@host"]
)
def test_what_is_no_url(url):
    with pytest.raises(ValueError, match="url") as error:
        check_url(url, "taste")
    assert "pa55" not in str(error.value)
    assert check_url("http://host:80/v1/", "taste") == "http://host:80/v1"
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "::1"))) and not is_loopback("example.org")
