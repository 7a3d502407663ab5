"""JSON over HTTP, asked again while there is hope: for rewards and judges that run somewhere else."""

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx2
from transformers.utils import logging

from .base import RewardUnavailableError, load_once
from .call import in_background


logger = logging.get_logger(__name__)

_JITTER = random.Random()  # one's own: the global generator belongs to the training, which has to be reproducible
# Seconds between attempts, each twice as long as the one before; or what the server asks for.
_FIRST_WAIT, _LONGEST_WAIT, _LONGEST_RETRY_AFTER = 0.5, 30.0, 120.0


class AnswerError(ValueError):
    """The server refuses or fails in a way that asking again does not change."""

    status: int


class _Transient(Exception):
    """Worth another attempt: what happened, and the seconds to wait that the server asks for."""


@dataclass(frozen=True)
class Endpoint:
    """An address that takes and answers JSON."""

    url: str  # with the path
    needed_by: str  # the reward's name, for messages
    advice: str  # for messages: what to do if the server does not answer
    secret: str | None = field(default=None, repr=False)  # sent as a bearer token; in no message and no log
    timeout: float = 60.0  # seconds for one attempt
    retries: int = 5  # further attempts after the first
    retried: tuple[int, ...] = (502, 503, 504)  # statuses that are worth another attempt

    def request(self, read: Callable[[Any], Any], body: Any = None) -> Any:
        """
        What `read` makes of the JSON that the server answers to a POST of `body`, or to a GET without one.

        Raises:
            `AnswerError`: for a status that is an error, with the server's own message.
            `RewardUnavailableError`: when no attempt was answered.
            `ValueError`: for an answer that `read` does not understand.
        """
        for attempt in itertools.count(1):
            try:
                return read(self._attempt(body))
            except _Transient as error:
                message, asked = error.args
                logger.info(self._said(f"failed in attempt {attempt}: {message}"))
                if attempt > self.retries:
                    what = f"did not answer in {attempt} attempts; the last one: {message} {self.advice}"
                    raise RewardUnavailableError(self._said(what)) from None  # the cause could hold the secret
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * _JITTER.uniform(0.5, 1)
                time.sleep(max(wait, min(asked, _LONGEST_RETRY_AFTER)))
            except AnswerError:
                raise
            except (TypeError, ValueError, LookupError, RecursionError) as error:
                what = f"answered something else than expected: {error!r:.300} {self.advice}"
                raise ValueError(self._said(what)) from None

    def _attempt(self, body: Any) -> Any:
        secret = {"Authorization": f"Bearer {self.secret}"} if self.secret else {}
        headers = {"Content-Type": "application/json", **secret}
        content = None if body is None else json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        client = _client(os.getpid(), not is_loopback(urlsplit(self.url).hostname or ""))
        method = "GET" if content is None else "POST"
        answer = client.request(method, self.url, content=content, headers=headers, timeout=None)
        try:  # all of it within the time, headers that drip too
            response = in_background("http", asyncio.wait_for(answer, self.timeout))
        except (httpx2.HTTPError, OSError) as error:  # TimeoutError, SSLError
            first: BaseException = error
            while not isinstance(first, TimeoutError) and (cause := first.__cause__ or first.__context__):
                first = cause
            raise _Transient(f"{type(error).__name__}, timeout={self.timeout:g}: {first!r}.", 0) from None
        answer, status = response.json() if response.is_success else None, response.status_code
        if isinstance(answer, dict) and (reported := answer.get("error")):  # a gateway, which has said 200 already
            code = str(reported.get("code") if isinstance(reported, dict) else "")
            status = int(code) if code.isdecimal() and 300 <= int(code) < 600 else 500
        if status // 100 == 2:
            return answer
        what = f"{status}: {_message_in(response)}"
        if status in self.retried:
            after = response.headers.get("Retry-After", "")
            raise _Transient(what, float(after) if after.isdecimal() else 0)
        error = AnswerError(self._said(f"answered {what}"))
        error.status = status
        raise error

    def _said(self, message: str) -> str:
        """Without the secret: servers may repeat what they were sent."""
        text = f"{self.needed_by}: {self.url} {message}"
        return text.replace(self.secret, "***") if self.secret else text


def check_url(url: str, needed_by: str) -> str:
    """The URL without a slash at its end. Raises `ValueError`, without it, if it has a password or a query."""
    with suppress(ValueError, TypeError):
        parts = urlsplit(url)
        plain = "@" not in url and not parts.query and not parts.fragment
        if plain and parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0:
            return url.rstrip("/")
    raise ValueError(f"{needed_by} needs a url like http://127.0.0.1:8000; a token is an option of its own.")


def is_loopback(host: str) -> bool:
    """Whether it is this machine, for which no proxy of the environment can be meant."""
    with suppress(ValueError):  # a name
        return ip_address(host).is_loopback
    return host == "localhost"


@load_once
def _client(pid: int, trust_env: bool) -> httpx2.AsyncClient:
    """One for all threads, but not for a fork, which must not write into its parent's connections."""
    return httpx2.AsyncClient(trust_env=trust_env, limits=httpx2.Limits(max_connections=None))


def _message_in(response: httpx2.Response) -> str:
    """The server's own words: FastAPI's `detail`, OpenAI's `error.message`, or the beginning of the text."""
    found: Any = None
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        answer = response.json()
        found = answer["detail"] if "detail" in answer else answer["error"]["message"]
    text = found if isinstance(found, str) else " ".join(response.text[:2000].split())
    place = response.headers.get("Location", "").partition("?")[0]
    return text[:2000] or f"no message{place and f', but the location {place}'}."
