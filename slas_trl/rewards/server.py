"""The server of `slas-trl serve-reward`. An error is `{"detail": message}`, and the server lives on."""

import asyncio
import hmac
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from transformers.utils import logging

from .. import __version__
from .base import RewardFunc, RewardUnavailableError
from .call import call_reward, numbers
from .resolve import reward_name
from .wire import Limits, check_token, decode_picture, decode_value, in_threads


logger = logging.get_logger(__name__)


class ScoreRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    id: str = Field(min_length=1, max_length=200)
    prompts: list[str] = Field(min_length=1)
    images: list[Any]
    columns: dict[str, list[Any]] = {}


def parse_request(body: bytes | bytearray, limits: Limits) -> ScoreRequest:
    """A request with its pictures. Raises 413 for more than the limits, 400 for what is not understood."""
    opened = []
    try:
        request = ScoreRequest.model_validate_json(body)
        count = len(request.prompts)
        if any(len(values) != count for values in (request.images, *request.columns.values())):
            raise ValueError("images and each column must have one value for each prompt.")
        if count > limits.max_batch_size:
            raise HTTPException(413, f"{count} images are more than the {limits.max_batch_size} of --max_batch_size.")
        request.images = [decode_picture(text, f"image {i}", opened) for i, text in enumerate(request.images)]
        request.columns = {k: decode_value(v, f"column {k!r:.100}", opened) for k, v in request.columns.items()}
        pixels = [picture.width * picture.height for picture in opened]
        most = limits.max_image_pixels
        if max(pixels) > most or sum(pixels) > most * limits.max_batch_size:
            raise HTTPException(413, f"A picture has more than {most} pixels (--max_image_pixels), or all too many.")
        in_threads(lambda picture: picture.load(), opened)
    except Exception as error:  # pictures fail in many ways
        if isinstance(error, HTTPException):
            raise
        raise HTTPException(400, f"The request is not understood: {str(error)[:500]}") from error
    return request


def score_request(reward: RewardFunc, body: bytes | bytearray, limits: Limits) -> dict[str, Any]:
    """The answer to a request. Raises 500 when the reward raises or returns no scores, 503 when it is unavailable."""
    request = parse_request(body, limits)
    try:
        result = call_reward(reward, request.prompts, request.images, request.columns)
        parts = result if isinstance(result, dict) and result else {None: result}
        scores = {name: numbers(values, request.prompts, "The reward") for name, values in parts.items()}
    except BaseException as error:  # even a SystemExit must not end the server
        logger.warning(f"The reward failed on a batch of {len(request.prompts)} images.", exc_info=True)
        said = f"{type(error).__name__}: {error}"[:2000].encode("utf-8", "replace").decode()
        if isinstance(error, RewardUnavailableError):
            raise HTTPException(503, said, {"Retry-After": "5"}) from error
        raise HTTPException(500, said) from error
    plain = {name: [None if math.isnan(value) else value for value in values] for name, values in scores.items()}
    return {"id": request.id, "scores": plain.get(None, plain)}


def make_app(reward: RewardFunc, limits: Limits, token: str | None = None) -> Starlette:
    """The application, to be run by uvicorn. Without a token, anybody who can connect is served."""
    from fastapi import FastAPI

    expected = f"Bearer {token}".encode() if check_token(token) else None
    worker = ThreadPoolExecutor(1, thread_name_prefix="reward")
    turn = asyncio.Lock()
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
            raise HTTPException(401, "The token is missing or wrong (Authorization: Bearer ...).")
        # Also keeps pages of other origins out, whose requests a browser sends without asking only as plain text.
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "The body must be JSON, with Content-Type: application/json.")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "The body must not be compressed (Content-Encoding).")
        if inside > limits.max_waiting:
            waiting = f"{limits.max_waiting} requests are waiting already (--max_waiting)."
            raise HTTPException(503, waiting, {"Retry-After": "1"})
        inside += 1
        try:
            body = bytearray()
            async for part in request.stream():
                body += part
                if len(body) > (most := limits.max_request_bytes):  # whatever its length is said to be
                    raise HTTPException(413, f"The body is longer than the {most} bytes of --max_request_bytes.")
            async with turn:
                if await request.is_disconnected():  # nobody waits for it any more
                    raise ClientDisconnect
                loop = asyncio.get_running_loop()
                return JSONResponse(await loop.run_in_executor(worker, score_request, reward, body, limits))
        except ClientDisconnect:
            return JSONResponse({"detail": "The client is gone."}, 400)
        except asyncio.CancelledError:  # at the end of the grace, or a second Ctrl-C
            raise HTTPException(503, "The server is being stopped.", {"Retry-After": "1"}) from None
        finally:
            inside -= 1

    return app
