"""What comparing promises: the same rows for both sides, an honest word for each difference, files that need nothing else."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy
import pytest
import yaml
from fastapi.testclient import TestClient

from clm_app.data.withdrawal import withdraw
from clm_app.judging.bisect import Answer
from clm_app.judging.bootstrap import changes
from clm_app.judging.leakage import Leak, LeakReport
from clm_app.judging.standing import ALIKE, BETTER, WORSE, standings, wilson
from clm_app.probes.kinds._base import BenchmarkItem
from clm_app.registry import versions
from clm_app.registry.card import model_card
from clm_app.serving.chat import Piece
from jobs.clock import Clock
from jobs.supervisor import spawn
from store.tables import Approval, Benchmark, BenchmarkReading, Deployment, ParityReading
from tests.recorded import Line, right
from ui import comparing, questions
from ui.house import House
from ui.parts.broken import broken
from ui.parts.radar import radar
from ui.parts.side_by_side import replies
from ui.parts.standing import standing_table
from ui.parts.trends import trends
from ui.parts.word_diff import GONE, NEW, SAME, as_html, as_text, word_diff
from ui.server import make_app

NAMES = ("Lamps", "E-bikes", "<b>|Tools")


class Parrot:
    """Stands in for the router: each version says its name between the words of the prompt."""

    def __init__(self, workspace, pause_s: float = 0.0) -> None:
        self.workspace, self.pause_s, self.asked = workspace, pause_s, []

    def chat(self, version, messages, options):
        name = versions.by_name(self.workspace, version).name
        self.asked.append((name, messages[-1]["content"], options.temperature))
        time.sleep(self.pause_s)
        yield Piece(text=f"I am {name}, and I heard: ", completion_tokens=5, version=name)
        yield Piece(text=messages[-1]["content"], completion_tokens=9, version=name)
        yield Piece(finish_reason="stop", completion_tokens=9, version=name)


@pytest.fixture
def line(workspace) -> Line:
    """Three tasks learned one after the other, the first one half lost by v3; then a refused version and a naive one."""
    made = Line(workspace, *NAMES)
    made.measure(made.base, 1, right(2))
    made.learn(1, {1: right(90), 2: right(10)})
    made.learn(2, {1: right(88), 2: right(80), 3: right(5)})
    third = made.learn(3, {1: right(50), 2: right(81), 3: right(95)})
    made.learn(3, {1: right(20), 2: right(81), 3: right(95)}, state="refused")
    made.newest = third
    made.learn(3, {1: right(51), 2: right(80), 3: right(96)}, track="naive", state="comparison")
    return made


@pytest.fixture
def client(line):
    """The app's routes over that record, answered by the parrot."""
    house = House(line.workspace, Parrot(line.workspace))
    return TestClient(make_app(house), base_url="http://127.0.0.1")


# --- champion and challengers ------------------------------------------------------------------------------------------------


def test_every_version_stands_beside_the_live_one_and_only_a_clear_difference_has_a_word(line):
    found = standings(line.workspace)
    rows = {row.version: row for row in found.rows}
    assert found.champion == "v3" and rows["v3"].is_champion and rows["v3"].against is None
    words = {name: row.against.says for name, row in rows.items() if row.against}
    assert words == {"v0": WORSE, "v1": WORSE, "v2": WORSE, "v4": WORSE, "naive-5": ALIKE}
    assert rows["v1"].against.points == pytest.approx((40 - 71) / 2) and rows["v1"].against.tasks == 2, (
        "v1 never saw the third"
    )
    line.learn(3, {1: right(90), 2: right(81), 3: right(95)}, live=False)
    better = {row.version: row for row in standings(line.workspace).rows}["v6"].against
    assert better.says == BETTER and better.points == pytest.approx(40 / 3) and better.low > 0
    sides = ([numpy.array(right(count)) for count in counts] for counts in ((50, 81, 95), (90, 81, 95)))
    by_hand = changes(*sides)[-1]
    assert (better.low / 100, better.high / 100) == pytest.approx(by_hand)


def test_those_measured_on_all_of_the_champions_tasks_come_first_and_by_their_mean(line):
    rows = standings(line.workspace).rows
    assert [row.version for row in rows] == ["naive-5", "v3", "v4", "v2", "v1", "v0"]
    assert rows[0].mean.value == pytest.approx((0.51 + 0.80 + 0.96) / 3) and rows[0].mean.low < rows[0].mean.value


