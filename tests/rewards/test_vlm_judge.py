"""A judge behind a server that speaks OpenAI's chat completions: a real one, of the standard library."""

import base64
import io
import json
import logging
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from slas_trl.rewards import UnifiedReward, VLMJudge, vlm_judge
from slas_trl.rewards.base import RewardUnavailableError
from slas_trl.rewards.by_name import resolve_reward, reward_name
from slas_trl.rewards.vlm_judge import KEY_VARIABLE, UNIFIED_REWARD_PROMPTS, _NoScoreError
from tests.rewards.served_rewards import number_of, picture


IMAGES = [picture(number) for number in range(6)]
PROMPTS = ["a cat"] * 6


class Completions(BaseHTTPRequestHandler):
    """Answers with what `judge(number of the picture, attempt)` returns: a status and a body, or a choice."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.running += 1
            server.most = max(server.most, server.running)
        image, text = body["messages"][0]["content"]
        head, _, data = image["image_url"]["url"].partition(",")
        assert head == "data:image/png;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        with server.lock:
            server.requests.append((self.path, self.headers, body, picture))
            number = number_of(picture)
            server.attempts[number] = server.attempts.get(number, 0) + 1
        answer = server.judge(number, server.attempts[number])
        status, content, headers = answer if isinstance(answer, tuple) else (200, {"choices": [answer]}, {})
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        with server.lock:
            server.running -= 1
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that has gone away is what some tests are about."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("slas_trl.rewards.http_client._FIRST_WAIT", 0.02)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    server = Server(("127.0.0.1", 0), Completions)
    server.lock, server.running, server.most, server.requests, server.attempts = threading.Lock(), 0, 0, [], {}
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def says(text, *tokens):
    """A choice, with the likeliest tokens in the place of each token, and their probabilities."""
    content = [
        {
            "token": max(place, key=place.get),
            "top_logprobs": [{"token": token, "logprob": math.log(p)} for token, p in place.items()],
        }
        for place in tokens
    ]
    return {"message": {"content": text}, "logprobs": {"content": content} if tokens else None}


def warnings(caplog):
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


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
    server.judge = lambda number, attempt: choices[number]
    scores = VLMJudge(server.url, "a-model")(PROMPTS, IMAGES)
    assert scores == pytest.approx([0.75, 0.75, 0.1, 1.0, None, None])
    assert len(server.requests) == 6
    (warning,) = warnings(caplog)
    assert "2 of 6 images have no score" in warning and "'Sure'" in warning


def test_what_is_asked(server):
    server.judge = lambda number, attempt: says("yes", {"yes": 1.0})
    images = [Image.effect_noise((300, 200), 50), picture(7, (20, 10)).convert("RGBA")]
    judge = VLMJudge(server.url + "/v1/", "a-model", template="{x} {prompt}?", max_image_side=150, concurrency=1)
    judge(["a {prompt}", "b"], images)
    (path, headers, body, first), (_, _, other, second) = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] is None
    assert (body["model"], body["temperature"], body["logprobs"], body["top_logprobs"]) == ("a-model", 0, True, 20)
    assert body["messages"][0]["content"][1]["text"] == "{x} a {prompt}?"
    assert other["messages"][0]["content"][1]["text"] == "{x} b?"
    assert first.size == (150, 100) and second.size == (32, 32) and second.mode == "RGB"
    assert images[0].size == (300, 200)


@pytest.mark.parametrize(
    ("size", "sent"), [((40, 2048), (32, 1024)), ((5000, 1), (1024, 32)), ((26, 28), (32, 32)), ((33, 40), (33, 40))]
)
def test_no_side_is_too_small_for_a_server(server, size, sent):
    server.judge = lambda number, attempt: says("yes", {"yes": 1.0})
    assert VLMJudge(server.url, "a-model")(["a"], [Image.new("I;16", size, 65535)]) == [1.0]
    assert server.requests[0][3].size == sent and server.requests[0][3].getextrema() != ((0, 0),) * 3


def read(content, logprobs=None, finish_reason="stop", **options):
    """What a judge makes of an answer, without a server."""
    judge = VLMJudge("http://127.0.0.1:1", "another-model", **options)
    choice = {"message": {"content": content}, "logprobs": logprobs, "finish_reason": finish_reason}
    try:
        return judge._read({"choices": [choice]})
    except _NoScoreError:
        return None


@pytest.mark.parametrize(
    ("text", "score"),
    [
        *(
            (text, 1.0)
            for text in ('{"answer": "yes"}', "Answer: yes", r"\boxed{yes}", "The answer is yes.", "**Yes**")
        ),
        *((text, 1.0) for text in ("<answer>yes</answer>", "Yes or no? Yes.", "It is all there. So, yes.", "- Yes")),
        *((text, 0.0) for text in ("Final answer: **No**", '{"verdict": "no", "reason": "blue"}', "No cat is there.")),
        *(
            (text, None)
            for text in ("I cannot answer yes or no.", "There is no way to tell", "yesterday", "", "yes/no?")
        ),
        *((text, None) for text in ("Yes and no", "Is the answer yes? No.", "No doubt, yes", "Not a yes", "not yes")),
        *((text, 1.0) for text in ("There is no doubt: yes", "Yes, and there is no cat.", "Answer yes or no: yes")),
        ("<think>\n\n</think>\n\nyes", 1.0),
        ("<think>Is it a dog? No. Answer: no</think> Yes", 1.0),
        ("<think>Is it a dog? The answer is yes", None),
        (
            [{"type": "thinking", "thinking": "No."}, {"type": "text", "text": "Ye"}, {"type": "text", "text": "s"}],
            1.0,
        ),
        ([{"type": "image"}], None),
    ],
)
def test_how_yes_and_no_are_said(text, score):
    assert read(text) == score


def test_yes_and_no_by_a_pattern():
    assert read("No doubt. Verdict: YES", pattern=r"Verdict: (\w+)") == 1.0
    assert read("Yes", says("Yes", {"Yes": 1.0})["logprobs"], pattern=r"Verdict: (\w+)") is None
    assert read("Verdict: maybe", pattern=r"Verdict: (\w+)") is None


YES = {"Yes": 0.6, "no": 0.2}


@pytest.mark.parametrize(
    ("text", "tokens", "score"),
    [
        ("Yes", [{"<think>": 1.0}, {"no": 1.0}, {"</think>": 1.0}, {"\n\n": 1.0}, YES], 0.75),  # a reasoning parser
        ("<think>no</think>Yes", [{"<think>": 1.0}, {"no": 1.0}, {"</think>": 1.0}, YES], 0.75),
        ("Yes", [{"<think>": 1.0}, {"It": 1.0}], 1.0),
        (
            '{"answer": "yes"}',
            [{'{"': 1.0}, {"answer": 1.0}, {'": "': 1.0}, {"yes": 0.6, "no": 0.2}, {'"}': 1.0}],
            0.75,
        ),
        ("Nothing is odd. Answer: yes", [{"No": 1.0}, {"thing is odd.": 1.0}, {" Answer:": 1.0}, {" yes": 1.0}], 1.0),
        ("", [{"<think>": 1.0}, {"yes": 1.0}], None),
    ],
)
def test_the_token_that_says_it(text, tokens, score):
    assert read(text, says("", *tokens)["logprobs"]) == (score and pytest.approx(score))


@pytest.mark.parametrize(
    ("text", "options", "score"),
    [
        ("The picture shows 3 cats on 2 chairs. Looking", {"answer": "number"}, None),
        ("Score: 1", {"answer": "number"}, None),
        ("Yes, it sho", {}, 1.0),
        ("There is a cat with no", {}, None),
    ],
)
@pytest.mark.parametrize("reason", ["length", "content_filter", "model_length", "MAX_TOKENS"])
def test_an_answer_that_is_cut_off(text, options, score, reason):
    assert read(text, finish_reason=reason, **options) == score


def test_without_log_probabilities(server, caplog):
    words = ["Yes, it does.", "NO", "**yes**", "I cannot say", "", "yesterday"]
    server.judge = lambda number, attempt: says(words[number])
    for _ in range(2):
        assert VLMJudge(server.url, "a-model")(PROMPTS, IMAGES) == [1.0, 0.0, 1.0, None, None, None]
    once, *others = warnings(caplog)
    assert "gives no log-probabilities" in once
    assert len(others) == 2 and all("3 of 6 images" in other for other in others)


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
    "8 (min 0, max 10)|8 (0 worst, 10 best)|8 (1 being the worst and 10 the best)|8 (lowest 0, highest 10)",
    "7 / 10, no, 8 / 10|8, on a scale from 0 to 10|I would rate it 8. Scale: 0 to 10",
)


@pytest.mark.parametrize("text", "|".join(SCALES).split("|"))
def test_the_numbers_of_a_scale_are_no_score(text):
    assert read(text, answer="number", low=0, high=10) == 0.8


@pytest.mark.parametrize(
    ("text", "high", "score"), [("85 / 100", 100, 0.85), ("0.8 / 1.0", 1, 0.8), ("10 / 10", 10, 1)]
)
def test_scales_of_every_size(text, high, score):
    assert read(text, answer="number", low=0, high=high) == score


@pytest.mark.parametrize(
    ("version", "text", "expected"),
    [
        ("1.0", "cat (animal): 1\nsize (2): 0\nFinal Score: 3.5", [0.625]),
        ("1.0", "cat (animal): 1", [None]),
        ("1.0", "Final Score: **3**", [0.5]),
        ("1.0", "**final score：** 3 / 5", [0.5]),
        (
            "2.0",
            "**Alignment Score (1-5 scale):** 2\nCoherence Score: **3.5**\n### style score（1–5）: 5/5",
            {"alignment": [0.25], "coherence": [0.625], "style": [1.0]},
        ),
        (
            "2.0",
            "Alignment Score (1-5): 2\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 5",
            {"alignment": [0.25], "coherence": [0.625], "style": [1.0]},
        ),
        (
            "2.0",
            "Alignment Score (1-5): 2\nStyle Score (1-5): 5",
            {"alignment": [None], "coherence": [None], "style": [None]},
        ),
    ],
)
def test_unified_reward(server, version, text, expected):
    server.judge = lambda number, attempt: says(text)
    judge = resolve_reward(f"unified_reward:url={server.url},version={version}")
    assert reward_name(judge) == "unified_reward"
    assert judge(["a cat"], IMAGES[:1]) == expected
    body = server.requests[0][2]
    assert body["model"].startswith("CodeGoat24/UnifiedReward")
    asked = body["messages"][0]["content"][1]["text"]
    assert asked == UNIFIED_REWARD_PROMPTS[version].replace("{prompt}", "a cat")
    assert asked.endswith("Text Caption: [a cat]")


def test_servers_that_want_another_body(server, tmp_path):
    """Such as those that take neither max_tokens nor a temperature."""
    server.judge = lambda number, attempt: says("yes")
    extra = {"max_completion_tokens": 32, "max_tokens": None, "temperature": None, "seed": 1}
    (file := tmp_path / "extra.json").write_text(json.dumps(extra))
    for judge in (
        VLMJudge(server.url, "a-model", extra_body=extra),
        VLMJudge(server.url, "a-model", extra_body=json.dumps(extra)),
        resolve_reward(f"vlm_judge:url={server.url},model=a-model,extra_body={file}"),
    ):
        assert judge(["a"], IMAGES[:1]) == [1.0]
        sent = server.requests[-1][2]
        assert sent.keys() == {"model", "messages", "logprobs", "top_logprobs", "max_completion_tokens", "seed"}
        assert (sent["max_completion_tokens"], sent["seed"]) == (32, 1)


# Servers that are busy, away, or broken


def test_it_is_asked_again_when_it_is_busy(server):
    def judge(number, attempt):
        if attempt <= 2:
            return 429 if attempt == 1 else 500, {"error": {"message": "slow down"}}, {"Retry-After": "0"}
        return says("yes", {"yes": 0.5, "no": 0.5})

    server.judge = judge
    assert VLMJudge(server.url, "a-model")(PROMPTS, IMAGES) == [0.5] * 6
    assert set(server.attempts.values()) == {3}


def test_a_server_that_fails_for_ever(server):
    server.judge = lambda number, attempt: (500, {"error": {"message": "out of memory"}}, {})
    with pytest.raises(RewardUnavailableError, match=r"completions did not answer in 3 attempts.*500: out of memory"):
        VLMJudge(server.url, "a-model", retries=2, concurrency=2)(PROMPTS, IMAGES)
    assert len(server.requests) < 18  # the others did not wait as long


def test_a_server_that_does_not_answer(server):
    server.judge = lambda number, attempt: time.sleep(0.5) or says("yes")
    with pytest.raises(RewardUnavailableError, match=r"2 attempts; the last one: no answer in 0.1 s"):
        VLMJudge(server.url, "a-model", timeout=0.1, retries=1)(["a"], IMAGES[:1])


@pytest.mark.parametrize("code", [429, "503", 524, None, "overloaded"])
def test_an_error_behind_a_status_of_200(server, code):
    """As gateways send it once they have begun to answer."""
    error = {"error": {"message": "slow down", "code": code} if code != "overloaded" else code, "choices": None}
    server.judge = lambda number, attempt: (200, error, {}) if attempt == 1 else says("yes")
    assert VLMJudge(server.url, "a-model")(PROMPTS, IMAGES) == [1.0] * 6
    assert set(server.attempts.values()) == {2}


def test_an_error_behind_a_status_of_200_is_of_its_kind(server):
    server.judge = lambda number, attempt: (200, {"error": {"code": 400 if number else 401, "message": "no"}}, {})
    assert VLMJudge(server.url, "a-model")(["a"], [IMAGES[1]]) == [None]
    with pytest.raises(ValueError, match="answered 401: no"):
        VLMJudge(server.url, "a-model")(["a"], [IMAGES[0]])


@pytest.mark.parametrize("status", [500, 520])
@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("bad", [0, 3])
def test_a_server_that_fails_at_one_image(server, caplog, status, concurrency, bad):
    server.judge = lambda number, attempt: (status, {"error": "26x28"}, {}) if number == bad else says("yes")
    scores = VLMJudge(server.url, "a-model", retries=1, concurrency=concurrency)(PROMPTS, IMAGES)
    assert scores == [None if number == bad else 1.0 for number in range(6)]
    assert server.attempts[bad] == 2 and f"{status}: 26x28" in warnings(caplog)[-1]


@pytest.mark.parametrize("body", [b"{", b"<html>", [], b"[" * 50_000])
def test_answers_that_are_none(server, body):
    server.judge = lambda number, attempt: (200, body, {})
    with pytest.raises(ValueError, match="answered something else than expected"):
        VLMJudge(server.url, "a-model")(["a"], IMAGES[:1])


NONE = {"token": "Yes", "logprob": None}


@pytest.mark.parametrize(
    "logprobs",
    [
        *({"content": content} for content in ([{"token": 1}], ["yes"], {"a": 1}, [], None, [{}], [NONE])),
        *(
            {"content": [{**NONE, "top_logprobs": [{"token": "Yes", "logprob": value}]}]}
            for value in (None, "x", -math.inf)
        ),
        {"content": [{**NONE, "top_logprobs": [{"token": "Yes", "logprob": math.nan}]}]},
        {"content": [{"token": "Yes", "logprob": -0.1}]},
        {"content": [{**NONE, "top_logprobs": [{"token": "Yes", "logprob": -9.0}, {"token": "No", "logprob": None}]}]},
        [],
        "x",
    ],
)
def test_log_probabilities_that_say_nothing(server, logprobs):
    """The word itself is there. JSON has no NaN and infinities, but servers send them."""
    body = {"choices": [{"message": {"content": "Yes"}, "logprobs": logprobs}], "usage": {"x": math.nan}}
    server.judge = lambda number, attempt: (200, body, {})
    assert VLMJudge(server.url, "a-model")(["a"], IMAGES[:1]) == [1.0]


def test_a_candidate_without_log_probability_has_none(server):
    top = [
        {"token": "Yes", "logprob": math.log(0.5)},
        {"token": "No", "logprob": None},
        {"token": "no", "logprob": -math.inf},
    ]
    logprobs = {"content": [{"token": "Yes", "logprob": 0.0, "top_logprobs": top}]}
    server.judge = lambda number, attempt: {"message": {"content": "Yes"}, "logprobs": logprobs}
    assert VLMJudge(server.url, "a-model")(["a"], IMAGES[:1]) == [1.0]


NOTHING = [
    {"choices": [{"finish_reason": "content_filter", "index": 0}]},
    {"choices": [{"message": None}]},
    {"choices": []},
    {"choices": None},
    {"choices": [{}]},
    {"choices": [{"message": {"content": "I am sorry, I cannot help."}}]},
]


@pytest.mark.parametrize("body", NOTHING)
@pytest.mark.parametrize("answer", ["yes_no", "number"])
def test_answers_without_a_score_end_the_training_when_there_are_no_others(server, body, answer):
    server.judge = lambda number, attempt: (200, body, {}) if number == 2 else says("yes 1")
    judge = VLMJudge(server.url, "a-model", answer=answer)
    for _ in range(4):
        assert judge(["a"], [IMAGES[2]]) == [None]
    assert judge(["a"] * 2, IMAGES[2:4]) == [None, 1.0]
    for _ in range(4):
        judge(["a"], [IMAGES[2]])
    with pytest.raises(ValueError, match="in 5 calls in a row"):
        judge(["a"], [IMAGES[2]])


def test_images_that_are_refused(server, caplog):
    def judge(number, attempt):
        if number == 2:
            return 400, {"error": {"message": "against our policy"}}, {}
        if number == 3:
            return {"message": {"content": None, "refusal": "I will not"}}
        return says("yes", {"yes": 0.5, "no": 0.5})

    server.judge = judge
    assert VLMJudge(server.url, "a-model")(PROMPTS, IMAGES) == [0.5, 0.5, None, None, 0.5, 0.5]
    (warning,) = warnings(caplog)
    assert all(part in warning for part in ("2 of 6 images have no score: ", "against our policy", "I will not"))


@pytest.mark.parametrize("status", [400, 422])
def test_an_image_that_is_refused_alone(server, status):
    server.judge = lambda number, attempt: (
        (status, {"error": {"message": "against our policy"}}, {}) if number == 2 else says("yes")
    )
    judge = VLMJudge(server.url, "a-model")
    for _ in range(2):
        for _ in range(4):
            assert judge(["a"], [IMAGES[2]]) == [None]
        assert judge(["a"], [IMAGES[3]]) == [1.0]
    for _ in range(4):
        judge(["a"] * 2, [IMAGES[2]] * 2)
    with pytest.raises(ValueError, match=f"in 5 calls in a row.*answered {status}: against our policy"):
        judge(["a"], [IMAGES[2]])


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_is_no_matter_of_an_image(server, status):
    """Not even if others are answered."""
    server.judge = lambda number, attempt: (status, {"error": "no such model"}, {}) if number == 2 else says("yes")
    with pytest.raises(ValueError, match=f"answered {status}: no such model"):
        VLMJudge(server.url, "a-model")(PROMPTS, IMAGES)


def test_so_many_requests_at_a_time(server):
    server.judge = lambda number, attempt: time.sleep(0.03) or says("yes", {"yes": 1.0})
    judge = VLMJudge(server.url, "a-model", concurrency=3)
    threads = [threading.Thread(target=judge, args=(PROMPTS, IMAGES)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.requests) == 18 and server.most == 3


# Keys


def test_keys(server, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    server.judge = lambda number, attempt: (401, {"error": {"message": "wrong key: s3cret"}}, {})
    judge = VLMJudge(server.url, "a-model", api_key="s3cret")
    with pytest.raises(ValueError, match=r"answered 401: wrong key: \*\*\*") as error:
        judge(["a"], IMAGES[:1])
    assert server.requests[-1][1]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(judge) + str(error.value) + caplog.text
    monkeypatch.setenv("MY_KEY", "from-the-environment")
    monkeypatch.setenv("OPENAI_API_KEY", "not-meant-for-it")
    for options, sent in (({"api_key_env": "MY_KEY"}, "Bearer from-the-environment"), ({}, None)):
        with pytest.raises(ValueError, match="401"):
            VLMJudge(server.url, "a-model", **options)(["a"], IMAGES[:1])
        assert server.requests[-1][1]["Authorization"] == sent


# Without a server


def test_a_template_of_a_file(server, tmp_path):
    server.judge = lambda number, attempt: says("yes", {"yes": 1.0})
    (file := tmp_path / "question.txt").write_text("Is it, well, {prompt}?")
    judge = resolve_reward(f"vlm_judge:url={server.url},model=a-model,template={file}")
    assert judge(["green"], IMAGES[:1]) == [1.0]
    assert server.requests[0][2]["messages"][0]["content"][1]["text"] == "Is it, well, green?"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": "maybe"}, "yes_no or number"),
        ({"template": "is it good?"}, "no {prompt} in it"),
        ({"low": 1}, "both or none"),
        ({"low": 5, "high": 1}, "low of vlm_judge must be below high"),
        ({"pattern": "("}, "no regular expression"),
        ({"concurrency": 0}, "concurrency of vlm_judge"),
        ({"max_image_side": 0}, "max_image_side of vlm_judge"),
        ({"timeout": -1}, "timeout of vlm_judge"),
        ({"api_key": "two words"}, "visible ASCII"),
        ({"url": "http://me:s3cret@host"}, "token as its own option"),
        ({"extra_body": '{"seed": 1'}, "extra_body of vlm_judge is no JSON"),
        ({"extra_body": {"seed": object()}}, "extra_body of vlm_judge is no JSON"),
        ({"extra_body": "[1]"}, "must be an object"),
        ({"extra_body": {"messages": []}}, "without messages"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message) as error:
        vlm_judge(**{"url": "http://127.0.0.1:1", "model": "a-model", **options})
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"), [({"version": "3"}, "1.0 or 2.0"), ({"template": "{prompt}"}, "vlm_")]
)
def test_unified_reward_is_asked_what_it_knows(options, message):
    with pytest.raises(ValueError, match=message):
        UnifiedReward("http://127.0.0.1:1", **options)
