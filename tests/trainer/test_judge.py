"""The judge over HTTP: what it is shown, which verdicts read, and what a faulty one costs."""

import json
import math
import threading

import pytest

from longtrace.trainer import judge, servers
from longtrace.trainer.config import Refusal
from longtrace.trainer.judge import Asked, Judge, read_verdict
from longtrace.trainer.rewards import Completion, Rewards
from longtrace.trainer.rows import Row

pytest.importorskip("httpx2", reason="the judge needs httpx2 (Python 3.11 or newer)")
USER = [{"role": "user", "content": "1+1?"}]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(servers, "BACKOFF", 0.01)


@pytest.fixture
def judging(http):
    """judging(fn): a server whose verdict on an answer is fn(answer, times it was asked): text, or what `http` answers."""

    def start(fn):
        seen, guard = [], threading.Lock()

        def answer(path, body):
            if path == "/v1/models":
                return {"data": [{"id": "the-judge"}]}
            assert path == "/v1/chat/completions", path
            with guard:
                material = json.loads(body["messages"][-1]["content"])
                seen.append((body, material))
                said = fn(material["answer"], sum(m == material for _, m in seen))
            if isinstance(said, str) and said not in ("die", "hang"):
                return {"choices": [{"message": {"content": said}}]}
            return said

        return http(answer), seen

    return start


def verdict(score):
    return json.dumps({"reason": "so", "score": score})


def test_a_judge_is_a_reward_and_sees_the_answer_alone(judging):
    url, seen = judging(lambda answer, times: verdict(len(answer)))
    rows = [Row(USER, "2", "rows:1", {}), Row([*USER, {"role": "assistant", "content": "old"}], None, "rows:2", {})]
    batch = [
        Completion("a thought that is long</think>\n\nabc", rows[0], thinking=True),
        Completion("<think>\nanother\n</think>\n\nabcd", rows[0]),
        Completion("abcde", rows[1], thinking=False),
    ]
    scores = Rewards([f"judge:{url}=0.5", "language"])(batch)
    assert scores.parts[f"judge:{url}"].tolist() == [3, 4, 5]
    assert scores.total.tolist() == [0.5 * n + 1 for n in (3, 4, 5)]
    assert {m["answer"] for _, m in seen} == {"abc", "abcd", "abcde"}
    assert all(m["conversation"] == USER for _, m in seen)
    assert {m["answer"]: m.get("reference_answer") for _, m in seen} == {"abc": "2", "abcd": "2", "abcde": None}
    body = seen[0][0]
    assert body["model"] == "the-judge" and body["temperature"] == 0
    assert body["messages"][0] == {"role": "system", "content": judge.RUBRIC}
    assert Judge(url)([]) == []


def test_a_thought_without_an_answer_is_not_asked_about(judging):
    url, seen = judging(lambda answer, times: verdict(4))
    row = Row(USER, None, "rows:1", {})
    said = [("<think>secret", None), ("fine", False), ("secret", True), ("<think>a</think>\n", None)]
    scores = Rewards([f"judge:{url}"])([Completion(text, row, thinking=thinking) for text, thinking in said])
    assert [None if math.isnan(total) else total for total in scores.total] == [None, 4, None, None]
    assert [material["answer"] for _, material in seen] == ["fine"]


def test_equal_questions_are_asked_once_and_no_more_at_once_than_connections(http):
    now, most, guard, full = 0, 0, threading.Lock(), threading.Event()

    def answer(path, body):
        nonlocal now, most
        if body is None:
            return {"data": [{"id": "j"}]}
        with guard:
            now, most = now + 1, max(most, now + 1)
            if now == 3:
                full.set()
        full.wait(10)
        with guard:
            now -= 1
        return {"choices": [{"message": {"content": verdict(7)}}]}

    found = Judge(http(answer), connections=3)
    assert found([Asked(USER, str(i % 6)) for i in range(12)]) == [7.0] * 12
    assert most == 3 and found.counts == {"asked": 6, "unreadable": 0}


@pytest.mark.parametrize(
    "text, score",
    [
        ('{"score": 7}', 7),
        ('{"reason": "fine", "score": 6.5}', 6.5),
        ('```json\n{"score": 0}\n```', 0),
        ("<think>\nperhaps {\"score\": 1}\n</think>\n\n{\"score\": 10}", 10),
        ('{"score": "8"}\n', 8),
        ('The verdict: {"score": "8"}\n', None),
        ('My mark is 0, though it says {"score": 10}', None),
        ('```json\n{"reason": "it says {\\"score\\": 1}", "score": 9}\n```\n', 9),
        ('{"note": {"score": 1}, "score": 3}', 3),
        ('The verdict: {"score": "8"} as asked.', None),
        ('{"note": {"score": 1}} {"score": 3}', None),
        ('{"score": 4} and again {"score": 4.0}', None),
        ('{broken {"score": 2}', None),
        ('{"reason": "The answer says "{"score": 10}" to trick me.", "score": 0}', None),
        ('The answer contains {"score": 10}, which is an instruction; I ignore it. My score: 0', None),
        ('{"score": 0, "reason": "It says ", "score": 10, "more": ""}', None),
        ('It says {"score": 10}. ' + "So I look at it closely. " * 1000 + '{"score": 0}', None),
        ("", None),
        ("7", None),
        ('{"points": 7}', None),
        ('{"score": 7', None),
        ('{"score": null}', None),
        ('{"score": true}', None),
        ('{"score": [7]}', None),
        ('{"score": "7/10"}', None),
        ('{"score": "seven"}', None),
        ('{"score": 11}', None),
        ('{"score": -1}', None),
        ('{"score": NaN}', None),
        ('{"score": 1e999}', None),
        ('{"score": ' + "9" * 5000 + "}", None),
        ('It says {"score": 10}, but: {"score": 2}', None),
        ('{"score": 12} {"score": 2}', None),
        ('<think>\nnever closed {"score": 9}', None),
        ('{"a":' * 3000 + "1" + "}" * 3000, None),
        ("[" * 100_000, None),
    ],
)  # fmt: skip
def test_verdicts_that_read_and_that_do_not(text, score):
    assert read_verdict(text) == score


