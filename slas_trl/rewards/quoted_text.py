"""Does a picture show the text that its prompt quotes? Read by RapidOCR, scored as in Flow-GRPO."""

import os
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.utils import logging

from ..images import to_rgb
from .base import Reward, check_pairs, load_once, require


logger = logging.get_logger(__name__)

# People mix the kinds. 5" is a length.
_DOUBLE = '"“”„‟＂〝〞«»「」『』'
_QUOTED = re.compile(rf"(?<!\d)[{_DOUBLE}]([^{_DOUBLE}]*)[{_DOUBLE}]")
# Neither the apostrophes of "the dog's bone" and "the dogs' bone", nor those of "rock 'n' roll".
_SINGLE = re.compile(r"(?<!\w)['‘‚](?!n['’])(?=\S)((?:[^'‘’]|(?<=\w)['’](?=\w))+)(?<=\S)['‘’](?!\w)")
# Readers write one or the other, and nobody can tell which one a picture shows.
_STRAIGHT = str.maketrans("‘’“”", "''\"\"")


@dataclass(frozen=True)
class OCR(Reward):
    """
    How much of the text that a prompt quotes is to be read in its picture: the reward of
    [Flow-GRPO](https://huggingface.co/papers/2505.05470), with another reader. The text is the first in double quotes
    of any kind, or in single ones; or what a column `target_text` has. A prompt without any has no score.

    1 if the text is there, whatever else is; otherwise `1 - d / n`, where `d` is the edit distance between all that is
    read and the text, at most its length `n`. Spaces, case, the kind of quotes and the width of a character do not
    matter. Text without contrast or smaller than some 8 pixels is not read. Nothing is downloaded.

    Args:
        threads (`int`, *optional*): Of the reader, which runs on the CPU; by default as many as PyTorch's.
        min_confidence (`float`, *optional*, defaults to `0.5`): Text that is read with less is left out: noise.
        min_side (`int`, *optional*, defaults to `736`): The shorter side that smaller pictures are enlarged to.
    """

    default_name = "ocr"
    measures = "whether the text in the quotes of a prompt can be read in its picture"
    blind_to = "all that is not text; text elsewhere counts only if the right one is misread"
    threads: int | None = None
    min_confidence: float = 0.5
    min_side: int = 736

    def __post_init__(self):
        if self.min_side < 32 or not 0 <= self.min_confidence <= 1:
            raise ValueError(f"{self.__name__} needs a min_side from 32 on, and a min_confidence in [0, 1].")

    def __call__(self, prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
        check_pairs(prompts, images)
        targets = columns.get("target_text", [None] * len(images))
        return [self._score(*row) for row in zip(prompts, images, targets, strict=True)]

    def read(self, image: Image.Image) -> list[str]:
        """The lines of text in a picture, from top to bottom."""
        reader = _reader(self.threads or torch.get_num_threads(), self.min_side)
        image = to_rgb(image)
        if max(image.size) > 3 * min(image.size):  # the reader would enlarge the short side, at any cost
            image.thumbnail((2000, 2000))
            third = max(image.size) // 3
            image = ImageOps.pad(image, (max(image.width, third), max(image.height, third)))
        found = reader(np.asarray(image)[..., ::-1], text_score=0)  # BGR
        lines = zip(found.txts or (), found.scores or (), strict=True)
        return [text for text, confidence in lines if confidence >= self.min_confidence]

    def _score(self, prompt: str, image: Image.Image, target: Any) -> float | None:
        target = str("" if target is None else target).strip() or quoted_text(prompt)
        if target is None:
            logger.warning_once(f"{self.__name__} reads the quotes of a prompt; those without any have no score.")
            return None
        return text_score(target, "".join(self.read(image)))


ocr = OCR()


def quoted_text(prompt: str) -> str | None:
    """The text in the first pair of quotes that has something in it, double ones before single ones, or `None`."""
    return next(filter(None, map(str.strip, _QUOTED.findall(prompt) + _SINGLE.findall(prompt))), None)


def text_score(target: str, read: str) -> float:
    distance = require("rapidfuzz.distance", "ocr").Levenshtein.distance
    target, read = _plain(target), _plain(read)
    if target in read:
        return 1.0
    return 1 - min(distance(target, read), len(target)) / len(target)


def _plain(text: str) -> str:
    """Without spaces and case. NFKC makes the full-width signs of a reader of Chinese those of the keyboard."""
    return "".join(unicodedata.normalize("NFKC", text).translate(_STRAIGHT).casefold().split())


@load_once
def _reader(threads: int, min_side: int) -> Any:
    # From 1.29 on it reports each session to its maker, unless this is set before it is imported.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    require("onnxruntime", "ocr").disable_telemetry_events()  # should it have been imported before
    rapidocr = require("rapidocr", "ocr")
    return rapidocr.RapidOCR(
        params={
            "Global.use_cls": False,  # it turns lines that are upside down
            "Det.limit_side_len": min_side,
            "Global.log_level": "critical",  # otherwise a line for every picture without text
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )
