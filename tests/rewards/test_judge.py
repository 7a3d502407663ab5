"""A judge behind a server that speaks OpenAI's chat completions: a real one, of the standard library."""

import base64
import io
import json
import logging
import math
import time

import pytest
from PIL import Image

from slas_trl.rewards import UnifiedReward, VLMJudge, vlm_judge
from slas_trl.rewards.base import RewardUnavailableError
from slas_trl.rewards.judge import KEY_VARIABLE, UNIFIED_REWARD_PROMPT, _NoScoreError
from slas_trl.rewards.resolve import resolve_reward, reward_name
from tests.rewards.served_rewards import number_of, picture
from tests.rewards.serving import answering


IMAGES = [picture(number) for number in range(6)]
PROMPTS = ["a cat"] * 6


@pytest.fixture
def server(monkeypatch):
    """Answers with what `judge(number of the picture, attempt)` returns: a status and a body, or a choice."""
    monkeypatch.setattr("slas_trl.rewards.http._FIRST_WAIT", 0.02)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)

    def answer(path, headers, content):
        body = json.loads(content)
        head, _, data = body["messages"][0]["content"][0]["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        server.requests.append((path, headers, body, image))
        server.numbers.append(number := number_of(image))
        said = server.judge(number, server.numbers.count(number))
        status, content = said if isinstance(said, tuple) else (200, {"choices": [said]})
        return status, content if isinstance(content, bytes) else json.dumps(content).encode()

    with answering(answer) as server:
        server.requests, server.numbers = [], []
        yield server


def says(text, *tokens):
    """A choice, with the likeliest tokens in the place of each token, and their probabilities."""
    content = []
    for place in tokens:
        top = [{"token": token, "logprob": math.log(p)} for token, p in place.items()]
        content.append({"token": max(place, key=place.get), "top_logprobs": top})
    return {"message": {"content": text}, "logprobs": {"content": content} if tokens else None}


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def asked(server):
    return [body["messages"][0]["content"][1]["text"] for _, _, body, _ in server.requests]


def read(content, logprobs=None, finish_reason="stop", model="another-model", **options):
    """What a judge makes of an answer, without a server."""
    judge = VLMJudge("http://127.0.0.1:1", model, **options)
    choice = {"message": {"content": content}, "logprobs": logprobs, "finish_reason": finish_reason}
    try:
        return judge._read({"choices": [choice]})
    except _NoScoreError:
        return None


# What is asked


def test_what_is_asked(server, tmp_path):
    server.judge = lambda number, attempt: says("yes", {"yes": 1.0})
    images = [Image.effect_noise((300, 200), 50), picture(7, (20, 10)).convert("RGBA")]
    judge = VLMJudge(server.url + "/v1/", "a-model", template="{x} {prompt}?", max_image_side=150, concurrency=1)
    judge(["a {prompt}", "b"], images)
    (path, headers, body, first), (_, _, _, second) = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] is None
    assert (body["model"], body["temperature"], body["logprobs"], body["top_logprobs"]) == ("a-model", 0, True, 20)
    assert asked(server) == ["{x} a {prompt}?", "{x} b?"]
    assert first.size == (150, 100) and second.size == (32, 32) and second.mode == "RGB"
    assert images[0].size == (300, 200)

    (file := tmp_path / "question.txt").write_text("Is it, well, {prompt}?")
    judge = resolve_reward(f"vlm_judge:url={server.url},model=a-model,template={file}")
    assert judge(["green"], IMAGES[:1]) == [1.0] and asked(server)[-1] == "Is it, well, green?"


@pytest.mark.parametrize(("size", "sent"), [((40, 2048), (32, 1024)), ((5000, 1), (1024, 32)), ((26, 40), (32, 40))])
def test_no_side_is_too_small_for_a_server(server, size, sent):
    server.judge = lambda number, attempt: says("yes", {"yes": 1.0})
    assert VLMJudge(server.url, "a-model")(["a"], [Image.new("I;16", size, 65535)]) == [1.0]
    assert server.requests[0][3].size == sent and server.requests[0][3].getextrema() != ((0, 0),) * 3


def test_servers_that_take_neither_max_tokens_nor_a_temperature(server, tmp_path):
    server.judge = lambda number, attempt: says("yes")
    extra = {"max_completion_tokens": 32, "max_tokens": None, "temperature": None, "seed": 1}
    (file := tmp_path / "extra.json").write_text(json.dumps(extra))
    for given in (extra, json.dumps(extra), str(file)):
        assert VLMJudge(server.url, "a-model", extra_body=given)(["a"], IMAGES[:1]) == [1.0]
        sent = server.requests[-1][2]
        assert sent.keys() == {"model", "messages", "logprobs", "top_logprobs", "max_completion_tokens", "seed"}
        assert (sent["max_completion_tokens"], sent["seed"]) == (32, 1)


