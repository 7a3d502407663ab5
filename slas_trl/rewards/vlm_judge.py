"""Rewards by a vision-language model that judges pictures, behind any server that speaks OpenAI's chat completions."""

import json
import logging
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from math import exp, inf
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from PIL import Image, ImageOps

from slas_trl.images import to_rgb
from slas_trl.rewards.base import Reward, RewardUnavailableError, check_pairs, load_once
from slas_trl.rewards.http_client import (
    MAX_FAILED_CALLS,
    AnswerError,
    Endpoint,
    FailedCalls,
    check_patience,
    check_url,
)
from slas_trl.rewards.wire import PNG, check_token, encode_base64


logger = logging.getLogger(__name__)

KEY_VARIABLE = "SLAS_TRL_JUDGE_API_KEY"

QUESTION = (
    "Does this image show what the following text describes, with everything that it names and nothing that "
    'contradicts it? Text: "{prompt}". Answer with one word, yes or no.'
)

# These models are trained with exactly these requests; other words would ask another question.
UNIFIED_REWARD_PROMPTS = {
    "1.0": (
        "You are given a text caption and a generated image based on that caption. Your task is to evaluate "
        "this image based on two key criteria:\n"
        "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider "
        "the accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
        "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail "
        "preservation, color accuracy, and overall aesthetic appeal.\n"
        "Extract key elements from the provided text caption, evaluate their presence in the generated image "
        "using the format: 'element (type): value' (where value=0 means not generated, and value=1 means "
        "generated), and assign a score from 1 to 5 after 'Final Score:'.\n"
        "Your task is provided as follows:\nText Caption: [{prompt}]"
    ),
    "2.0": (
        "You are presented with a generated image and its associated text caption. Your task is to analyze the "
        "image across multiple dimensions in relation to the caption. Specifically:\n"
        "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
        "- Alignment Score: How well the image matches the caption in terms of content.\n"
        "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
        "distortions, etc.).\n"
        "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
        "Output your evaluation using the format below:\n\n"
        "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
        "Your task is provided as follows:\nText Caption: [{prompt}]"
    ),
}

_AXES = ("alignment", "coherence", "style")
_TOP_LOGPROBS = 20  # the most that OpenAI and vLLM give
_LEAST_MASS = 0.1  # of yes and no together, below which the judge means to say something else
_REFUSED = (400, 413, 422, 451)  # what servers answer to one image: their policy, its size; not a wrong key or address
_CUT = re.compile(r"(?i)length|max_tokens|filter|error|abort")  # how answers end that are not whole
_THOUGHT = re.compile(r"(?is)\A.*[<◁]/think\w*[>▷]|[<◁]think\w*[>▷].*")
# The first word; those after "answer" or a colon, but for "there is: no cat"; and the last one of a whole answer.
_YES_NO = (
    r"(?is)(?:\A\W*|(?:\b(?:boxed|answer(?: is)?)|[:>])\W*(?!no\s+\w)|(?=\w+[^\w…]*\Z))"
    r"\b(?<!or )(?<!/)(yes|no)\b(?!\W+or\b|/)"
)
_NUMBER = r"[-+]?(?:\d+[.,]|\.)?\d+"
_LAST_NUMBER = rf"(?<![\w.]){_NUMBER}(?!\w)"
_SCORE = rf"\W*score\W*(?:\([^)]*\)\W*)?(?:is\W*)?({_NUMBER})"
_SPAN = rf"{_NUMBER}\s*(?:\([^)]*\)\s*)?(?:[-–—~]|\.\.|,\s|to|through|and)\s*{_NUMBER}"
# Numbers of a scale, which are no score: /10, out of a total of 10, 8 of 10, scale from 1 to 10, 1-10, 10-point scale.
_SCALE = re.compile(
    r"(?i)(?:[/⁄∕÷]|\}\s*\{|\bout[\s-]+of|\bscale\s+(?:of|from|up\s+to)|\bmax(?:imum)?|\bwhere|\bbetween"
    r"|(?<=\d):(?=\d)|(?<=\d)[\s(]*(?:(?:point|star)s\s*)?(?:of|from|over|in|per))"
    r"(?:\s*(?:an?|the|of|is|possible|perfect|total|score|max(?:imum)?)\b)*"
    rf"\W{{0,5}}(?:{_SPAN}|{_NUMBER})|(?:\bfrom\s+|(?<![\w.])){_SPAN}"
    rf"|(?<=\d)\s*\([^()]*\)|(?<![\w.]){_NUMBER}(?:[\s-]*(?:points?[\s-]*)?(?:scale|being|max(?:imum)?)\b"
    r"|\s*(?:is|=|means?|would\s+be)\s*(?:the\s+)?(?:best|worst|perfect|highest|lowest))"
)
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys(map(ord, "*_`"))  # no markdown
Scores = float | dict[str, float]


