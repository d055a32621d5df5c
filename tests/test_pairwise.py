"""A model as judge decides nothing by place, guesses nothing, and no host is asked but the one that was named."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import pytest
from pydantic import ValidationError
from scipy.stats import binomtest

from clm_app.errors import BadData, BadSettings, NotThere
from clm_app.judging.pairwise import HERE, Judged, JudgeSettings, Pair, compare, judge, verdict

SHORT = "Better: {rubric} | {prompt} | {expected} | first={first} | second={second}"


class Judge(ThreadingHTTPServer):
    """A small OpenAI-compatible endpoint that says what it is told to, and remembers what it was asked."""

    def __init__(self, says: Callable[[str], object]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.says, self.asked, self.headers, self.together, self.most_together = says, [], [], 0, 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def settings(self, **knobs) -> JudgeSettings:
        address = f"http://127.0.0.1:{self.server_port}/v1"
        return JudgeSettings(**{"base_url": address, "wait_s": 0, "template": SHORT, "at_once": 1} | knobs)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        ask = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        judge = self.server
        with judge.lock:
            judge.asked.append(ask | {"path": self.path})
            judge.headers.append(self.headers)
            judge.together += 1
            judge.most_together = max(judge.most_together, judge.together)
        said = judge.says(ask["messages"][0]["content"])
        with judge.lock:
            judge.together -= 1
        status, body = said if isinstance(said, tuple) else (200, {"choices": [{"message": {"content": said}}]})
        with suppress(ConnectionError):  # a client that did not want to wait has gone
            self._answer(status, body)

    def _answer(self, status: int, body: object) -> None:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if status in (301, 302, 307):
            self.send_header("Location", body["to"])
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_) -> None:
        """Say nothing."""


@pytest.fixture
def endpoint():
    """Return a function that starts a judge; all end with the test."""
    started = []

    def start(says: Callable[[str], object]) -> Judge:
        started.append(Judge(says))
        return started[-1]

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


def pairs(count: int = 1, new: str = "new", old: str = "old") -> list[Pair]:
    return [Pair(f"k{i}", f"question {i}", new, old) for i in range(count)]


def by_content(message: str) -> str:
    """A judge that knows what it wants: the reply "new"."""
    return "[[A]]" if "first=new" in message else "[[B]]"


def test_a_reply_that_is_better_in_both_orders_wins(endpoint):
    honest = endpoint(by_content)
    assert [one.says for one in judge(pairs(), honest.settings())] == ["win"]
    assert [one.says for one in judge(pairs(new="old", old="new"), honest.settings())] == ["loss"]
    assert len(honest.asked) == 4, "each pair is asked twice"


def test_a_judge_that_loves_one_place_decides_nothing(endpoint):
    for place in ("A", "B"):
        found = compare(list(judge(pairs(6), endpoint(lambda _, place=place: f"Surely [[{place}]]").settings())))
        assert (found.wins, found.ties, found.losses) == (0, 6, 0)
        assert found.position_bias == 1.0 and found.favoured == {"A": 0, "B": 0} | {place: 6}
        assert found.p == 1.0 and found.win_share is None and (found.low, found.high) == (0, 1)


@pytest.mark.parametrize("reply, read", [
    ("[[A]]", "A"), ("Both are fine.\n[[C]]", "C"), ("[[B]] ... so [[B]]", "B"), ("[[A]] or [[B]]?", None), ("A", None),
    ("The better one is B.", None), ("", None), ("[[D]]", None), ("[[a]]", None),
])  # fmt: skip
def test_a_verdict_is_read_strictly(reply, read):
    assert verdict(reply) == read


def test_a_verdict_that_cannot_be_read_is_counted_and_shown_and_never_guessed(endpoint):
    mumbling = endpoint(lambda message: "[[A]]" if "first=new" in message else "I like the second one.")
    (found,) = judge(pairs(), mumbling.settings())
    assert found.says == "unreadable" and found.old_first == "I like the second one."
    figures = compare([found])
    assert (figures.pairs, figures.unreadable) == (1, 1) and figures.wins == figures.ties == figures.losses == 0
    assert figures.position_bias is None


def test_a_judge_without_words_is_unreadable(endpoint):
    silent = endpoint(lambda _: (200, {"choices": [{"message": {"content": None}}]}))
    assert [one.says for one in judge(pairs(), silent.settings())] == ["unreadable"]


def test_replies_that_are_the_same_are_a_tie_that_nobody_is_asked_about(endpoint):
    honest = endpoint(by_content)
    assert [one.says for one in judge(pairs(new="one", old=" one\n"), honest.settings())] == ["tie"]
    assert honest.asked == []


def test_p_and_interval_are_those_of_the_sign_test():
    said = ["win"] * 9 + ["loss"] * 2 + ["tie"] * 5 + ["unreadable"]
    found = compare([Judged(item=str(i), says=one) for i, one in enumerate(said)])
    reference = binomtest(9, 11)
    assert found.p == pytest.approx(reference.pvalue) == pytest.approx(0.0654, abs=1e-4)
    assert (found.low, found.high) == pytest.approx(tuple(reference.proportion_ci(method="exact")))
    assert found.win_share == 9 / 11 and found.low < 0.5 < found.high
    assert (found.pairs, found.wins, found.ties, found.losses, found.unreadable) == (17, 9, 5, 2, 1)
    json.loads(found.model_dump_json())


def test_nothing_judged_is_no_comparison():
    with pytest.raises(BadData, match="No pair was judged. Give at least one item"):
        compare([])


# --- what the judge is asked, and who is asked ------------------------------------------------------------------------


def test_the_message_is_filled_in_once_so_a_reply_cannot_write_into_it(endpoint):
    honest = endpoint(lambda _: "[[C]]")
    sly = Pair("k", "{second}", "{rubric} {first}", "plain", expected="{prompt}")
    list(judge([sly], honest.settings(rubric="be kind")))
    assert honest.asked[0]["messages"][0]["content"] == (
        "Better: be kind | {second} | {prompt} | first={rubric} {first} | second=plain"
    )
    assert honest.asked[1]["messages"][0]["content"].endswith("first=plain | second={rubric} {first}")


def test_model_key_and_length_reach_the_endpoint(endpoint):
    honest = endpoint(by_content)
    list(judge(pairs(), honest.settings(model="big", key="s3cret", max_tokens=7)))
    ask, headers = honest.asked[0], honest.headers[0]
    assert (ask["model"], ask["max_tokens"], ask["temperature"]) == ("big", 7, 0)
    assert ask["path"] == "/v1/chat/completions" and headers["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(honest.settings(key="s3cret")) + honest.settings(key="s3cret").model_dump_json()
    list(judge(pairs(), honest.settings()))
    assert "Authorization" not in honest.headers[-1]


def test_the_message_that_comes_along_shows_all_that_a_judge_needs(endpoint):
    honest = endpoint(lambda _: "[[C]]")
    template = JudgeSettings(base_url="http://127.0.0.1:1/v1").template
    list(judge([Pair("k", "Why?", "because", "so", expected="reason")], honest.settings(template=template)))
    message = honest.asked[0]["messages"][0]["content"]
    assert all(part in message for part in ("Why?", "because", "so", "reason", "is correct", "[[A]]", "[[B]]", "[[C]]"))
    assert "{" not in message


def test_several_pairs_are_asked_at_once_and_come_back_in_order(endpoint):
    met = threading.Barrier(3)  # opens when three are asked together, and never for fewer
    honest = endpoint(lambda message: (met.wait(10), by_content(message))[1])
    found = list(judge(pairs(3), honest.settings(at_once=3)))
    assert [one.item for one in found] == ["k0", "k1", "k2"] and honest.most_together == 3


def test_what_was_judged_stays_and_the_rest_is_not_asked_once_the_reader_stops(endpoint):
    honest = endpoint(by_content)
    found = list(islice(judge(pairs(50), honest.settings()), 2))
    assert [one.says for one in found] == ["win", "win"] and len(honest.asked) < 50


def test_a_judge_that_stumbles_is_asked_again(endpoint):
    said = iter([(503, {}), (429, {})])
    honest = endpoint(lambda message: next(said, None) or by_content(message))
    assert [one.says for one in judge(pairs(), honest.settings(retries=2))] == ["win"]
    assert len(honest.asked) == 4


def test_a_judge_that_stays_silent_is_named_with_what_to_do(endpoint):
    broken = endpoint(lambda _: (500, {}))
    with pytest.raises(NotThere, match=r"http://127.* gave no verdict in 2 tries \(status 500\). Is it running"):
        list(judge(pairs(), broken.settings(retries=1)))
    assert len(broken.asked) == 2
    broken.shutdown()
    broken.server_close()
    with pytest.raises(NotThere, match="gave no verdict in 1 tries"):
        list(judge(pairs(), broken.settings(retries=0)))


def test_a_judge_that_is_too_slow_is_not_waited_for(endpoint):
    slow = threading.Event()
    sleepy = endpoint(lambda _: (slow.wait(5), "[[A]]")[1])
    with pytest.raises(NotThere, match="timed out"):
        list(judge(pairs(), sleepy.settings(timeout_s=0.05, retries=0)))
    slow.set()


@pytest.mark.parametrize("said, because", [
    ((401, {"error": "no such key"}), "refuses model 'live' with status 401.*no such key.*Correct its address, model or key"),
    ((200, {"hello": 1}), "does not answer in OpenAI's chat form.*Give the address up to /v1"),
    ((200, b"<html>"), "does not answer in OpenAI's chat form"),
])  # fmt: skip
def test_an_endpoint_that_is_no_judge_is_refused_at_once(endpoint, said, because):
    wrong = endpoint(lambda _: said)
    with pytest.raises(BadSettings, match=because):
        list(judge(pairs(), wrong.settings()))
    assert len(wrong.asked) == 1


def test_neither_a_redirect_nor_a_proxy_leads_to_another_host(endpoint, monkeypatch):
    other = endpoint(by_content)
    sly = endpoint(lambda _: (307, {"to": f"http://127.0.0.1:{other.server_port}/v1/chat/completions"}))
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{other.server_port}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{other.server_port}")
    with pytest.raises(BadSettings, match="status 307"):
        list(judge(pairs(), sly.settings()))
    assert len(sly.asked) == 1 and other.asked == []


@pytest.mark.parametrize("knobs, because", [
    ({}, "Field required"), ({"base_url": "judge.example"}, "begins with http:// or https://"),
    ({"base_url": "http://judge.example/v1", "key": "k"}, "can be read on the way; use https"),
    ({"base_url": "https://a/v1", "template": "{first}"}, "must see both replies.*write {second}"),
    ({"base_url": "https://a/v1", "template": "{first} {second} {first}"}, "each once; write {first}"),
    ({"base_url": "https://a/v1", "volume": 11}, "Extra inputs"),
])  # fmt: skip
def test_a_judge_that_cannot_be_asked_so_is_refused(knobs, because):
    with pytest.raises(ValidationError, match=because):
        JudgeSettings(**knobs)


def test_a_key_may_go_over_https_or_stay_on_this_machine():
    assert JudgeSettings(base_url="https://judge.example/v1/", key="k").base_url == "https://judge.example/v1"
    assert all(JudgeSettings(base_url=f"http://{'[::1]' if ':' in h else h}:80/v1", key="k") for h in HERE)
