"""A reward that is served somewhere else, by `slas-trl serve-reward`."""

import json
import logging
import os
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL.Image import Image

from slas_trl.rewards.base import Reward, check_pairs
from slas_trl.rewards.http_client import MAX_FAILED_CALLS, Endpoint, FailedCalls, check_patience, check_url
from slas_trl.rewards.wire import (
    TOKEN_VARIABLE,
    check_scores,
    check_token,
    columns_of,
    encode_base64,
    encode_value,
    in_threads,
    pixels_in,
)


logger = logging.getLogger(__name__)

Answer = tuple[dict[str | None, list[float | None]], list[str | None]]  # scores by component, and errors


@dataclass(frozen=True)
class RemoteReward(Reward):
    """
    Asks a server that `slas-trl serve-reward` runs. The scores are those of the reward there: pictures are sent as
    PNG, which loses nothing, and scores as JSON, which keeps every bit of them.

    While the server is away (being restarted, out of reach, with a full queue), the request is made again, with longer
    and longer pauses: about two minutes with the default of `retries`. An image that the reward there cannot score has
    `None`, with a warning; after five calls in a row in which there was no other, an error ends the training. May be
    called from several threads.

    Args:
        url (`str`): The server's, as it prints it: http://127.0.0.1:8000.
        token (`str`, *optional*):
            The server's token; by default that in the environment variable `SLAS_TRL_REWARD_TOKEN`, if any. Other
            users of the machine can see a command line with "remote:token=...".
        timeout (`float`, *optional*, defaults to `300`):
            Seconds for one attempt, with the wait in the server's queue.
        retries (`int`, *optional*, defaults to `10`): Further attempts after the first.
        columns (`str` or `list[str]`, *optional*):
            Columns of the data set that are sent, as a list or as "first+second"; "" sends none. By default all: the
            values have to be such that JSON can say them, or images.

    Raises:
        `RewardUnavailableError`: when no attempt was answered.
        `ValueError`: when the server refuses, the reward there cannot be used, or five calls in a row had no score;
            with the server's own message.
    """

    default_name: ClassVar[str] = "remote"
    url: str
    token: str | None = field(default=None, repr=False)
    timeout: float = 300.0
    retries: int = 10
    columns: str | Sequence[str] | None = None
    _failed_calls: FailedCalls = field(default_factory=FailedCalls, init=False, repr=False, compare=False)

    def __post_init__(self):
        check_url(self.url, self.__name__)
        check_token(self.token)
        check_patience(self.__name__, self.timeout, self.retries)

    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> Any:
        check_pairs(prompts, images)
        if not images:
            return []
        rows = list(self._rows(prompts, images, columns_of(columns, len(images))))
        answers = [self._ask(chunk) for chunk in self._chunks(rows)]
        scored = [found for found, errors in answers if None in errors]
        if any(found.keys() != scored[0].keys() for found in scored):
            raise ValueError(f"{self.__name__}: {self.url} answered with other components from one batch to another.")
        self._check([error for _, errors in answers for error in errors if error is not None], len(images))
        scores = {
            name: [score for found, errors in answers for score in found.get(name, [None] * len(errors))]
            for name in (scored[0] if scored else [None])
        }
        return scores.get(None, scores)

    def _endpoint(self, path: str) -> Endpoint:
        return Endpoint(
            url=check_url(self.url, self.__name__) + path,
            needed_by=self.__name__,
            advice="Is `slas-trl serve-reward` running there, and can it be reached from here? Start it again, or "
            "raise timeout or retries.",
            secret=self.token or check_token(os.environ.get(TOKEN_VARIABLE) or None),
            timeout=self.timeout,
            retries=self.retries,
        )

    def _rows(
        self, prompts: list[str], images: list[Image], columns: dict[str, list[Any]]
    ) -> Iterator[tuple[dict[str, Any], int]]:
        """For each image what is sent of it, and its pixels."""
        if self.columns is not None:
            names = self.columns.split("+") if isinstance(self.columns, str) else self.columns
            wanted = [name for name in names if name]
            if missing := [name for name in wanted if name not in columns]:
                raise ValueError(
                    f"{self.__name__}: there is no column {missing[0]!r} to send; there are "
                    f"{', '.join(columns) or 'none'}."
                )
            columns = {name: columns[name] for name in wanted}
        encoded = in_threads(encode_base64, images)
        for i, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            values = {name: column[i] for name, column in columns.items()}
            sent = {}
            for name, value in values.items():
                try:
                    sent[name] = encode_value(value)
                except ValueError as error:
                    raise ValueError(
                        f"{self.__name__}: column {name!r} {error}, so it cannot be sent to {self.url}. Name the "
                        "columns that the reward needs in the option columns: columns=first+second, or columns= for "
                        "none."
                    ) from error
            row = {"prompt": prompt, "image": encoded[i], "columns": sent}
            yield row, image.width * image.height + pixels_in(values)

    def _chunks(self, rows: list[tuple[dict[str, Any], int]]) -> Iterator[list[dict[str, Any]]]:
        """As many images at a time as the server takes. It is asked each time: it may have been restarted."""
        limits = self._endpoint("/health").request("GET", _read_limits)
        chunk: list[dict[str, Any]] = []
        size = pixels = 0
        for row, row_pixels in rows:
            rest = json.dumps([row["prompt"], row["columns"]])
            row_size = len(row["image"]) + len(rest) + 200  # and what surrounds it
            if chunk and (
                len(chunk) == limits["max_batch_size"]
                or size + row_size > limits["max_request_bytes"]
                or pixels + row_pixels > limits["max_batch_size"] * limits["max_image_pixels"]
            ):
                yield chunk
                chunk, size, pixels = [], 0, 0
            chunk.append(row)
            size, pixels = size + row_size, pixels + row_pixels
        yield chunk

    def _ask(self, rows: list[dict[str, Any]]) -> Answer:
        identity = uuid.uuid4().hex
        body = {
            "id": identity,
            "prompts": [row["prompt"] for row in rows],
            "images": [row["image"] for row in rows],
            "columns": {name: [row["columns"][name] for row in rows] for name in rows[0]["columns"]},
        }
        return self._endpoint("/score").request(
            "POST", lambda answer: _read_answer(answer, identity, len(rows)), json.dumps(body).encode()
        )

    def _check(self, errors: list[str], images: int) -> None:
        """Warns of images that could not be scored, and raises if it has been nothing else for a while."""
        message, times = Counter(errors).most_common(1)[0] if errors else ("", 0)
        if self._failed_calls.are_too_many(len(errors) == images):
            raise ValueError(
                f"{self.__name__}: {self.url} could score no image in {MAX_FAILED_CALLS} calls in a row. Its last "
                f"message: {message}"
            )
        if errors:
            logger.warning(
                "%s: %s could not score %d of %d images, which have None. %s: %s",
                *(self.__name__, self.url, len(errors), images),
                *(f"{times} of them" if times < len(errors) else "Its message", message),
            )


