"""
Pictures and columns as JSON, between [`~slas_trl.rewards.RemoteReward`] and `slas-trl serve-reward`:

    GET /health     which reward this is, and the limits
    POST /score     {"id": text, "prompts": [text], "images": [base64], "columns": {name: [value]}}
    answer          {"id": text, "scores": [number or null]}, or an object of such lists for components

Pictures are PNG files, a video is a list of them, and within a column they are {"image/png": base64}.
"""

import base64
import io
import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from ..images import to_rgb


Result = TypeVar("Result")

PNG = "image/png"
_PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
TOKEN_VARIABLE = "SLAS_TRL_REWARD_TOKEN"


@dataclass(frozen=True)
class Limits:
    """Limits of a request."""

    max_batch_size: int = 64  # images
    max_image_pixels: int = 2048 * 2048  # of an image; those of the request may be `max_batch_size` times as many
    max_request_bytes: int = 64 * 2**20  # length of the body
    max_waiting: int = 32  # requests that wait while another one is scored


def check_token(token: str | None) -> str | None:
    """The token. Raises `ValueError`, without the token in it, for one that a header cannot hold."""
    if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("A token must be of visible ASCII characters, and not empty.")
    return token


def in_threads(function: Callable[..., Result], *lists: Sequence[Any]) -> list[Result]:
    """Results in order; for the encoding and decoding of pictures, which leave the interpreter free."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(function, *lists))


def encode_picture(picture: Image.Image | list[Image.Image]) -> Any:
    """The same pixels as PNG in base64; modes that PNG does not have, such as CMYK, become RGB."""
    if isinstance(picture, list):
        return [encode_picture(frame) for frame in picture]
    picture = picture if picture.mode in _PNG_MODES else to_rgb(picture)
    picture.save(file := io.BytesIO(), "PNG", compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY)  # half the time
    return base64.b64encode(file.getvalue()).decode()


def encode_value(value: Any) -> Any:
    """A column's value as JSON. Raises `TypeError` or `ValueError` for what JSON does not have."""
    return json.loads(json.dumps(value, default=_marked, allow_nan=False))


def _marked(picture: Any) -> dict[str, str]:
    if not isinstance(picture, Image.Image):
        raise TypeError(f"{picture!r:.100} is neither JSON nor an image")
    return {PNG: encode_picture(picture)}


def decode_picture(text: Any, where: str, opened: list[Image.Image]) -> Any:
    """A picture, or a list of them for a video, of which only headers are read; also added to `opened`."""
    if isinstance(text, list):
        return [decode_picture(frame, where, opened) for frame in text]
    try:
        opened.append(Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]))
    except Exception as error:  # of many kinds, for a file that is made to break it
        raise ValueError(f"{where} is not a PNG file in base64 ({type(error).__name__}).") from error
    return opened[-1]


def decode_value(value: Any, where: str, opened: list[Image.Image]) -> Any:
    """A column's value from JSON, with its pictures as [`decode_picture`] gives them."""
    if isinstance(value, dict) and PNG in value:
        return decode_picture(value[PNG], where, opened)
    if isinstance(value, dict):
        return {key: decode_value(part, where, opened) for key, part in value.items()}
    if isinstance(value, list):
        return [decode_value(part, where, opened) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} holds a number that is not finite.")
    return value
