"""The judge's client against a stub server: scores, retries, refusals, and a key that stays in."""

import pytest

from glimpseprune.judge import Judge, JudgeConfig, JudgeError
from tests.judge_server import judge_server

QUICK = {"model": "stub", "backoff": 0.0, "timeout": 0.2}


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("1", 1.0),
        ("0", 0.0),
        ("0.5", 0.5),
        (".25", 0.25),
        ("Score: 0.8.", 0.8),
        ("1.0", 1.0),
        ("10", None),
        ("7.5", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_score_is_the_number_in_the_reply(reply, score):
    with judge_server(lambda message: reply) as server:
        judge = Judge(JudgeConfig(server.url, **QUICK))
        assert judge.score("What?", "a", "b") == score


def test_each_question_gets_its_own_score():
    """Also with braces and other places' names in the texts."""

    def reply(message):
        return "1" if "Reference answer: {answer} 7" in message and "Answer: 7" in message else "0"

    with judge_server(reply) as server:
        judge = Judge(JudgeConfig(server.url, **QUICK))
        questions = [f"{{reference}} {number}?" for number in range(12)]
        references = [f"{{answer}} {number}" for number in range(12)]
        scores = judge.scores(questions, references, list(map(str, range(12))))
    assert scores == [float(number == 7) for number in range(12)]
    path, _, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert body["model"] == "stub" and body["temperature"] == 0


@pytest.mark.parametrize("plan", [[503, 429], [500, 0.4], [0.4, 0.4]])
def test_busy_and_silent_endpoints_are_asked_again(plan):
    with judge_server(lambda message: "1", plan) as server:
        judge = Judge(JudgeConfig(server.url, retries=2, **QUICK))
        assert judge.score("What?", ["a", "b"], "a") == 1.0
        assert len(server.requests) == 3


def test_an_endpoint_that_stays_down_is_an_error_without_the_key(monkeypatch):
    monkeypatch.setenv("STUB_KEY", "sesame-7")
    with judge_server(lambda message: "1", [503] * 9) as server:
        judge = Judge(JudgeConfig(server.url, api_key_env="STUB_KEY", retries=2, **QUICK))
        with pytest.raises(JudgeError, match="replied 503: .*Bearer [*]{3}") as caught:
            judge.scores(["What?"], ["a"], ["b"])
        assert len(server.requests) == 3
        assert server.requests[0][1]["Authorization"] == "Bearer sesame-7"
    assert "sesame-7" not in str(caught.value) and caught.value.__cause__ is None
    with pytest.raises(JudgeError, match="gave no reply in 3 attempts"):  # nobody listens any more
        judge.score("What?", "a", "b")


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_not_asked_again(status):
    with judge_server(lambda message: "1", [status]) as server:
        with pytest.raises(JudgeError, match=f"replied {status}"):
            Judge(JudgeConfig(server.url, **QUICK)).score("What?", "a", "b")
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": "example.org"}, "url must begin with http"),
        ({"model": ""}, "model is missing"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"retries": -1}, "retries must not be negative"),
        ({"prompt": "{question} {answer}"}, "lacks {reference}"),
    ],
)
def test_settings_that_cannot_be_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        JudgeConfig(**{"url": "http://127.0.0.1:1/v1", "model": "stub"} | fields)


def test_a_key_that_is_not_there_is_named(monkeypatch):
    monkeypatch.delenv("STUB_KEY", raising=False)
    with pytest.raises(ValueError, match="STUB_KEY is not set"):
        Judge(JudgeConfig("http://127.0.0.1:1/v1", "stub", api_key_env="STUB_KEY"))
