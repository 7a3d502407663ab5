"""Requests that are repeated while there is hope, for rewards that are somewhere else."""

import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2

from slas_trl.rewards.base import RewardUnavailableError, load_once
from slas_trl.rewards.exiting import CHECK_SECONDS, program_ends
from slas_trl.rewards.wire import RequestError, read_json


logger = logging.getLogger(__name__)
Result = TypeVar("Result")

_JITTER = random.Random()  # one's own: the global generator belongs to the training, which has to be reproducible
_FIRST_WAIT = 0.5  # seconds between attempts; each next one is twice as long
_LONGEST_WAIT = 30.0
_LONGEST_RETRY_AFTER = 120.0  # if the server asks for it
MAX_FAILED_CALLS = 5  # in a row, in which no image could be scored


class AnswerError(ValueError):
    """The server understood, and refuses or fails; asking again would be of no use."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class FailedCalls:
    """
    How many calls in a row have failed. An image that cannot be scored is no reason to end a training, even where it
    is the only one of its call; but a reward that never scores any must not be silent.
    """

    def __init__(self):
        self.lock, self.times = threading.Lock(), 0

    def are_too_many(self, failed: bool) -> bool:
        """With the one that just ended."""
        with self.lock:
            self.times = self.times + 1 if failed else 0
            return self.times >= MAX_FAILED_CALLS

    def __reduce__(self):
        return FailedCalls, ()  # a copy counts for itself


class _Transient(Exception):
    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Endpoint:
    """
    A server that speaks JSON.

    Args:
        url (`str`): Where, with the path.
        needed_by (`str`): The reward's name, for messages.
        advice (`str`): What to do if it does not answer.
        secret (`str`, *optional*): Sent as a bearer token; in no message and no log.
        timeout (`float`): Seconds for one attempt.
        retries (`int`): Further attempts after the first.
        retried (`tuple[int, ...]`): Statuses that are worth another attempt.
        max_bytes (`int`): Longest answer that is read.
        strict (`bool`): Whether NaN and infinities make an answer none.
    """

    url: str
    needed_by: str
    advice: str
    secret: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    retries: int = 5
    retried: tuple[int, ...] = (502, 503, 504)
    max_bytes: int = 16 * 2**20
    strict: bool = True

    def request(
        self,
        method: str,
        read: Callable[[Any], Result],
        body: bytes | None = None,
        stop: threading.Event | None = None,
    ) -> Result:
        """
        What `read` makes of the JSON that the server answers.

        Args:
            method (`str`): "GET" or "POST".
            read (`Callable`): Takes the parsed answer, and raises `ValueError` for one that is not understood.
            body (`bytes`, *optional*): JSON to send.
            stop (`threading.Event`, *optional*):
                Ends the waiting for another attempt, as the end of the program does.

        Raises:
            `AnswerError`: for a status that is an error, with the server's own message.
            `RewardUnavailableError`: when no attempt was answered.
        """
        stop = stop or threading.Event()
        for attempt in range(self.retries + 1):
            try:
                return read(self._attempt(method, body))
            except _Transient as error:
                message = self._hidden(str(error))
                if attempt == self.retries:
                    raise RewardUnavailableError(
                        f"{self.needed_by}: {self.url} did not answer in {attempt + 1} attempts; the last one: "
                        f"{message} {self.advice}"
                    ) from None  # the cause could have the secret in it
                wait = min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt) * _JITTER.uniform(0.5, 1)
                if error.retry_after is not None:
                    wait = max(wait, min(error.retry_after, _LONGEST_RETRY_AFTER))
                logger.info("%s: %s: %s Trying again in %.1f s.", self.needed_by, self.url, message, wait)
                if _stopped(stop, wait):
                    raise RewardUnavailableError(f"{self.needed_by} has given up on {self.url}.") from None
            except AnswerError as error:
                raise AnswerError(
                    f"{self.needed_by}: {self.url} answered {error.status}: {self._hidden(str(error))}", error.status
                ) from None
            except ValueError as error:
                raise ValueError(
                    f"{self.needed_by}: {self.url} answered something else than expected: {self._hidden(str(error))} "
                    f"{self.advice}"
                ) from None
        raise AssertionError("unreachable")

    def _attempt(self, method: str, body: bytes | None) -> Any:
        # A compressed answer could become any size.
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self.secret:
            headers["Authorization"] = f"Bearer {self.secret}"
        end = time.monotonic() + self.timeout
        try:
            with _client(os.getpid(), not is_loopback(urlsplit(self.url).hostname or "")).stream(
                method, self.url, content=body, headers=headers, timeout=self.timeout
            ) as response:
                content = bytearray()
                for part in response.iter_raw():
                    content += part
                    if len(content) > self.max_bytes:
                        raise ValueError(f"more than {self.max_bytes} bytes.")
                    if time.monotonic() > end:
                        raise _Transient(f"no whole answer in {self.timeout:g} s.")
        except httpx2.TimeoutException:
            raise _Transient(f"no answer in {self.timeout:g} s.") from None
        except httpx2.TransportError as error:
            raise _Transient(f"{type(error).__name__}: {error}.") from None
        status, answer = response.status_code, None
        if response.is_success:
            try:
                answer = read_json(content, self.strict)
            except RequestError as error:
                raise ValueError(str(error)) from None
            status = _status_in(answer)
        if status in self.retried:
            raise _Transient(f"{status}: {_message_in(content)}", _retry_after(response.headers.get("Retry-After")))
        if status // 100 != 2:
            raise AnswerError(_message_in(content), status)
        return answer

    def _hidden(self, message: str) -> str:
        """Servers may repeat what they were sent."""
        return message.replace(self.secret, "***") if self.secret else message


def _stopped(stop: threading.Event, seconds: float) -> bool:
    """Waits so long, or until it is of no use any more."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if stop.wait(min(left, CHECK_SECONDS)) or program_ends():
            return True
    return stop.is_set()