class _NoScoreError(Exception):
    """An answer in which there is no score."""


@dataclass(frozen=True)
class VLMJudge(Reward):
    """
    Asks a judge about each image, in a request of its own. An answer without a score in it is `None`, with a warning,
    and so is an image that the server refuses, or at which it fails while it answers others of the same call; after
    five calls in a row without a score, an error ends the training. What a judge thinks before `</think>` is not read.

    Args:
        url (`str`):
            The server's base URL, as for OpenAI's client: http://127.0.0.1:8000/v1. Without a path, /v1 is added.
        model (`str`): The model's name there.
        template (`str`, *optional*):
            What is asked, with `{prompt}` in the place of the prompt; or a file that ends in .txt.
        answer (`str`, *optional*, defaults to `"yes_no"`):
            "yes_no": the probability of yes, among yes and no in any spelling, where the answer says one of them: as
            first word, after "answer" or a colon, or last; both are no score. Without log-probabilities the word
            counts, as 1 or 0.
            "number": the last number of an answer that is not cut off; the 10 of "8 / 10" or "8 of 10" is none.
        pattern (`str`, *optional*):
            Another regular expression of either. The last match counts, and its first group if there is one.
        low, high (`float`, *optional*):
            The worst and the best number that the judge may give, which become 0 and 1. Others are no score. Without
            both, the number is the score.
        api_key (`str`, *optional*):
            Sent as a bearer token; by default what the environment variable `api_key_env` has, if anything. By name it
            would end up wherever the name does, so use the variable there.
        api_key_env (`str`, *optional*, defaults to `"SLAS_TRL_JUDGE_API_KEY"`): An environment variable's name.
        max_image_side (`int`, *optional*, defaults to `1024`): Largest side. Those below 32 are padded.
        max_tokens (`int`, *optional*): Longest answer; 16 tokens for yes and no by default, and 1024 for a number.
        extra_body (`dict` or `str`, *optional*):
            More for the body of each request, as a dictionary, JSON, or a file that ends in .json; null takes out what
            is sent otherwise. For servers that take neither max_tokens nor a temperature:
            {"max_completion_tokens": 16, "max_tokens": null, "temperature": null}. By name use a file, since a comma
            begins another option.
        concurrency (`int`, *optional*, defaults to `8`): Requests at a time, over all threads.
        timeout (`float`, *optional*, defaults to `60`): Seconds for one attempt.
        retries (`int`, *optional*, defaults to `6`): Further attempts where the server is busy or away.

    Raises:
        `RewardUnavailableError`: when the last attempt was not answered either, for any image.
        `ValueError`: when the server refuses the key or the address, with its own message, or five calls in a row had
            no score.
    """

    default_name: ClassVar[str] = "vlm_judge"
    url: str
    model: str
    template: str = QUESTION
    answer: str = "yes_no"
    pattern: str | None = None
    low: float | None = None
    high: float | None = None
    api_key: str | None = field(default=None, repr=False)
    api_key_env: str = KEY_VARIABLE
    max_image_side: int = 1024
    max_tokens: int | None = None
    extra_body: dict[str, Any] | str | None = None
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 6
    _failed_calls: FailedCalls = field(default_factory=FailedCalls, init=False, repr=False, compare=False)

    def __post_init__(self):
        name = self.__name__
        check_url(self.url, name)
        check_token(self.api_key)
        check_patience(name, self.timeout, self.retries)
        if self.answer not in ("yes_no", "number"):
            raise ValueError(f"answer of {name} must be yes_no or number, but it is {self.answer!r}.")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"{name} has one of low and high; expected both or none.")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low of {name} must be below high, but they are {self.low} and {self.high}.")
        for option in ("max_image_side", "concurrency"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} of {name} must be at least 1, but it is {getattr(self, option)}.")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern of {name} is no regular expression: {error}.") from error
        if "{prompt}" not in self._text():
            raise ValueError(f"template of {name} has no {{prompt}} in it: {self._text()[:200]!r}.")
        self._extra()

    def __call__(self, prompts: list[str], images: list[Image.Image], **columns: Any) -> Any:
        check_pairs(prompts, images)
        if not images:
            return []
        template = self._text()
        stop, slots = threading.Event(), _slots(self._endpoint().url, self.concurrency)
        answered, unanswered = [], []

        def ask(prompt: str, image: Image.Image) -> Scores | Exception:
            with slots:
                try:
                    result = self._endpoint().request("POST", self._read, self._body(template, prompt, image), stop)
                except (_NoScoreError, RewardUnavailableError, AnswerError) as error:
                    if isinstance(error, AnswerError) and error.status not in _REFUSED:
                        stop.set()  # the others need not wait for the same
                        raise
                    result = error
            (unanswered if isinstance(result, RewardUnavailableError) else answered).append(result)
            if not answered:
                stop.set()  # one attempt for each of the others shows whether it is the image or the server
            return result

        with ThreadPoolExecutor(min(self.concurrency, len(images))) as threads:
            found = list(threads.map(ask, prompts, images))
        failed = [result for result in found if isinstance(result, Exception)]
        if not answered:
            raise unanswered[0]
        if self._failed_calls.are_too_many(len(failed) == len(found)):
            raise ValueError(f"No image had a score in {MAX_FAILED_CALLS} calls in a row. The last: {failed[0]}")
        if failed:
            reasons = " ".join([*dict.fromkeys(map(str, failed))][:3])
            logger.warning("%s: %d of %d images have no score: %s", self.__name__, len(failed), len(found), reasons)
        return self._joined([None if isinstance(result, Exception) else result for result in found])

    def _joined(self, scores: Sequence[Scores | None]) -> Any:
        return list(scores)

    def _text(self) -> str:
        return Path(self.template).read_text(encoding="utf-8") if self.template.endswith(".txt") else self.template

    def _extra(self) -> dict[str, Any]:
        extra = self.extra_body or {}
        try:
            if isinstance(extra, str):
                extra = json.loads(Path(extra).read_text(encoding="utf-8") if extra.endswith(".json") else extra)
            json.dumps(extra, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra_body of {self.__name__} is no JSON: {error}.") from error
        if not isinstance(extra, dict) or "messages" in extra:
            raise ValueError(
                f"extra_body of {self.__name__} must be an object without messages, as in "
                f'{{"max_tokens": null}}, but it is {str(extra)[:200]}.'
            )
        return extra

    def _endpoint(self) -> Endpoint:
        url = check_url(self.url, self.__name__)
        key = self.api_key or check_token(os.environ.get(self.api_key_env) or None)
        return Endpoint(
            url=f"{url}{'' if urlsplit(url).path else '/v1'}/chat/completions",
            needed_by=self.__name__,
            advice="Does the server run, and is it one of OpenAI's chat completions? Raise timeout or retries, or "
            "lower concurrency, if it has too much to do.",
            secret=key,
            timeout=self.timeout,
            retries=self.retries,
            retried=(408, 429, *range(500, 600)),  # gateways have their own
            strict=False,
        )

    def _body(self, template: str, prompt: str, image: Image.Image) -> bytes:
        image = to_rgb(image)
        image.thumbnail((self.max_image_side, self.max_image_side), Image.Resampling.BICUBIC)
        image = ImageOps.pad(image, (max(image.width, 32), max(image.height, 32)))  # vLLM fails below Qwen's patches
        content = [
            {"type": "image_url", "image_url": {"url": f"data:{PNG};base64,{encode_base64(image)}"}},
            {"type": "text", "text": template.replace("{prompt}", prompt)},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens or (16 if self.answer == "yes_no" else 1024),
        }
        if self.answer == "yes_no":
            body |= {"logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        extra = self._extra()
        body = {key: value for key, value in (body | extra).items() if extra.get(key, value) is not None}
        return json.dumps(body).encode()

    def _read(self, answer: Any) -> Scores:
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            if isinstance(text, list):
                text = "".join(part["text"] for part in text if part["type"].endswith("text"))
            text = _THOUGHT.sub("", text).strip()
        except (TypeError, LookupError, AttributeError):
            if not isinstance(answer, dict) or "choices" not in answer:
                raise ValueError(f"no chat completion, but {str(answer)[:200]}.") from None
            raise _NoScoreError(f"One has no text: {str(answer['choices'])[:200]}.") from None
        is_cut = bool(_CUT.search(str(choice.get("finish_reason"))))
        if self.answer == "yes_no":
            return self._probability(choice.get("logprobs"), text + "…" * is_cut)
        if is_cut:
            raise _NoScoreError(f"One is cut off ({choice['finish_reason']}): {text[-200:]!r}. Raise max_tokens?")
        plain = text if self.pattern else _SCALE.sub(" ", text.translate(_PLAIN))
        return self._number(plain, self.pattern or _LAST_NUMBER)

    def _probability(self, logprobs: Any, text: str) -> float:
        if self.pattern is None:
            said = {found[1].lower() for found in re.finditer(_YES_NO, text)}
            if len(said) > 1 or re.search(r"(?i)\bnot\W+(?:a\W+)?(?:yes|no)\b", text):
                raise _NoScoreError(f"One is {text[:200]!r}; expected yes or no.")
        word, place = _last(self.pattern or _YES_NO, text)
        has_said = word or (self.pattern is None and re.search(r"\w", text))
        yes, no = _probabilities(logprobs if has_said else None, text, place)
        if yes + no >= _LEAST_MASS:
            return yes / (yes + no)
        if (word := _word(word)) not in ("yes", "no"):
            raise _NoScoreError(f"One is {text[:200]!r}; expected yes or no.")
        _warn_once(f"{self.__name__}: {self.model} gives no log-probabilities; its yes and no count as 1 and 0.")
        return float(word == "yes")

    def _number(self, text: str, pattern: str) -> float:
        found, _ = _last(pattern, text)
        try:
            number = float(found.replace(",", "."))
        except ValueError:
            raise _NoScoreError(f"One is {text[-200:]!r}; expected a number.") from None
        if self.low is None or self.high is None:
            return number
        if not self.low <= number <= self.high:
            raise _NoScoreError(f"One has the number {number:g}; expected one from {self.low:g} to {self.high:g}.")
        return (number - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class UnifiedReward(VLMJudge):
    """
    UnifiedReward (https://huggingface.co/papers/2503.05236), as vLLM serves it: `vllm serve
    CodeGoat24/UnifiedReward-2.0-qwen-7b`. Its numbers from 1 to 5 become 0 to 1.

    Args:
        url, model and the rest: as of [`VLMJudge`]; what is asked and how the answer is read is fixed.
        version (`str`, *optional*, defaults to `"2.0"`):
            "2.0": components `alignment`, `coherence` and `style`. "1.0", for the models without 2.0 in their names:
            one score.
    """

    default_name: ClassVar[str] = "unified_reward"
    model: str = "CodeGoat24/UnifiedReward-2.0-qwen-7b"
    answer: str = "number"
    low: float | None = 1.0
    high: float | None = 5.0
    version: str = "2.0"

    def __post_init__(self):
        if self.version not in UNIFIED_REWARD_PROMPTS:
            raise ValueError(f"version of {self.__name__} must be 1.0 or 2.0, but it is {self.version!r}.")
        if (self.template, self.answer, self.pattern) != (QUESTION, "number", None):
            raise ValueError(f"{self.__name__} asks what it was trained with: use vlm_judge for other questions.")
        super().__post_init__()

    def _text(self) -> str:
        return UNIFIED_REWARD_PROMPTS[self.version]

    def _number(self, text: str, pattern: str) -> Any:
        if self.version == "1.0":
            return super()._number(text, f"(?i)final{_SCORE}")
        score = super()._number
        return {axis: score(text, f"(?i){axis}{_SCORE}") for axis in _AXES}

    def _joined(self, scores: Sequence[Scores | None]) -> Any:
        if self.version == "1.0":
            return list(scores)
        return {axis: [score[axis] if isinstance(score, dict) else None for score in scores] for axis in _AXES}


vlm_judge = VLMJudge
unified_reward = UnifiedReward


def _last(pattern: str, text: str) -> tuple[str, int]:
    """What the pattern finds last, or its first group, and where."""
    found = [*re.finditer(pattern, text)]
    group = min(1, found[-1].re.groups) if found else 0
    return (found[-1][group] or "", found[-1].start(group)) if found else ("", 0)


def _probabilities(logprobs: Any, text: str, place: int) -> tuple[float, float]:
    """Of yes and no at a place in the text, as far as the log-probabilities tell."""
    mass, token = {"yes": 0.0, "no": 0.0}, {}
    with suppress(TypeError, LookupError, AttributeError, ValueError):
        place += "".join(token["token"] for token in logprobs["content"]).lower().rindex(text.lower().rstrip("…"))
        for token in logprobs["content"]:  # which may begin with what a judge has thought
            if (place := place - len(token["token"])) < 0:
                break
        for candidate in token.get("top_logprobs") or [token]:
            value = -inf if candidate["logprob"] is None else candidate["logprob"]
            if (word := _word(candidate["token"])) in mass and value < 1:  # NaN is not
                mass[word] += exp(min(value, 0.0))
    return mass["yes"], mass["no"]


def _word(token: str) -> str:
    """Without the blanks, quotes and full stops that tokens come with."""
    return re.sub(r"[\W_▁Ġ]+", "", token).lower()


@load_once
def _slots(url: str, concurrency: int) -> threading.BoundedSemaphore:
    return threading.BoundedSemaphore(concurrency)


@load_once
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
