"""A reward that is served somewhere else, by `slas-trl serve-reward`."""

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL.Image import Image

from .base import Reward, check_pairs
from .call import numbers
from .http import Endpoint, check_patience, check_url
from .wire import TOKEN_VARIABLE, Limits, check_token, columns_of, encode_picture, encode_value, in_threads


@dataclass(frozen=True)
class RemoteReward(Reward):
    """
    Asks a server that `slas-trl serve-reward` runs. The scores, to the bit, and the errors are those of the reward
    there. While the server is away or full, the request is made again, with longer and longer pauses: about two
    minutes with the default of `retries`. May be called from several threads.

    Args:
        url (`str`): The server's, as it prints it: http://127.0.0.1:8000.
        token (`str`, *optional*):
            By default that in the environment variable `SLAS_TRL_REWARD_TOKEN`, where other users cannot see it.
        timeout (`float`, *optional*, defaults to `300`):
            Seconds for one attempt, with the wait in the server's queue.
        retries (`int`, *optional*, defaults to `10`): Further attempts after the first.
        columns (`str` or `list[str]`, *optional*):
            Columns that are sent, as a list or as "first+second"; "" sends none. By default all: values that JSON
            has, and images.

    Raises:
        `RewardUnavailableError`: when no attempt was answered.
        `ValueError`: when the server refuses, or the reward there fails; with the server's own message.
    """

    default_name = "remote"
    measures = "what a reward on another machine scores"
    blind_to = "what the reward on the other machine is blind to"
    sees_videos = True  # the reward there is given what it sees
    url: str
    token: str | None = field(default=None, repr=False)
    timeout: float = 300.0
    retries: int = 10
    columns: str | Sequence[str] | None = None

    def __post_init__(self):
        check_url(self.url, self.__name__)
        check_token(self.token)
        check_patience(self.__name__, self.timeout, self.retries)

    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> Any:
        check_pairs(prompts, images)
        if not images:
            return []
        sent = self._encoded(columns_of(columns, len(images)))
        answers = [self._ask(chunk) for chunk in self._chunks(prompts, images, sent)]
        if any(scores.keys() != answers[0].keys() for scores in answers):
            raise ValueError(f"{self.__name__}: {self.url} answered with other components from one batch to another.")
        scores = {name: [score for answer in answers for score in answer[name]] for name in answers[0]}
        return scores.get(None, scores)

    def _endpoint(self, path: str) -> Endpoint:
        return Endpoint(
            url=check_url(self.url, self.__name__) + path,
            needed_by=self.__name__,
            advice="Is `slas-trl serve-reward` running there? Start it again, or raise timeout or retries.",
            secret=self.token or check_token(os.environ.get(TOKEN_VARIABLE) or None),
            timeout=self.timeout,
            retries=self.retries,
        )

    def _encoded(self, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The columns to send, as JSON."""
        names = self.columns.split("+") if isinstance(self.columns, str) else self.columns
        encoded = {}
        for name in columns if names is None else filter(None, names):
            if name not in columns:
                raise ValueError(f"{self.__name__}: no column {name!r} to send; there are {sorted(columns)}.")
            try:
                encoded[name] = [encode_value(value) for value in columns[name]]
            except ValueError as error:
                advice = "Name those to send: columns=first+second, or columns= for none."
                raise ValueError(f"{self.__name__}: column {name!r} {error}. {advice}") from error
        return encoded

    def _chunks(
        self, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]
    ) -> Iterator[dict[str, Any]]:
        """Requests of as many images as the server takes. It is asked each time: it may have been restarted."""
        limits = self._endpoint("/health").request(lambda answer: Limits(**answer["limits"]))
        pictures = in_threads(encode_picture, images)
        rows = [[prompts[i], pictures[i], *(values[i] for values in columns.values())] for i in range(len(images))]
        sizes = [len(json.dumps(row)) + 100 for row in rows]  # and what surrounds them
        start = 0
        for end in range(1, len(images) + 1):
            too_long = sum(sizes[start : end + 1]) > limits.max_request_bytes
            if too_long or end in (len(images), start + limits.max_batch_size):
                chunk = slice(start, end)
                sent = {name: values[chunk] for name, values in columns.items()}
                body = {"id": uuid.uuid4().hex, "prompts": prompts[chunk], "images": pictures[chunk]}
                yield {**body, "columns": sent}
                start = end

    def _ask(self, body: dict[str, Any]) -> dict[str | None, list[float | None]]:
        def read(answer: Any) -> Any:
            if not isinstance(answer, dict) or answer.get("id") != body["id"]:
                raise ValueError("no scores for this request.")
            scores = answer.get("scores")
            parts = scores if isinstance(scores, dict) and scores else {None: scores}
            for values in parts.values():
                numbers(values, body["prompts"], "It")
            return parts

        return self._endpoint("/score").request(read, body)


remote = RemoteReward