def test_keys(server, monkeypatch):
    server.judge = lambda number, attempt: says("yes")
    judge = VLMJudge(server.url, "a-model", api_key="s3cret")
    monkeypatch.setenv("MY_KEY", "from-the-environment")
    monkeypatch.setenv("OPENAI_API_KEY", "not-meant-for-it")
    others = VLMJudge(server.url, "a-model", api_key_env="MY_KEY"), VLMJudge(server.url, "a-model")
    for one, sent in zip((judge, *others), ("Bearer s3cret", "Bearer from-the-environment", None), strict=True):
        one(["a"], IMAGES[:1])
        assert server.requests[-1][1]["Authorization"] == sent
    assert "s3cret" not in repr(judge)


@pytest.mark.parametrize(("option", "value"), [("answer", "x"), ("template", "x"), ("low", 1), ("timeout", None)])
def test_options_that_cannot_be(option, value):
    with pytest.raises(ValueError, match=option):
        vlm_judge("http://127.0.0.1:1", "a-model", **{option: value})


# Yes and no


def test_the_probability_of_yes(server, caplog):
    choices = [
        says("Yes", {"Yes": 0.6, "No": 0.2, "Maybe": 0.2}),
        says("Yes", {" yes": 0.25, "YES": 0.25, '"Yes': 0.25, "▁no": 0.25}),
        says("\n\nNo.", {"\n\n": 0.9, "Yes": 0.1}, {"No.": 0.9, "Yes": 0.1}),
        says("yes", {"yes": 1.0}),
        says("Sure", {"Sure": 0.99, "Yes": 0.005, "No": 0.005}),
        says("yesterday", {"yesterday": 0.8, "nothing": 0.2}),
    ]
    running, most = [], []

    def judge(number, attempt):
        running.append(number)
        most.append(len(running))
        time.sleep(0.05)
        running.remove(number)
        return choices[number]

    server.judge = judge
    scores = VLMJudge(server.url, "a-model", concurrency=3)(PROMPTS, IMAGES)
    assert scores == pytest.approx([0.75, 0.75, 0.1, 1.0, None, None])
    assert len(server.requests) == 6
    (warning,) = warnings(caplog)
    assert "2 of 6 images" in warning and "'Sure'" in warning and max(most) == 3


SAID = {
    1.0: [
        *('{"answer": "yes"}', "Answer: yes", r"\boxed{yes}", "The answer is yes.", "**Yes**", "Yes or no? Yes."),
        *("<answer>yes</answer>", "It is all there. So, yes.", "- Yes", "There is no doubt: yes"),
        *("Yes, and there is no cat.", "Answer yes or no: yes", "<think>\n\n</think>\n\nyes"),
        "<think>Is it a dog? No. Answer: no</think> Yes",
    ],
    0.0: ["Final answer: **No**", '{"verdict": "no", "reason": "blue"}', "No cat is there."],
    None: [
        *("I cannot answer yes or no.", "There is no way to tell", "yesterday", "", "yes/no?", "Yes and no"),
        *("Is the answer yes? No.", "No doubt, yes", "Not a yes", "not yes", [{"type": "text"}]),
        "<think>Is it a dog? The answer is yes",
    ],
}


@pytest.mark.parametrize(("text", "score"), [(text, score) for score, texts in SAID.items() for text in texts])
def test_how_yes_and_no_are_said(text, score):
    assert read(text) == score


VERDICT = r"Verdict: (\w+)"


@pytest.mark.parametrize(("text", "score"), [("No doubt. Verdict: YES", 1), ("Yes", None), ("Verdict: maybe", None)])
def test_yes_and_no_by_a_pattern(text, score):
    assert read(text, says("Yes", {"Yes": 1.0})["logprobs"], pattern=VERDICT) == score


YES = {"yes": 0.6, "no": 0.2}
THINK, NO = {"<think>": 1.0}, {"no": 1.0}


