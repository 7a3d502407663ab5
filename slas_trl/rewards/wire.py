"""
Pictures and columns as JSON, between [`RemoteReward`] and `slas-trl serve-reward`: PNG in base64, and nothing that
would have to be unpickled.

    POST /score     {"id": text, "prompts": [text], "images": [base64], "columns": {name: [value]}}
    answer          {"id": text, "scores": [number], "components": {name: [number]}, "errors": [text]}

Either scores or components are null, and so are scores of images with an error, and errors of those without. A picture
within a column is {"image/png": base64}.
"""

import base64
import binascii
import io
import json
import math
import os
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from PIL import Image, UnidentifiedImageError

from slas_trl.images import to_rgb


Result = TypeVar("Result")

PNG = "image/png"
_PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
_DEEPEST = 64  # lists and objects in a column's value
GIVEN = ("prompts", "images", "completions")  # what a reward is given besides columns
TOKEN_VARIABLE = "SLAS_TRL_REWARD_TOKEN"


def columns_of(columns: dict[str, Any], count: int) -> dict[str, list[Any]]:
    """
    Those of a reward's keyword arguments that hold one value for each image. Other kinds of objects, such as the state
    of a trainer, are not columns.

    Raises:
        `ValueError`: for a list of another length.
    """
    lists = {name: list(values) for name, values in columns.items() if isinstance(values, (list, tuple))}
    for name, values in lists.items():
        if name not in GIVEN and len(values) != count:
            raise ValueError(f"Column {name!r} has {len(values)} values for {count} images; expected one for each.")
    return {name: values for name, values in lists.items() if name not in GIVEN}


def encode_png(image: Image.Image) -> bytes:
    """The same pixels as a PNG file. What PNG does not know, such as CMYK, becomes RGB."""
    file = io.BytesIO()
    image = image if image.mode in _PNG_MODES else to_rgb(image)
    image.save(file, format="PNG", compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY)  # half the time
    return file.getvalue()


def encode_base64(image: Image.Image) -> str:
    return base64.b64encode(encode_png(image)).decode()


def encode_value(value: Any) -> Any:
    """
    A column's value as JSON says it. A tuple becomes a list.

    Raises:
        `ValueError`: for what JSON cannot say.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"holds {value}, which is no number in JSON")
        return value
    if isinstance(value, Image.Image):
        return {PNG: encode_base64(value)}
    if isinstance(value, (list, tuple)):
        return [encode_value(part) for part in value]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key == PNG:
                raise ValueError(f"holds a dictionary with the key {key!r}; expected text other than {PNG!r}")
        return {key: encode_value(part) for key, part in value.items()}
    raise ValueError(f"holds a {type(value).__name__}; expected text, numbers, None, lists, dictionaries or images")


def pixels_in(value: Any) -> int:
    """Of all pictures in a value."""
    if isinstance(value, Image.Image):
        return value.width * value.height
    if isinstance(value, (list, tuple)):
        return sum(map(pixels_in, value))
    return sum(map(pixels_in, value.values())) if isinstance(value, dict) else 0


def in_threads(function: Callable[..., Result], *lists: Sequence[Any]) -> list[Result]:
    """Of each item; for what leaves the interpreter free, as the encoding and decoding of pictures does."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(function, *lists))


class RequestError(Exception):
    """A request that is refused, with an HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def read_json(body: bytes | bytearray, strict: bool = True) -> Any:
    """
    JSON; if `strict` without what Python's parser takes besides: NaN, infinities, numbers that become one.

    Raises:
        `RequestError`: 400 for anything else.
    """

    def refuse(text: str) -> float:
        raise ValueError(f"{text} is no number in JSON")

    def finite(text: str) -> float:
        return number if math.isfinite(number := float(text)) else refuse(text)

    try:
        text = body.decode("utf-8")
        if strict and re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8")  # halves of characters are no text
        return json.loads(text, parse_constant=refuse, parse_float=finite) if strict else json.loads(text)
    except RecursionError:
        raise RequestError(400, "The body is not taken: JSON nested too deeply.") from None
    except UnicodeEncodeError:
        raise RequestError(400, "The body has half a character in a text, such as \\ud800 alone.") from None
    except ValueError as error:  # also of the encoding, and of integers with thousands of digits
        raise RequestError(400, f"The body is not JSON: {error}.") from error


def open_png(text: Any, where: str, max_pixels: int) -> Image.Image:
    """
    A picture of which only the header has been read: [`decode_png`] reads the rest.

    Raises:
        `RequestError`: 400 for what is not a PNG file in base64, 413 for one with too many pixels.
    """
    if not isinstance(text, str):
        raise RequestError(400, f"{where} is a {type(text).__name__}; expected a PNG file in base64.")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, f"{where} is not in base64: {error}.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below Pillow's
            image = Image.open(io.BytesIO(data), formats=["PNG"])
    except Image.DecompressionBombError as error:
        raise RequestError(413, f"{where} is too large: {error}") from error
    except UnidentifiedImageError as error:  # whose message names an object in memory
        raise RequestError(400, f"{where} is not a PNG file.") from error
    except Exception as error:  # of many kinds, for a file that is made to break it
        raise RequestError(400, f"{where} is not a PNG file: {error}") from error
    if image.width * image.height > max_pixels:
        raise RequestError(
            413,
            f"{where} has {image.width} x {image.height} pixels, more than the {max_pixels} that this server takes "
            "(--max_image_pixels).",
        )
    return image


def decode_png(image: Image.Image, where: str) -> Image.Image:
    """The pixels of a picture from [`open_png`], as a picture that knows no file."""
    try:
        image.load()
    except Exception as error:
        raise RequestError(400, f"{where} is not a whole PNG file: {error}") from error
    return image.copy()


def open_value(value: Any, where: str, max_pixels: int, depth: int = 0) -> Any:
    """A column's value, with its pictures opened."""
    if depth > _DEEPEST:
        raise RequestError(400, f"{where} is nested too deeply, more than {_DEEPEST} times.")
    if isinstance(value, list):
        return [open_value(part, where, max_pixels, depth + 1) for part in value]
    if isinstance(value, dict):
        if PNG in value:
            if len(value) > 1:
                raise RequestError(400, f"{where} has an object with {PNG!r} and other keys.")
            return open_png(value[PNG], where, max_pixels)
        return {key: open_value(part, where, max_pixels, depth + 1) for key, part in value.items()}
    return value


def decode_value(value: Any, where: str) -> Any:
    """A value from [`open_value`] with its pictures decoded."""
    if isinstance(value, Image.Image):
        return decode_png(value, where)
    if isinstance(value, list):
        return [decode_value(part, where) for part in value]
    if isinstance(value, dict):
        return {key: decode_value(part, where) for key, part in value.items()}
    return value


def check_token(token: str | None) -> str | None:
    """
    The token, which a header has to be able to hold.

    Raises:
        `ValueError`: without the token in its message, for one that does not fit.
    """
    if token is not None and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("A token must be of visible ASCII characters, and not empty.")
    return token


def check_scores(values: Any, count: int, what: str) -> Sequence[float | None]:
    """
    One finite number or `None` for each of `count` images, as they came in JSON.

    Raises:
        `ValueError`: for anything else.
    """
    if not isinstance(values, list) or len(values) != count:
        size = f"{len(values)} values" if isinstance(values, list) else f"a {type(values).__name__}"
        raise ValueError(f"{what} are {size}; expected a list of {count}.")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{what} hold {value!r}; expected numbers or null.")
    return [None if value is None else float(value) for value in values]