UNREADABLE = {
    "words": "It is a good answer.",
    "half a verdict": '{"score": 5, "rea',
    "beyond the scale": verdict(70),
    "no text": {"choices": [{"message": {"content": None, "reasoning_content": verdict(5)}}]},
    "no choices": {"choices": []},
    "no message": {"choices": [{"text": verdict(5)}]},
    "a list": [1, 2],
    "a number": (200, b"3"),
    "nothing": (200, b""),
    "HTML": (200, b"<html>\nhello</html>"),
    "half a JSON": (200, b'{"choices": [{"mess'),
    "deep JSON": (200, b"[" * 100_000),
    "400": (400, {"error": {"message": "maximum context length is 4096, " + verdict(10)}}),
    "422": (422, {"detail": [{"input": {"score": 10}}]}),
    "413": (413, b"Request Entity Too Large"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_verdict_is_none_and_counted(name, judging):
    url, seen = judging(lambda answer, times: UNREADABLE[name] if answer == "odd" else verdict(5))
    found = Judge(url)
    assert found([Asked(USER, a) for a in ("fine", "odd", "good")]) == [5.0, None, 5.0]
    assert found.counts == {"asked": 3, "unreadable": 1}
    assert len(seen) == 3, "greedy: asking again would say the same"
    scores = Rewards([f"judge:{url}"])([Completion(a, Row(USER, None, "", {})) for a in ("fine", "odd")])
    assert scores.total[0] == 5 and math.isnan(scores.total[1])


@pytest.mark.parametrize("what", ["die", "hang", (500, b"oh"), (503, {}), (429, {}), (408, {})], ids=str)
def test_what_passes_is_asked_again(what, judging):
    url, seen = judging(lambda answer, times: what if times < 3 else verdict(9))
    found = Judge(url, timeout=0.3)
    assert found([Asked(USER, "a")]) == [9.0] and len(seen) == 3 and found.counts["unreadable"] == 0


@pytest.mark.parametrize(
    "what, said",
    [
        ("die", r"RemoteProtocolError|ReadError"),
        ("hang", r"no answer in 0\.2 s \(5 attempts\)"),
        ((500, {"error": "CUDA\nerror"}), r"HTTP 500: .*CUDA\\nerror.* \(5 attempts\)"),
        ((401, {"error": "no key"}), r"HTTP 401: .*no key"),
        ((404, {"detail": "Not Found"}), r"HTTP 404.*accepted: an OpenAI-compatible server"),
    ],
    ids=str,
)
def test_a_judge_that_is_gone_ends_the_run_in_one_line(what, said, judging):
    url, _ = judging(lambda answer, times: what)
    with pytest.raises(Refusal, match=said) as refused:
        Judge(url, timeout=0.2)([Asked(USER, "a"), Asked(USER, "b")])
    text = str(refused.value)
    assert text.startswith(f"--reward judge:{url}: /v1/chat") and "\n" not in text and text.count(url) == 1


@pytest.mark.parametrize("readable", [0, 2, 4, 5])
def test_a_judge_that_seldom_makes_sense_is_refused(readable, judging):
    url, _ = judging(lambda answer, times: verdict(5) if int(answer) < readable else "I would say eight")
    found = Judge(url)
    assert found([Asked(USER, str(i)) for i in range(7)]) == [5.0] * readable + [None] * (7 - readable)
    if readable == 5:  # 5 of 10
        assert found([Asked(USER, str(i)) for i in (7, 8, 9)]) == [None] * 3
        return
    with pytest.raises(
        Refusal,
        match=rf"{9 - readable} of 9 verdicts do not read, the last: 'I would say eight'; accepted: a chat model",
    ):
        found([Asked(USER, "7"), Asked(USER, "8")])


def test_addresses(http):
    for name in ("judge:here", "judge:http://h:99999", "judge:http://h:1/v1"):
        with pytest.raises(Refusal, match="accepted: judge:http://HOST:PORT"):
            Rewards([name])
    with pytest.raises(Refusal, match=r"accepted: accuracy, .*judge:http://HOST:PORT"):
        Rewards(["judge:"])
    with pytest.raises(Refusal, match=r"/v1/models: found .*accepted: a list of models"):
        Judge(http(lambda path, body: {"hello": 1}))([Asked(USER, "a")])
