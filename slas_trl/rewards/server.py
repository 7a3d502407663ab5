"""
The server of `slas-trl serve-reward`: a reward over HTTP, for those who have its token. Whatever else it is sent, it
answers with an error and lives on.

`GET /health` says which reward this is and what the limits are; `POST /score` takes and answers what
`slas_trl/rewards/wire.py` describes. An error is `{"detail": message}`.
"""

import asyncio
import hmac
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from slas_trl import __version__
from slas_trl.rewards.base import RewardUnavailableError, require
from slas_trl.rewards.by_name import RewardFunc, reward_name
from slas_trl.rewards.calling import call_reward, numbers
from slas_trl.rewards.wire import (
    GIVEN,
    RequestError,
    check_token,
    decode_png,
    decode_value,
    in_threads,
    open_png,
    open_value,
    pixels_in,
    read_json,
)


if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

_BODY_SECONDS = 120.0  # for a body to arrive
_LONGEST_ID = 200  # characters
_MOST_VALUES = 1_000_000  # as objects of Python, they take many times the memory of their text
_PARSED_AT_A_TIME = 2
_LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class Limits:
    """
    What a request may ask for.

    Args:
        max_batch_size (`int`, *optional*, defaults to `64`): Images.
        max_image_pixels (`int`, *optional*, defaults to `4194304`):
            Pixels of an image; those of the whole request may be `max_batch_size` times as many.
        max_request_bytes (`int`, *optional*, defaults to `67108864`): Length of the body.
        max_waiting (`int`, *optional*, defaults to `32`): Requests that wait while another one is scored.
    """

    max_batch_size: int = 64
    max_image_pixels: int = 2048 * 2048
    max_request_bytes: int = 64 * 2**20
    max_waiting: int = 32

    def __post_init__(self):
        for name, value in asdict(self).items():
            if value < (0 if name == "max_waiting" else 1):
                raise ValueError(f"{name} must be at least {0 if name == 'max_waiting' else 1}, but it is {value}.")


@dataclass(frozen=True)
class ScoreRequest:
    """What is scored. The pictures are opened, and decoded only when it is their turn."""

    id: str
    prompts: list[str]
    images: list[Image]
    columns: dict[str, list[Any]]


def parse_request(body: bytes | bytearray, limits: Limits) -> ScoreRequest:
    """
    A request that keeps to the limits.

    Raises:
        `RequestError`: for any other.
    """
    values = sum(map(body.count, b"[{,"))  # and more if texts have these; pictures in base64 do not
    if values > _MOST_VALUES:
        raise RequestError(413, f"The body has {values} lists, objects and commas, more than {_MOST_VALUES}.")
    request = read_json(body)
    if not isinstance(request, dict):
        raise RequestError(400, f"The body is a {type(request).__name__}; expected an object.")
    if unknown := request.keys() - {"id", "prompts", "images", "columns"}:
        raise RequestError(400, f"The request has {min(unknown)[:100]!r}; expected id, prompts, images and columns.")
    identity, prompts, images = (request.get(name) for name in ("id", "prompts", "images"))
    columns = request.get("columns", {})
    if not isinstance(identity, str) or not 0 < len(identity) <= _LONGEST_ID:
        raise RequestError(400, f"id must be a text of 1 to {_LONGEST_ID} characters.")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError(400, "prompts must be a list of texts.")
    if not isinstance(images, list) or len(images) != len(prompts) or not images:
        raise RequestError(400, "images must be a list with one for each prompt, and not empty.")
    if len(images) > limits.max_batch_size:
        raise RequestError(413, f"{len(images)} images are more than the {limits.max_batch_size} of --max_batch_size.")
    if not isinstance(columns, dict):
        raise RequestError(400, "columns must be an object of lists.")
    for name, values in columns.items():
        if name in GIVEN:
            raise RequestError(400, f"A column cannot have the name {name!r}.")
        if not isinstance(values, list) or len(values) != len(images):
            raise RequestError(400, f"Column {name[:100]!r} must be a list with one value for each image.")
    opened = [open_png(text, f"Image {i}", limits.max_image_pixels) for i, text in enumerate(images)]
    filled = {
        name: open_value(values, f"Column {name[:100]!r}", limits.max_image_pixels) for name, values in columns.items()
    }
    pixels = pixels_in(opened) + pixels_in(filled)
    if pixels > (most := limits.max_image_pixels * limits.max_batch_size):
        raise RequestError(413, f"The images have {pixels} pixels in all, more than {most}. Send fewer at a time.")
    return ScoreRequest(identity, prompts, opened, filled)