@pytest.mark.parametrize(
    ("text", "tokens", "score"),
    [
        ("Yes", [THINK, NO, {"</think>": 1.0}, {"\n\n": 1.0}, YES], 0.75),  # a reasoning parser
        ("<think>no</think>Yes", [THINK, NO, {"</think>": 1.0}, YES], 0.75),
        ("Yes", [THINK, {"It": 1.0}], 1.0),
        ("No, no cat.", [{"No": 0.75, "Yes": 0.25}, {",": 1.0}, {" no": 1.0}, {" cat.": 1.0}], 0.25),
        ('{"answer": "yes"}', [{'{"': 1.0}, {"answer": 1.0}, {'": "': 1.0}, YES, {'"}': 1.0}], 0.75),
        ("Nothing is odd. Answer: yes", [{"No": 1.0}, {"thing is odd.": 1.0}, {" Answer:": 1.0}, {" yes": 1.0}], 1.0),
        ("", [THINK, {"yes": 1.0}], None),
    ],
)
def test_the_token_that_says_it(text, tokens, score):
    assert read(text, says("", *tokens)["logprobs"]) == (score and pytest.approx(score))


@pytest.mark.parametrize("reason", ["length", "content_filter", "MAX_TOKENS"])
def test_an_answer_that_is_cut_off(reason):
    assert read("The picture shows 3 cats on 2 chairs. Looking", finish_reason=reason, answer="number") is None
    assert read("Yes, it sho", finish_reason=reason) == 1.0
    assert read("There is a cat with no", finish_reason=reason) is None


def test_without_log_probabilities(caplog):
    assert [read(text, model="a-quiet-model") for text in ("Yes, it does.", "NO", "I cannot say")] == [1, 0, None]
    (once,) = warnings(caplog)
    assert "log-probabilities" in once


def candidates(*logprobs):
    top = [{"token": token, "logprob": value} for token, value in zip(("Yes", "No", "no"), logprobs, strict=False)]
    return {"content": [{"token": "Yes", "logprob": None, "top_logprobs": top}]}


@pytest.mark.parametrize(
    "logprobs",
    [
        *({"content": content} for content in ([{"token": 1}], ["yes"], [], None)),
        *(candidates(value) for value in (None, "x", -math.inf, math.nan)),
        *(candidates(-9.0, None), candidates(math.log(0.5), None, -math.inf), "x"),
    ],
)
def test_log_probabilities_that_say_nothing_against_it(server, logprobs):
    """The word itself is there. JSON has no NaN and infinities, but servers send them."""
    server.judge = lambda number, attempt: {"message": {"content": "Yes"}, "logprobs": logprobs}
    assert VLMJudge(server.url, "a-model")(["a"], IMAGES[:1]) == [1.0]


# Numbers


def test_numbers(server, caplog):
    texts = ["It is good. Score: 8", "7.5/10", "I give 3 out of 10", "-2", "11", "none"]
    server.judge = lambda number, attempt: says(texts[number])
    judge = VLMJudge(server.url, "a-model", answer="number", template="{prompt}: 0 to 10?")
    assert judge(PROMPTS, IMAGES) == [8.0, 7.5, 3.0, -2.0, 11.0, None]
    assert "logprobs" not in server.requests[0][2]
    judge = resolve_reward(f"vlm_judge:url={server.url},model=a-model,answer=number,low=0,high=10,name=taste")
    assert reward_name(judge) == "taste"
    assert judge(PROMPTS, IMAGES) == [0.8, 0.75, 0.3, None, None, None]
    judge = VLMJudge(server.url, "a-model", answer="number", pattern=r"Score: (\d+)")
    assert judge(PROMPTS, IMAGES) == [8.0, None, None, None, None, None]
    assert "5 of 6 images" in warnings(caplog)[-1]


SCALES = (
    "8 / 10|8/ 10|8 out  of 10|8 out of\n10|8 of 10|8／10|８ ／ １０|8 ⁄ 10|8 on a 1-10 scale",
    "**8**/10|*8* / **10**|Score: 8 (out of 10)|8 from 10|8 on a scale of 10|1-10: 8|Rating (0–10): 8|8/10.|8 of 10.",
    "8 out of a possible 10|8 points out of 10|\\frac{8}{10}|8 (max. 10)|8, where 10 is best|8 (0 = worst, 10 = best)",
    '8,0/10,0|with 0 being worst and 10 being best: 8|between 0 and 10: 8|{"score": 8, "max": 10}|8 in [0, 10]',
    "8 on a scale from 0 (bad) to 10 (good)|8 on a 10-point scale|a score of 8|It is out of frame: 8|I'd go with 8",
    "8:10|8 per 10|8 (10 max)|8 out of a perfect 10|Criterion 1: 8",
    "8 out of about 10|8 out of around 10",
    "8 (min 0, max 10)|8 (0 worst, 10 best)|8 (1 being the worst and 10 the best)|8 (lowest 0, highest 10)",
    "7 / 10, no, 8 / 10|8, on a scale from 0 to 10|I would rate it 8. Scale: 0 to 10",
)