def check_url(url: str, needed_by: str) -> str:
    """
    The URL without a slash at its end.

    Raises:
        `ValueError`: for what is none, and for one with an @, before which a password may be.
    """
    if not isinstance(url, str):
        raise ValueError(f"{needed_by} has a url that is a {type(url).__name__}; expected text.")
    if "@" in url:
        raise ValueError(f"{needed_by} has a url with an @, as after a password; expected a token as its own option.")
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018, since reading it checks it
    except ValueError as error:
        raise ValueError(f"{needed_by} has a url that is none: {error}.") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        plain = parts._replace(query="", fragment="").geturl()
        raise ValueError(f"{needed_by} has the url {plain!r}; expected one like http://127.0.0.1:8000, and no more.")
    return url.rstrip("/")


def check_patience(needed_by: str, timeout: float, retries: int) -> None:
    """Raises `ValueError` for a time-out or a number of retries that there cannot be."""
    if not timeout > 0:
        raise ValueError(f"timeout of {needed_by} must be above 0 seconds, but it is {timeout}.")
    if retries < 0:
        raise ValueError(f"retries of {needed_by} must be at least 0, but it is {retries}.")


@load_once
def _client(pid: int, trust_env: bool) -> httpx2.Client:
    """One for all threads, but not for a fork, which must not write into its parent's connections."""
    return httpx2.Client(trust_env=trust_env, limits=httpx2.Limits(max_connections=None), follow_redirects=False)


def is_loopback(host: str) -> bool:
    """Whether it is this machine, for which no proxy of the environment can be meant."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _status_in(answer: Any) -> int:
    """That of an error of which a gateway tells when it has answered 200 already."""
    error = answer.get("error") if isinstance(answer, Mapping) else None
    code = str(error.get("code") if isinstance(error, Mapping) else error or 200)
    return int(code) if re.fullmatch("[2-5][0-9]{2}", code) else 500


def _message_in(content: bytes | bytearray) -> str:
    """The server's own words: FastAPI's `detail`, OpenAI's `error.message`, or the beginning of the text."""
    try:
        answer = read_json(content, strict=False)
    except RequestError:
        answer = None
    if isinstance(answer, Mapping):
        error = answer.get("error")
        for found in (answer.get("detail"), error.get("message") if isinstance(error, Mapping) else error):
            if isinstance(found, str):
                return found[:2000]
    return " ".join(content[:2000].decode("utf-8", "replace").split())[:500] or "no message."


def _retry_after(text: str | None) -> float | None:
    """Seconds, or a date."""
    if not text:
        return None
    try:
        seconds = float(text) if text.strip().isdigit() else parsedate_to_datetime(text).timestamp() - time.time()
        return max(0.0, seconds)
    except (ValueError, OverflowError):
        return None