def test_what_was_kept_is_counted_from_the_moment_each_task_was_learned(line):
    rows = {row.version: row for row in standings(line.workspace).rows}
    assert rows["v1"].kept is None, "nothing was learned before"
    assert rows["v2"].kept.points == pytest.approx(-2) and rows["v2"].kept.tasks == 1
    assert rows["v3"].kept.points == pytest.approx((-40 + 1) / 2) and rows["v3"].kept.high < 0


def test_a_score_has_a_width_at_its_ends_too():
    assert wilson(1.0, 100) == pytest.approx((0.963, 1.0), abs=5e-4)
    assert wilson(0.0, 10)[1] == pytest.approx(0.2775, abs=5e-4)


def test_the_table_says_when_a_version_was_live(line):
    rows = {row.version: row for row in standings(line.workspace).rows}
    assert rows["v4"].live == [] and rows["v3"].live[-1][1] is None
    assert rows["v2"].live[0][1] == rows["v3"].live[0][0]
    with line.workspace.write() as session:
        session.add(Deployment(version_id=versions.by_name(line.workspace, "v1").id, actor="me", reason="back"))
    assert standings(line.workspace).champion == "v1" and "live once before" in standing_table(
        standings(line.workspace)
    )


def test_a_file_that_two_versions_share_is_added_by_the_first_alone(workspace, tmp_path):
    line = Line(workspace, "A")
    for name, sizes in (("one", {"old": 4000}), ("two", {"old": 4000, "new": 3000})):
        (tmp_path / name).mkdir()
        for file, length in sizes.items():
            (tmp_path / name / file).write_bytes(file.encode() * (length // 3 + 1))
    first = workspace.objects.put(tmp_path / "one")
    second = workspace.objects.put(tmp_path / "two", alike=workspace.objects.path(first))
    line.learn(1, {1: right(50)}, weights=first)
    line.learn(1, {1: right(50)}, weights=second)
    rows = {row.version: row for row in standings(workspace).rows}
    assert (rows["v1"].size_bytes, rows["v2"].size_bytes) == (4002, 7005) and rows["v2"].added_bytes == 3003


def test_where_outcomes_are_gone_the_scores_stay_and_no_change_is_said(line):
    with line.workspace.read() as session:
        gone = questions._measured(session, versions.by_name(line.workspace, "v2").id)[1].object
    line.workspace.objects.path(gone).unlink()
    row = {row.version: row for row in standings(line.workspace).rows}["v2"]
    assert (
        row.against is None
        and row.scores["Lamps"].value == 0.88
        and row.mean.value == pytest.approx((0.88 + 0.8 + 0.05) / 3)
    )


# --- drawings ----------------------------------------------------------------------------------------------------------------


class Well(HTMLParser):
    """Reads HTML and keeps what is opened and not closed, every tag, and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.open)


def test_the_drawings_are_whole_and_no_name_of_a_task_is_read_as_html(line):
    found = standings(line.workspace)
    for html in (standing_table(found), trends(found), radar(found, ["v3", "v4", "naive-5"])):
        read = Well(html)
        assert read.open == [] and "script" not in read.tags and "<b>|" not in html and "&lt;b&gt;" in html
        assert 'aria-label="' in html


def test_a_line_begins_where_a_task_was_learned_and_breaks_where_it_was_not_measured(line):
    line.learn(2, {2: right(79)})
    line.learn(2, {1: right(49), 2: right(79)})
    drawn = trends(standings(line.workspace))
    lamps, bikes, tools = re.findall(r'<path d="(M[^"]+)"', drawn.split('<ul class="clm-legend')[0])
    assert lamps.count("M") == 2 and lamps.count("L") == 2, "v1, v2, v3, a gap, v7"
    assert bikes.count("M") == 1 and bikes.count("L") == 3
    assert tools.count("M") == 1 and "L" not in tools
    assert "Lamps: 90\N{NO-BREAK SPACE}% when learned, 49\N{NO-BREAK SPACE}% in v7" in drawn


def test_a_plot_that_would_say_nothing_is_a_sentence(workspace):
    line = Line(workspace, "A")
    assert "has learned nothing yet" in trends(standings(workspace))
    line.learn(1, {1: right(3)})
    assert "needs three tasks" in radar(standings(workspace), ["v1"])


# --- side by side ------------------------------------------------------------------------------------------------------------


def test_the_whole_comparison_has_intervals_sizes_and_costs(client):
    told = client.get("/api/compare/whole?before=v2&after=v3").json()
    lamps = told["tasks"][0]
    assert (lamps["before_low"], lamps["before_high"]) == pytest.approx(wilson(0.88, 100))
    assert lamps["after_low"] < 0.5 < lamps["after_high"] and lamps["lost"] == 38
    assert [v["version"] for v in told["versions"]] == ["v2", "v3"]
    assert told["versions"][1]["training_s"] == 12.5 and told["versions"][1]["tokens_per_s"] == 900
    assert told["benchmarks"] == [] and len(told["flips"]) == 38 + 1 + 90
    assert "compared with itself" in client.get("/api/compare/whole?before=v2&after=v2").json()["error"]


def test_the_table_for_other_programs_has_a_row_for_each_task_and_each_flip(client):
    answer = client.get("/api/compare/export?before=v2&after=v3&format=csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [sum(row["row"] == kind for row in rows) for kind in ("task", "mean", "flip")] == [3, 1, 129]
    assert rows[0]["task"] == "Lamps" and float(rows[0]["change_points"]) == -38
    assert rows[-1]["kind"] == "gained" and rows[4]["kind"] == "lost" and rows[4]["prompt"].startswith("test question")
    assert answer.headers["content-disposition"] == 'attachment; filename="clm-v2-v3.csv"'
    every = list(csv.DictReader(io.StringIO(client.get("/api/standings/export?format=csv").text)))
    naive = next(row for row in every if row["version"] == "naive-5")
    assert (
        naive["Lamps"] == "0.51" and naive["against"] == ALIKE and naive["verdict"] == "" and naive["live_from"] == ""
    )


@pytest.mark.parametrize("path", ["/api/compare/export?before=v2&after=v3&outputs=2", "/api/standings/export"])
def test_a_report_is_one_file_that_asks_nobody_and_prints(client, path):
    text = client.get(path).text
    read = Well(text)
    assert read.open == [] and read.addresses == [] and not {"script", "link", "img", "iframe"} & set(read.tags)
    assert not re.search(r"@import|url\(|https?://", text), "nothing is fetched"
    assert "default-src 'none'" in text
    assert "@media print" in text and "prefers-color-scheme: dark" in text and "--clm-hue-1: #43c0b2" in text
    assert "&lt;b&gt;|Tools" in text


def test_what_was_said_of_flipped_rows_is_asked_of_both_greedily_and_the_words_that_differ_are_marked(client, line):
    parrot = client.app.state.house.router
    told = client.get("/api/compare/outputs?before=v2&after=v3&most=3").json()
    assert told["flips"] == 129 and [one["kind"] for one in told["replies"]] == ["lost"] * 3
    assert [name for name, *_ in parrot.asked] == ["v2"] * 3 + ["v3"] * 3 and {t for *_, t in parrot.asked} == {0.0}
    first = told["replies"][0]
    assert first["before"].startswith("I am v2,") and first["after"].endswith(first["prompt"])
    assert first["diff"].startswith("I am[- v2,-]{+ v3,+} and I heard:")


def test_benchmarks_are_compared_item_by_item_on_the_items_that_may_judge(client, line):
    workspace, items = line.workspace, [BenchmarkItem(prompt=f"say {i}", expected="yes") for i in range(22)]
    (workspace.home / "bench").mkdir()
    for part in ("validation", "test"):
        (workspace.home / "bench" / f"{part}.jsonl").write_text(
            "".join(item.model_dump_json() + "\n" for item in items)
        )
    leak = Leak(item=items[20].key, task="Lamps", snapshot_id=1, row="x", trained="say 20", how="exact", closeness=1)
    with workspace.write() as session:
        session.add(Benchmark(
            name="Yes", key="yes", version=2, kind="token_f1", object=workspace.objects.put(workspace.home / "bench"),
            validation_items=22, test_items=22, report={"leakage": LeakReport(leaks=[leak]).model_dump()},
        ))  # fmt: skip
        session.flush()
        for name, yes in (("v2", 18), ("v3", 6)):
            said = [{"item": item.key, "score": float(i < yes), "text": "yes" if i < yes else f"no {i}"}
                    for i, item in enumerate(items[:20])]  # fmt: skip
            said += [
                {"item": items[20].key, "score": float(name == "v2"), "text": name},
                {"item": items[21].key, "too_long": 9},
            ]
            session.add(BenchmarkReading(
                benchmark_id=1, version_id=versions.by_name(workspace, name).id, split="test", on="trained", backend="engine",
                key=name, value=yes / 20, low=yes / 20 - 0.1, high=yes / 20 + 0.1, unit="share of words", items=20,
                object=workspace.objects.put_bytes("\n".join(map(json.dumps, said)).encode()),
            ))  # fmt: skip
    told = client.get("/api/compare/whole?before=v2&after=v3").json()
    (one,) = told["benchmarks"]
    assert one["benchmark"] == "Yes@2" and one["change"] == pytest.approx(-0.6) and one["says"] == WORSE
    assert one["low"] < -0.6 < one["high"] < 0 and len(told["benchmark_flips"]) == 12, (
        "neither the leak nor the long one"
    )
    first = told["benchmark_flips"][0]
    assert (first["before_text"], first["kind"]) == ("yes", "lost") and first[
        "after_text"
    ] == f"no {first['prompt'][4:]}"
    page = client.get("/api/compare/export?before=v2&after=v3").text
    assert "Yes@2" in page and "12 items scored otherwise" in page
    assert standings(workspace).rows[1].readings[0].benchmark == "Yes@2"
    assert "Yes@2 | token_f1 | 0.3 |" in model_card(workspace, versions.by_name(workspace, "v3"))


def test_replies_that_a_benchmark_kept_are_shown_and_not_asked_for_again(client, monkeypatch):
    flip = {
        "benchmark": "Yes@2",
        "item": "x",
        "prompt": "say it",
        "kind": "lost",
        "before_text": "yes",
        "after_text": "no",
    }
    real = comparing.side_by_side
    monkeypatch.setattr(
        comparing, "side_by_side",
        lambda *names: real(*names) | {"flips": [], "benchmark_flips": [flip | {"after_text": None}, flip]},
    )  # fmt: skip
    told = client.get("/api/compare/outputs?before=v2&after=v3").json()
    assert [(r["task"], r["diff"], r["kept"]) for r in told["replies"]] == [("Yes@2", "[-yes-]{+no+}", True)]
    assert client.app.state.house.router.asked == []


# --- any two who answer --------------------------------------------------------------------------------------------------------


@pytest.fixture
def endpoint():
    """A small server of that API on this machine; what it says is set from outside, what it heard is kept."""

    class Answering(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.heard.append((self.path, body, self.headers.get("authorization")))
            status, said, headers = server.says(body)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(said if isinstance(said, bytes) else json.dumps(said).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answering)
    server.heard = []
    server.says = lambda body: (
        200, {"choices": [{"message": {"content": "I am another, and I heard: " + body["messages"][0]["content"]}}],
              "usage": {"completion_tokens": 7}}, {},
    )  # fmt: skip
    server.address = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def wish(right: dict, **more) -> dict:
    return {"left": {"version": "live"}, "right": right, "prompts": ["Hello?"]} | more


def test_a_version_and_any_endpoint_answer_the_same_prompts(client, endpoint):
    body = wish({"base_url": endpoint.address, "model": "other", "api_key": "secret"}, max_tokens=33)
    answer = client.post("/api/compare/prompts", json=body)
    told = answer.json()
    assert told["right"] == f"other at {endpoint.address}" and "secret" not in answer.text
    (one,) = told["replies"]
    assert one["diff"] == "I am[- v3,-]{+ another,+} and I heard: Hello?" and one["right_tokens"] == 7
    assert "<del> v3,</del><ins> another,</ins>" in replies(told) and Well(replies(told)).open == []
    (path, heard, key) = endpoint.heard[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert (heard["temperature"], heard["max_tokens"], heard["stream"], heard["model"]) == (0, 33, False, "other")


def test_no_address_outside_this_machine_is_asked_unless_it_is_said_so(client, monkeypatch):
    asked = []
    monkeypatch.setattr(
        comparing.Endpoint, "ask", lambda self, *_: asked.append(self.base_url) or comparing.Reply("x", 0.1, 1)
    )
    for address in ("http://example.com/v1", "https://127.0.0.1.evil.example/v1", "http://10.0.0.7/v1"):
        refused = client.post("/api/compare/prompts", json=wish({"base_url": address, "model": "m"}))
        assert refused.status_code == 400 and "is not this machine" in refused.json()["error"], address
    for address in ("file:///etc/passwd", "ftp://127.0.0.1", "127.0.0.1:80", "http://a@127.0.0.1/v1"):
        refused = client.post("/api/compare/prompts", json=wish({"base_url": address, "model": "m"}))
        assert refused.status_code == 400 and "an address such as" in refused.json()["error"], address
    assert asked == []
    said = client.post(
        "/api/compare/prompts", json=wish({"base_url": "http://example.com/v1", "model": "m", "outside": True})
    )
    assert said.status_code == 200 and asked == ["http://example.com/v1"]


def test_an_endpoint_that_fails_is_told_in_a_sentence_and_a_redirect_is_not_followed(client, endpoint):
    side = {"base_url": endpoint.address, "model": "m"}
    cases = {
        (404, b"no such model", ()): (400, "refuses with status 404: no such model"),
        (302, b"", (("location", "http://example.com/"),)): (400, "refuses with status 302"),
        (200, b"<html>", ()): (400, "gives no reply as this API does"),
        (200, b'{"choices": [{"message": {"content": null}}]}', ()): (400, "a reply without text"),
    }
    for (status, said, headers), (expected, sentence) in cases.items():
        endpoint.says = lambda _, status=status, said=said, headers=headers: (status, said, dict(headers))
        refused = client.post("/api/compare/prompts", json=wish(side))
        assert refused.status_code == expected and sentence in refused.json()["error"], refused.text
    endpoint.says = lambda _: time.sleep(1) or (200, b"", {})
    late = client.post("/api/compare/prompts", json=wish(side, limit_s=0.2))
    assert late.status_code == 503 and "within 0.2 s" in late.json()["error"]
    gone = client.post("/api/compare/prompts", json=wish({"base_url": "http://127.0.0.1:9/v1", "model": "m"}))
    assert gone.status_code == 503 and "cannot be reached" in gone.json()["error"]


def test_a_side_is_one_or_the_other_and_both_are_looked_at_before_any_is_asked(client):
    parrot = client.app.state.house.router
    assert client.post("/api/compare/prompts", json=wish({})).status_code == 422
    assert (
        client.post("/api/compare/prompts", json=wish({"version": "v1", "base_url": "http://127.0.0.1/v1"})).status_code
        == 422
    )
    assert client.post("/api/compare/prompts", json=wish({"version": "v99"})).status_code == 404
    assert client.post("/api/compare/prompts", json=wish({"version": "v1"}, prompts=["x"] * 51)).status_code == 422
    assert parrot.asked == []
    parrot.pause_s = 0.1
    late = client.post("/api/compare/prompts", json=wish({"version": "v1"}, limit_s=0.05))
    assert late.status_code == 503 and "live has not answered within 0.05 s" in late.json()["error"]


@pytest.mark.parametrize(
    ("before", "after", "marked"),
    [
        ("the cat sat", "the dog sat", "the[- cat-]{+ dog+} sat"), ("", "new words", "{+new words+}"), ("gone", "", "[-gone-]"),
        ("same\nthing", "same thing", "same thing"), ("", "", ""), ("a b c", "b c d", "[-a-]b c{+ d+}"),
    ],
)  # fmt: skip
def test_a_word_diff_gives_the_second_text_to_the_letter(before, after, marked):
    parts = word_diff(before, after)
    assert "".join(text for kind, text in parts if kind in (SAME, NEW)) == after
    words = "".join(
        text if text.startswith((" ", "\n")) else f" {text}" for kind, text in parts if kind in (SAME, GONE)
    ).split()
    assert words == before.split()
    assert marked is None or as_text(parts) == marked
    assert "<i>" not in as_html(word_diff("<i>a", "<i>b")) and "<del>&lt;i&gt;a</del>" in as_html(
        word_diff("<i>a", "<i>b")
    )


# --- the model card ------------------------------------------------------------------------------------------------------------


def test_a_model_card_is_made_of_what_the_record_holds_and_says_what_it_does_not(client, line):
    workspace, version = line.workspace, versions.by_name(line.workspace, "v3")
    with workspace.write() as session:
        session.add(Approval(decision_id=3, version_id=version.id, says="approve", by="Ada", reason="looks well"))
        session.add(
            ParityReading(version_id=version.id, backend="llama_cpp", verdict="same", sentence="It answers alike.")
        )
    withdraw(workspace, line.rows("Lamps", "train")[4].key, "asked", "me")
    answer = client.get("/api/versions/v3/card.md")
    assert answer.headers["content-type"].startswith("text/markdown")
    _, head, body = answer.text.split("---\n", 2)
    told = yaml.safe_load(head)
    results = told["model-index"][0]["results"]
    assert [r["dataset"]["name"] for r in results] == list(NAMES) and results[0]["metrics"][0]["value"] == 0.5
    assert results[0]["metrics"][0]["args"] == {
        "low": round(wilson(0.5, 100)[0], 6), "high": round(wilson(0.5, 100)[1], 6), "items": 100,
    }  # fmt: skip
    assert told["datasets"] == [f"sha256:{r['dataset']['revision']}" for r in results] and "license" not in told
    for said in (
        "Promote: said of v3.", "approve by Ada: looks well", "llama_cpp: same. It answers alike.", "0.1.0+abc", "2.13.0",
        "backward transfer, 2 tasks): -19.5 points", "| 50.0 % | 40.4 % to 59.6 % |", "Energy and carbon: not measured",
        "Licence of the base: its folder names none", "| Lamps | 38 | 0 |", "Benchmarks: not measured",
    ):  # fmt: skip
        assert said in body, said
    assert re.search(r"Lamps \| `[0-9a-f]{64}` \| 200 \| 20 \| 100 \| Lamps\.jsonl \| 1 \|", body)
    assert "/somewhere/private" not in answer.text and str(workspace.home) not in answer.text, (
        "no place of this machine"
    )
    named = client.get("/api/versions/v3/card.md?prompts=true").text
    assert "test question" not in body and len(re.findall(r"`test question \d+ of Lamps\?`", named)) == 20
    assert "and 18 more" in named
    assert "<b>" not in body and "&lt;b>\\|Tools" in body
    assert "Parity" not in body.split("## Not known")[1] and "not measured, since no parent" not in body


def test_the_card_of_a_base_says_that_nothing_was_learned(client):
    text = client.get("/api/versions/v0/card.md").text
    assert "Nothing was learned yet." in text and "model-index" not in text and "It was not trained here." in text


def test_the_licence_is_the_one_that_the_base_names(workspace, line):
    (versions.weights(workspace, line.base).base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    try:
        assert "license: apache-2.0" in model_card(workspace, line.base)
    finally:
        (versions.weights(workspace, line.base).base / "README.md").unlink()


# --- bisect, through the door and the clock ------------------------------------------------------------------------------------


def test_a_bisect_job_is_asked_over_the_api_and_done_by_the_clock(client, line):
    refused = client.post("/api/bisect", json={"task": "Lamps", "good": "v4"})
    assert refused.status_code == 400 and "does not stand on v4" in refused.json()["error"]
    asked = client.post("/api/bisect", json={"task": "lamps"})
    assert asked.status_code == 201 and asked.json()["wish"]["bad"] == "v3", asked.text
    clock = Clock(line.workspace, spawn)
    with line.workspace.write() as session:
        made = session.get_one(type(line.job), line.job.id)
        made.status = "done"
        session.add(made)
    clock.tick()
    clock._worker.join(30)
    job = client.get(f"/api/jobs/{asked.json()['id']}").json()
    assert job["status"] == "done" and job["result"]["first_broken"] == "v3" and job["result"]["measured"] == 0, job
    drawn = broken(Answer.model_validate(job["result"]))
    assert Well(drawn).open == [] and "The gate had said of it: Promote: said of v3." in drawn
    assert job["result"]["sentence"].startswith(
        "v3, which learned <b>|Tools with replay, broke Lamps: 88 % right in v2, 50 %"
    )