@pytest.mark.parametrize("text", "|".join(SCALES).split("|"))
def test_the_numbers_of_a_scale_are_no_score(text):
    assert read(text, answer="number", low=0, high=10) == 0.8


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("**Alignment Score (1-5 scale):** 2\nCoherence Score: **3.5**\n# style score（1–5）: 5/5", [0.25, 0.625, 1]),
        ("Alignment Score (1-5): 2\nStyle Score (1-5): 5", [None] * 3),
    ],
)
def test_unified_reward(server, text, scores):
    server.judge = lambda number, attempt: says(text)
    judge = resolve_reward(f"unified_reward:url={server.url}")
    assert reward_name(judge) == "unified_reward"
    names = ("alignment", "coherence", "style")
    assert judge(["a cat"], IMAGES[:1]) == {name: [score] for name, score in zip(names, scores, strict=True)}
    assert server.requests[0][2]["model"].startswith("CodeGoat24/UnifiedReward")
    assert asked(server)[0] == UNIFIED_REWARD_PROMPT.replace("{prompt}", "a cat")
    for options in ({"version": "1.0"}, {"template": "{prompt}"}):
        with pytest.raises(ValueError, match="use vlm_judge"):
            UnifiedReward(server.url, **options)


# Servers that are busy, away, or broken


def test_it_is_asked_again_when_it_is_busy(server):
    busy = (200, {"error": {"code": 429, "message": "slow down"}}), (500, {})  # a gateway's, and the server's own
    server.judge = lambda number, attempt: says("yes") if attempt > 2 else busy[attempt - 1]
    assert VLMJudge(server.url, "a-model")(PROMPTS, IMAGES) == [1.0] * 6
    assert sorted(server.numbers) == sorted([*range(6)] * 3)


def test_a_server_that_fails_at_one_image_or_for_ever(server, caplog):
    server.judge = lambda number, attempt: (520, {"error": "26x28"}) if number == 3 else says("yes")
    judge = VLMJudge(server.url, "a-model", retries=1)
    scores = judge(PROMPTS, IMAGES)
    assert scores == [None if number == 3 else 1.0 for number in range(6)]
    assert server.numbers.count(3) == 2 and "26x28" in warnings(caplog)[-1]
    server.judge = lambda number, attempt: (500, {"error": {"message": "out of memory"}})
    with pytest.raises(RewardUnavailableError, match=r"completions did not answer in 2 attempts.*500: out of memory"):
        judge(PROMPTS, IMAGES)


def test_an_answer_that_is_none(server):
    server.judge = lambda number, attempt: (200, [])
    with pytest.raises(ValueError, match=f"{server.url}.* answered something else than expected"):
        VLMJudge(server.url, "a-model")(["a"], IMAGES[:1])
    assert len(server.requests) == 1


@pytest.mark.parametrize("choices", [[{"message": None}], [], None, [{"message": {"content": "I cannot."}}]])
def test_answers_without_a_score_end_the_training_when_there_are_no_others(server, choices):
    server.judge = lambda number, attempt: (200, {"choices": choices}) if number == 2 else says("yes 1")
    judge = VLMJudge(server.url, "a-model")
    for _ in range(4):
        assert judge(["a"], [IMAGES[2]]) == [None]
    assert judge(["a"] * 2, IMAGES[2:4]) == [None, 1.0]
    for _ in range(4):
        judge(["a"], [IMAGES[2]])
    with pytest.raises(ValueError, match="in 5 calls in a row"):
        judge(["a"], [IMAGES[2]])


def test_images_that_are_refused(server, caplog):
    answers = {
        0: {"message": {"content": [{"type": "text", "text": "Yes"}]}},
        2: (400, {"error": {"message": "against our policy"}}),
        3: {"message": {"content": None, "refusal": "I will not"}},
    }
    server.judge = lambda number, attempt: answers.get(number) or says("yes", {"yes": 0.5, "no": 0.5})
    assert VLMJudge(server.url, "a-model")(PROMPTS, IMAGES) == [1.0, 0.5, None, None, 0.5, 0.5]
    (warning,) = warnings(caplog)
    assert all(part in warning for part in ("2 of 6 images have no score: ", "against our policy", "I will not"))
    for status in (401, 404):  # no matter of an image, even if others are answered
        answers[2] = status, {"error": "no such model"}
        with pytest.raises(ValueError, match=f"answered {status}: .*no such model"):
            VLMJudge(server.url, "a-model")(PROMPTS, IMAGES)
