"""Rewards by a vision-language model that judges pictures, behind any server that speaks OpenAI's chat completions."""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import exp
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, ImageOps
from transformers.utils import logging

from ..images import to_rgb
from .base import Reward, RewardUnavailableError, check_pairs, check_positive
from .http import AnswerError, Endpoint, check_url
from .wire import PNG, check_token, encode_picture


logger = logging.get_logger(__name__)

KEY_VARIABLE = "SLAS_TRL_JUDGE_API_KEY"

QUESTION = (
    "Does this image show what the following text describes, with everything that it names and nothing that "
    'contradicts it? Text: "{prompt}". Answer with one word, yes or no.'
)

# UnifiedReward 2.0 is trained with exactly this request; other words would ask another question.
_FILE = Path(__file__).parents[1] / "templates" / "unified_reward.txt"
UNIFIED_REWARD_PROMPT = _FILE.read_text(encoding="utf-8").removesuffix("\n")

_AXES = ("alignment", "coherence", "style")
_MAX_FAILED_CALLS = 5  # in a row, in which no image had a score
_LEAST_MASS = 0.1  # of yes and no together, below which their tokens are parts of words
_REFUSED = (400, 413, 422, 451)  # what servers answer to one image: their policy, its size; not a wrong key or address
_CUT = re.compile(r"(?i)length|max_tokens|filter|error|abort")  # how answers end that are not whole
_THOUGHT = re.compile(r"(?is)\A.*[<◁]/think\w*[>▷]|[<◁]think\w*[>▷].*")
# The first word; those after "answer" or a colon, but for "there is: no cat"; and the last one of a whole answer.
_YES_NO = (
    r"(?is)(?:\A\W*|(?:\b(?:boxed|answer(?: is)?)|[:>])\W*(?!no\s+\w)|(?=\w+[^\w…]*\Z))"
    r"\b(?<!or )(?<!/)(?<!not )(?<!not a )(yes|no)\b(?!\W+or\b|/)"
)
_NUMBER = r"[-+]?(?:\d+[.,]|\.)?\d+"
_SCORE = rf"\W*score\W*(?:\([^)]*\)\W*)?(?:is\W*)?({_NUMBER})"
_SPAN = rf"{_NUMBER}\s*(?:\([^)]*\)\s*)?(?:[-–—~]|\.\.|,\s|to|through|and)\s*{_NUMBER}"
# Numbers of a scale, which are no score: /10, out of a total of 10, 8 of 10, scale from 1 to 10, 1-10, 10-point scale.
_SCALE = re.compile(
    r"(?i)(?:[/⁄∕÷]|\}\s*\{|\bout[\s-]+of|\bscale\s+(?:of|from|up\s+to)|\bmax(?:imum)?|\bwhere|\bbetween"
    r"|(?<=\d):(?=\d)|(?<=\d)[\s(]*(?:(?:point|star)s\s*)?(?:of|from|over|in|per))"
    r"(?:\s*(?:an?|the|of|is|possible|perfect|total|score|max(?:imum)?|about|around)\b)*"
    rf"\W{{0,5}}(?:{_SPAN}|{_NUMBER})|(?:\bfrom\s+|(?<![\w.])){_SPAN}"
    rf"|(?<=\d)\s*\([^()]*\)|(?<![\w.]){_NUMBER}(?:[\s-]*(?:points?[\s-]*)?(?:scale|being|max(?:imum)?)\b"
    r"|\s*(?:is|=|means?|would\s+be)\s*(?:the\s+)?(?:best|worst|perfect|highest|lowest))"
)
_PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | dict.fromkeys(map(ord, "*_`"))  # no markdown
_ANSWERS = {"yes_no": (_YES_NO, 16), "number": (rf"(?<![\w.]){_NUMBER}(?!\w)", 1024)}  # pattern and longest answer


class _NoScoreError(Exception):
    """An answer in which there is no score."""


