"""JSON over HTTP, asked again while there is hope: for rewards and judges that run somewhere else."""

import itertools
import os
import random
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import httpx2
from transformers.utils import logging

from .base import RewardUnavailableError, load_once


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
    """
    An address that takes and answers JSON.

    Args:
        url (`str`): Where, with the path.
        needed_by, advice (`str`): For messages: the reward's name, and what to do if the server does not answer.
        secret (`str`, *optional*): Sent as a bearer token; in no message and no log.
        timeout, retries: Seconds for one attempt, and further attempts after the first.
        retried (`tuple[int, ...]`): Statuses that are worth another attempt.
    """

    url: str
    needed_by: str
    advice: str
    secret: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 5
    retried: tuple[int, ...] = (502, 503, 504)

    def request(self, read: Callable[[Any], Any], body: Any = None, stop: threading.Event | None = None) -> Any:
        """
        What `read` makes of the JSON that the server answers.

        Args:
            read (`Callable`): Takes the parsed answer, and raises `ValueError` for one that is not understood.
            body, stop (*optional*): JSON that is posted, instead of a GET; and what ends the waiting.

        Raises:
            `AnswerError`: for a status that is an error, with the server's own message.
            `RewardUnavailableError`: when no attempt was answered.
        """
        for attempt in itertools.count(1):
            try:
                return read(self._attempt(body))
            except _Transient as error:
                message, asked = error.args
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (attempt - 1)) * _JITTER.uniform(0.5, 1)
                wait = max(wait, min(asked, _LONGEST_RETRY_AFTER))
                logger.info(self._said(f"failed in attempt {attempt}: {message}"))
                if attempt > self.retries or (stop or threading.Event()).wait(wait):
                    what = f"did not answer in {attempt} attempts; the last one: {message} {self.advice}"
                    raise RewardUnavailableError(self._said(what)) from None  # the cause could hold the secret
            except AnswerError:
                raise
            except (TypeError, ValueError, LookupError, RecursionError) as error:
                what = f"answered something else than expected: {error!r:.300} {self.advice}"
                raise ValueError(self._said(what)) from None

    def _attempt(self, body: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.secret}"} if self.secret else {}
        client = _client(os.getpid(), not is_loopback(urlsplit(self.url).hostname or ""))
        given: Any = {"json": body, "headers": headers, "timeout": self.timeout}
        try:
            response = client.request("GET" if body is None else "POST", self.url, **given)
        except httpx2.TimeoutException:
            raise _Transient(f"no answer in {self.timeout:g} s.", 0) from None
        except httpx2.HTTPError as error:
            raise _Transient(f"{type(error).__name__}: {error}.", 0) from None
        answer = response.json() if response.is_success else None
        status = _status_in(answer) if response.is_success else response.status_code
        if status in self.retried:
            after = response.headers.get("Retry-After", "")
            raise _Transient(f"{status}: {_message_in(response)}", float(after) if after.isdecimal() else 0)
        if status // 100 != 2:
            error = AnswerError(self._said(f"answered {status}: {_message_in(response)}"))
            error.status = status
            raise error
        return answer

    def _said(self, message: str) -> str:
        """Without the secret: servers may repeat what they were sent."""
        text = f"{self.needed_by}: {self.url} {message}"
        return text.replace(self.secret, "***") if self.secret else text


def check_url(url: str, needed_by: str) -> str:
    """The URL without a slash at its end. Raises `ValueError`, without it, if it has a password or a query."""
    fits = False
    with suppress(ValueError, TypeError):
        parts = urlsplit(url)
        plain = "@" not in url and not parts.query and not parts.fragment
        fits = plain and parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    if not fits:
        raise ValueError(f"{needed_by} needs a url like http://127.0.0.1:8000; a token is an option of its own.")
    return url.rstrip("/")


def check_patience(needed_by: str, timeout: float, retries: int = 0) -> None:
    """Raises `ValueError` for a timeout or a number of retries that cannot be."""
    if not timeout > 0 or retries < 0:
        raise ValueError(f"{needed_by} needs timeout above 0 and retries from 0 on, but has {timeout} and {retries}.")


def is_loopback(host: str) -> bool:
    """Whether it is this machine, for which no proxy of the environment can be meant."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False


@load_once
def _client(pid: int, trust_env: bool) -> httpx2.Client:
    """One for all threads, but not for a fork, which must not write into its parent's connections."""
    return httpx2.Client(trust_env=trust_env, limits=httpx2.Limits(max_connections=None))


def _status_in(answer: Any) -> int:
    """The status of an error that a gateway reports after it has answered 200 already."""
    error = answer.get("error") if isinstance(answer, Mapping) else None
    code = str(error.get("code") if isinstance(error, Mapping) else error or 200)
    return int(code) if re.fullmatch("[2-5][0-9]{2}", code) else 500


def _message_in(response: httpx2.Response) -> str:
    """The server's own words: FastAPI's `detail`, OpenAI's `error.message`, or the beginning of the text."""
    found: Any = None
    with suppress(ValueError, AttributeError, RecursionError):
        answer = response.json()
        error = answer.get("error")
        found = answer.get("detail") or (error.get("message") if isinstance(error, Mapping) else error)
    text = found if isinstance(found, str) else " ".join(response.text[:2000].split())
    return text[:2000] or "no message."