remote = RemoteReward


def _read_limits(answer: Any) -> dict[str, Any]:
    limits = answer.get("limits") if isinstance(answer, dict) else None
    names = ("max_batch_size", "max_image_pixels", "max_request_bytes")
    numbers = [limits.get(name) if isinstance(limits, dict) else None for name in names]
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ValueError(f"no limits in {str(answer)[:200]}.")
    return dict(zip(names, numbers, strict=True))


def _read_answer(answer: Any, identity: str, count: int) -> Answer:
    if not isinstance(answer, dict):
        raise ValueError(f"a {type(answer).__name__}; expected an object.")
    if answer.get("id") != identity:
        raise ValueError("scores for another request.")
    errors = answer.get("errors")
    if (
        not isinstance(errors, list)
        or len(errors) != count
        or not all(error is None or isinstance(error, str) for error in errors)
    ):
        raise ValueError(f"errors that are not a list of {count} texts or null.")
    components = answer.get("components")
    if components is None:
        return {None: list(check_scores(answer.get("scores"), count, "its scores"))}, errors
    if not isinstance(components, dict) or not components:
        raise ValueError(f"components that are a {type(components).__name__}; expected an object.")
    return {
        name: list(check_scores(values, count, f"its scores for {name!r}")) for name, values in components.items()
    }, errors