@dataclass(frozen=True)
class VLMJudge(Reward):
    """
    Asks a judge about each image, in a request of its own. An answer without a score is `None`, with a warning, and so
    is an image that the server refuses, or fails at while it answers others. Thoughts before `</think>` are not read.

    Args:
        url, model (`str`): The server's base URL, http://127.0.0.1:8000/v1, and the model's name there.
        template (`str`, *optional*): The question with `{prompt}` in it, or a file of it that ends in .txt.
        answer (`str`, *optional*, defaults to `"yes_no"`):
            "yes_no": the probability of yes, among yes and no in any spelling, where the answer says one of them: as
            first word, after "answer" or a colon, or last. Without log-probabilities the word counts, as 1 or 0.
            "number": the last number of an answer that is not cut off; the 10 of "8 / 10" or "8 of 10" is none.
        pattern (`str`, *optional*): Another regular expression of either; of the last match the first group, if any.
        low, high (`float`, *optional*): Numbers that become 0 and 1. Those outside are no score.
        api_key, api_key_env (`str`, *optional*): A bearer token, or the environment variable that has it.
        max_image_side (`int`, *optional*, defaults to `1024`): Largest side. Those below 32 are padded.
        max_tokens (`int`, *optional*): Longest answer; by default 16 tokens for yes and no, and 1024 for a number.
        extra_body (`dict` or `str`, *optional*):
            More for the body of each request, as a dictionary, JSON, or a file that ends in .json; null takes out what
            is sent otherwise: {"max_completion_tokens": 16, "max_tokens": null, "temperature": null}.
        concurrency (`int`, *optional*, defaults to `8`): Requests at a time.
        timeout, retries (*optional*, default to `60`, `6`): Seconds for an attempt, and attempts after the first.

    Raises:
        `RewardUnavailableError`: when the last attempt was not answered either, for any image.
        `ValueError`: when the server refuses the key or the address, or five calls in a row had no score.
    """

    default_name = "vlm_judge"
    measures = "whether a picture shows what its prompt says, by a vision-language model"
    blind_to = "what the judge does not see; mostly near 0 or 1, without log-probabilities only 0 or 1"
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
    _failed_calls: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self):
        name, side = self.__name__, self.max_image_side
        check_positive(name, timeout=self.timeout, concurrency=self.concurrency, max_image_side=side)
        check_url(self.url, name)
        check_token(self.api_key)
        if self.answer not in _ANSWERS:
            raise ValueError(f"answer of {name} must be one of {', '.join(_ANSWERS)}, but it is {self.answer!r}.")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"{name} needs low and high, or neither, but they are {self.low} and {self.high}.")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low of {name} must be below high, but they are {self.low} and {self.high}.")
        if "{prompt}" not in self._text():
            raise ValueError(f"template of {name} has no {{prompt}} in it: {self._text()[:200]!r}.")
        self._extra()

    def __call__(self, prompts: list[str], images: list[Image.Image], **columns: Any) -> Any:
        check_pairs(prompts, images)
        if not images:
            return []
        endpoint, template, extra = self._endpoint(), self._text(), self._extra()
        results: list[Any] = []  # as they come

        def ask(prompt: str, image: Image.Image) -> Any:
            # If nothing was answered yet, one attempt shows whether it is the image or the server.
            is_away = bool(results) and all(isinstance(result, RewardUnavailableError) for result in results)
            asked = replace(endpoint, retries=0) if is_away else endpoint
            try:
                result = asked.request(self._read, self._body(template.replace("{prompt}", prompt), image, extra))
            except (RewardUnavailableError, _NoScoreError, AnswerError) as error:
                if isinstance(error, AnswerError) and error.status not in _REFUSED:
                    raise
                result = error
            results.append(result)
            return result

        with ThreadPoolExecutor(min(self.concurrency, len(images))) as threads:
            found = list(threads.map(ask, prompts, images))
        if all(isinstance(result, RewardUnavailableError) for result in found):
            raise found[0]
        failed = [str(result) for result in found if isinstance(result, Exception)]
        self._failed_calls[:] = [*self._failed_calls, failed[0]] if len(failed) == len(found) else []
        if len(self._failed_calls) >= _MAX_FAILED_CALLS:
            raise ValueError(f"No image had a score in {_MAX_FAILED_CALLS} calls in a row. The last: {failed[0]}")
        if failed:
            reasons = " ".join([*dict.fromkeys(failed)][:3])
            logger.warning(f"{self.__name__}: {len(failed)} of {len(found)} images have no score: {reasons}")
        return [None if isinstance(result, Exception) else result for result in found]

    def _text(self) -> str:
        return Path(self.template).read_text(encoding="utf-8") if self.template.endswith(".txt") else self.template

    def _extra(self) -> dict[str, Any]:
        extra = self.extra_body or {}
        if isinstance(extra, str):
            extra = json.loads(Path(extra).read_text(encoding="utf-8") if extra.endswith(".json") else extra)
        return dict(extra)

    def _endpoint(self) -> Endpoint:
        url = check_url(self.url, self.__name__)
        return Endpoint(
            url=f"{url}{'' if urlsplit(url).path else '/v1'}/chat/completions",
            needed_by=self.__name__,
            advice="Does the server run? Raise timeout or retries, or lower concurrency, if it has too much to do.",
            secret=self.api_key or check_token(os.environ.get(self.api_key_env) or None),
            timeout=self.timeout,
            retries=self.retries,
            retried=(408, 429, *range(500, 600)),  # gateways have their own
        )

    def _body(self, text: str, image: Image.Image, extra: dict[str, Any]) -> dict[str, Any]:
        image = to_rgb(image)
        image.thumbnail((self.max_image_side, self.max_image_side), Image.Resampling.BICUBIC)
        image = ImageOps.pad(image, (max(image.width, 32), max(image.height, 32)))  # vLLM fails below Qwen's patches
        picture = {"type": "image_url", "image_url": {"url": f"data:{PNG};base64,{encode_picture(image)}"}}
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": text}]}],
            "temperature": 0,
            "max_tokens": self.max_tokens or _ANSWERS[self.answer][1],
        }
        if self.answer == "yes_no":
            body |= {"logprobs": True, "top_logprobs": 20}  # the most that OpenAI and vLLM give
        return {key: value for key, value in (body | extra).items() if extra.get(key, value) is not None}

    def _read(self, answer: Any) -> Any:
        if not isinstance(answer, dict) or "choices" not in answer:
            raise ValueError(f"no chat completion, but {str(answer)[:200]}.")
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"]
            if isinstance(text, list):
                text = "".join(part["text"] for part in text if part["type"].endswith("text"))
            text = _THOUGHT.sub("", text).strip()
        except (TypeError, LookupError):
            raise _NoScoreError(f"One has no text: {str(answer['choices'])[:200]}.") from None
        is_cut = bool(_CUT.search(str(choice.get("finish_reason"))))
        if self.answer == "yes_no":
            return self._probability(choice.get("logprobs"), text + "…" * is_cut)
        if is_cut:
            raise _NoScoreError(f"One is cut off ({choice['finish_reason']}): {text[-200:]!r}. Raise max_tokens?")
        plain = text if self.pattern else _SCALE.sub(" ", text.translate(_PLAIN))
        return self._number(plain, self.pattern or _ANSWERS["number"][0])

    def _probability(self, logprobs: Any, text: str) -> float:
        """The probability of yes, where the answer last says yes or no."""
        found = _found(self.pattern or _YES_NO, text)
        said = {_word(word) for word, _ in (found[-1:] if self.pattern else found)}
        if said not in ({"yes"}, {"no"}):
            raise _NoScoreError(f"One is {text[:200]!r}; expected yes or no.")
        mass = _probabilities(logprobs, text, found[-1][1])
        if (total := mass["yes"] + mass["no"]) >= _LEAST_MASS:  # NaN is not
            return mass["yes"] / total
        what = "gives no log-probabilities of yes and no, which count as 1 and 0"
        logger.warning_once(f"{self.__name__}: {self.model} {what}.")
        return float(said == {"yes"})

    def _number(self, text: str, pattern: str) -> Any:
        try:
            number = float(_found(pattern, text)[-1][0].replace(",", "."))
        except (LookupError, ValueError):
            raise _NoScoreError(f"One is {text[-200:]!r}; expected a number.") from None
        if self.low is None or self.high is None:
            return number
        if not self.low <= number <= self.high:
            raise _NoScoreError(f"One has the number {number:g}; expected one from {self.low:g} to {self.high:g}.")
        return (number - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class UnifiedReward(VLMJudge):
    """
    UnifiedReward 2.0 (https://huggingface.co/papers/2503.05236), by `vllm serve CodeGoat24/UnifiedReward-2.0-qwen-7b`:
    its numbers from 1 to 5 become 0 to 1, as components `alignment`, `coherence` and `style`. Options as [`VLMJudge`].
    """

    default_name = "unified_reward"
    measures = "how well a picture fits its prompt and looks, by a vision-language model"
    blind_to = "what a 7B model does not see"
    model: str = "CodeGoat24/UnifiedReward-2.0-qwen-7b"
    template: str = UNIFIED_REWARD_PROMPT
    answer: str = "number"
    low: float | None = 1.0
    high: float | None = 5.0
    version: str = "2.0"

    def __post_init__(self):
        if (self.version, self.template, self.answer, self.pattern) != ("2.0", UNIFIED_REWARD_PROMPT, "number", None):
            raise ValueError(f"{self.__name__} is version 2.0, with its own question: use vlm_judge for other ones.")
        super().__post_init__()

    def __call__(self, prompts: list[str], images: list[Image.Image], **columns: Any) -> dict[str, list[float | None]]:
        scores = super().__call__(prompts, images, **columns)
        return {axis: [score and score[axis] for score in scores] for axis in _AXES}

    def _number(self, text: str, pattern: str) -> Any:
        score = super()._number
        return {axis: score(text, f"(?i){axis}{_SCORE}") for axis in _AXES}


vlm_judge = VLMJudge
unified_reward = UnifiedReward


def _found(pattern: str, text: str) -> list[tuple[str, int]]:
    """Matches of the pattern, or of its first group if there is one, and their places."""
    groups = ((found, min(1, found.re.groups)) for found in re.finditer(pattern, text))
    return [(found[group] or "", found.start(group)) for found, group in groups]


def _probabilities(logprobs: Any, text: str, place: int) -> dict[str, float]:
    """Probabilities of yes and no at a place in the text, as far as the log-probabilities tell."""
    mass = {"yes": 0.0, "no": 0.0}
    with suppress(TypeError, LookupError, AttributeError, ValueError, OverflowError):
        place += "".join(token["token"] for token in logprobs["content"]).lower().rindex(text.lower().rstrip("…"))
        for token in logprobs["content"]:  # which may begin with what a judge has thought
            if (place := place - len(token["token"])) < 0:
                break
        for one in token["top_logprobs"]:
            if (word := _word(one["token"])) in mass and one["logprob"] is not None:  # null is what became of -inf
                mass[word] += exp(min(one["logprob"], 0.0))
    return mass


def _word(token: str) -> str:
    return re.sub(r"[\W_▁Ġ]+", "", token).lower()  # tokens come with blanks, quotes and full stops