def score_request(reward: RewardFunc, request: ScoreRequest) -> dict[str, Any]:
    """
    The answer to a request. If the reward fails on all images together, each is tried alone, so that those which are
    not to blame have their scores; the others have an error.

    Raises:
        `RequestError`: 400 for broken pictures, 500 for a mistake in the reward that is no matter of an image (what it
            returns, a package or a file that is missing), 503 if the reward is unavailable.
    """
    images = in_threads(decode_png, request.images, [f"Image {i}" for i in range(len(request.images))])
    columns = {name: decode_value(values, f"Column {name!r}") for name, values in request.columns.items()}

    def score(rows: slice) -> dict[str | None, list[float | None]]:
        given = {name: values[rows] for name, values in columns.items()}
        prompts = request.prompts[rows]
        try:
            result = call_reward(reward, prompts, images[rows], given)
        except RewardUnavailableError as error:
            raise RequestError(503, _said(error)) from error
        except (ImportError, FileNotFoundError) as error:
            raise RequestError(500, f"The reward cannot be used: {_said(error)}") from error
        try:
            parts = result if isinstance(result, dict) and result else {None: result}
            scores = {name: numbers(values, prompts, "The reward") for name, values in parts.items()}
            return {name: [None if math.isnan(v) else v for v in values] for name, values in scores.items()}
        except (TypeError, ValueError, OverflowError) as error:  # a mistake in the reward, not in an image
            raise RequestError(500, _said(error)) from error

    errors: list[str | None] = [None] * len(images)
    try:
        scores = score(slice(None))
    except (RequestError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever a reward raises: a SystemExit would end the server
        logger.warning("The reward failed on a batch of %d images.", len(images), exc_info=True)
        errors = [_said(error)] * len(images)
        alone: list[dict[str | None, list[float | None]]] = [{}] * len(images)
        for i in range(len(images)) if len(images) > 1 else ():
            try:
                alone[i], errors[i] = score(slice(i, i + 1)), None
            except (RequestError, KeyboardInterrupt):
                raise
            except BaseException as single:
                errors[i] = _said(single)
        names = next((found.keys() for found in alone if found), [None])
        if any(found and found.keys() != names for found in alone):
            raise RequestError(500, "The reward returned other components from one image to another.") from error
        scores = {name: [found[name][0] if found else None for found in alone] for name in names}
    plain = None in scores
    return {
        "id": request.id,
        "scores": scores[None] if plain else None,
        "components": None if plain else scores,
        "errors": errors,
    }


def _said(error: BaseException) -> str:
    """What a client is told of it: text that UTF-8 can say, and not a book."""
    return f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE].encode("utf-8", "replace").decode()


def make_app(reward: RewardFunc, limits: Limits | None = None, token: str | None = None) -> "FastAPI":
    """
    The application, to be run by uvicorn.

    Args:
        reward (`Callable`): The reward. One thread at a time calls it.
        limits ([`Limits`], *optional*): What a request may ask for.
        token (`str`, *optional*): What a client has to know. Without it, anybody who can connect is served.
    """
    require("fastapi", "serve", "slas-trl serve-reward")
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.responses import JSONResponse
    from starlette.requests import ClientDisconnect

    limits = limits or Limits()
    expected = f"Bearer {token}".encode() if check_token(token) else None
    worker = ThreadPoolExecutor(1, thread_name_prefix="reward")
    turn = asyncio.Lock()
    parsing = asyncio.Semaphore(_PARSED_AT_A_TIME)
    inside = 0  # requests that are read, wait or are scored
    # The documentation pages are left out: they need no token, and fetch scripts from elsewhere.
    app = FastAPI(title="slas-trl serve-reward", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "name": reward_name(reward), "version": __version__, "limits": asdict(limits)}

    @app.post("/score")
    async def score(request: Request) -> JSONResponse:
        nonlocal inside
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if expected is not None and not hmac.compare_digest(given, expected):
            raise HTTPException(
                401, "The token is missing or wrong (Authorization: Bearer ...).", {"WWW-Authenticate": "Bearer"}
            )
        # Also keeps pages of other origins out, whose requests a browser sends without asking only as plain text.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "The body must be JSON, with Content-Type: application/json.")
        if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
            raise HTTPException(415, f"The body must be as it is, without Content-Encoding: {encoding[:100]}.")
        if inside > limits.max_waiting:
            raise HTTPException(
                503, f"{limits.max_waiting} requests are waiting already (--max_waiting).", {"Retry-After": "1"}
            )
        inside += 1
        try:
            body = await read_body(request)
            async with parsing:
                parsed = await asyncio.to_thread(parse_request, body, limits)
            del body
            async with turn:
                if await request.is_disconnected():  # nobody waits for it any more
                    return JSONResponse({"detail": "The client is gone."}, 400)
                answer = await asyncio.get_running_loop().run_in_executor(worker, score_request, reward, parsed)
            return JSONResponse(answer)
        except RequestError as error:
            headers = {"Retry-After": "5"} if error.status == 503 else None
            raise HTTPException(error.status, str(error), headers) from error
        except ClientDisconnect:
            return JSONResponse({"detail": "The client is gone."}, 400)
        except TimeoutError:
            raise HTTPException(408, f"The body did not arrive in {_BODY_SECONDS:g} s.") from None
        except asyncio.CancelledError:  # at the end of the grace, or a second Ctrl-C
            raise HTTPException(503, "The server is being stopped.", {"Retry-After": "1"}) from None
        finally:
            inside -= 1

    async def read_body(request: Request) -> bytearray:
        """No further than allowed, whatever its length is said to be."""
        body = bytearray()
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > limits.max_request_bytes:
                    raise RequestError(
                        413, f"The body is longer than the {limits.max_request_bytes} bytes of --max_request_bytes."
                    )
        return body

    return app
