"""What the doors of the judge and of public suites promise: who is asked, what is kept, what is refused before it runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gradio as gr
import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM

from clm_app.data.template import load_tokenizer
from clm_app.engine.routed import Routed
from clm_app.errors import BadData
from clm_app.events import Failed, Finished, Measuring, Scored
from clm_app.judging import benchmarks, harness
from clm_app.judging.harness import HarnessSettings
from clm_app.judging.pairwise import TEMPLATE
from clm_app.registry import versions
from clm_app.routes import Router
from clm_app.serving.chat import Piece
from jobs.clock import KINDS, Clock
from jobs.queue import Queue
from jobs.supervisor import spawn
from store.tables import Job
from tests.recorded import Line, right
from tests.smallest import TASKS, make_rows
from tests.test_page import ROOT, SERVER, WAIT_S, make_base
from ui import judging, questions
from ui.house import House
from ui.parts.judged import judged as drawn_judgement
from ui.parts.suite import suite as drawn_suite
from ui.server import make_app
from ui.tabs.benchmarks import Benchmarks
from ui.tabs.compare import Compare

needs_harness = pytest.mark.skipif(
    not harness.is_installed(), reason="lm-eval is not installed: pip install -e .[harness]"
)


class Parrot:
    """Stands in for the router: each version says its name and the prompt; asked to judge, it says what it was told to."""

    def __init__(self, workspace, verdict: str = "[[A]]") -> None:
        self.workspace, self.verdict, self.asked = workspace, verdict, []

    def chat(self, version, messages, options):
        name, message = versions.by_name(self.workspace, version).name, messages[-1]["content"]
        self.asked.append((name, message, options.max_tokens))
        text = self.verdict if message.startswith(TEMPLATE[:30]) else f"I am {name}, and I heard: {message}"
        yield Piece(text=text, completion_tokens=3, version=name)
        yield Piece(finish_reason="stop", completion_tokens=3, version=name)


@pytest.fixture
def line(workspace) -> Line:
    """Two tasks; v2 has lost 20 rows of the first one."""
    made = Line(workspace, "Lamps", "Bikes")
    made.measure(made.base, 1, right(2))
    made.learn(1, {1: right(90), 2: right(10)})
    made.learn(2, {1: right(70), 2: right(80)})
    return made


@pytest.fixture
def client(line):
    """The app's routes over that record, answered by the parrot."""
    return TestClient(make_app(House(line.workspace, Parrot(line.workspace))), base_url="http://127.0.0.1")


@pytest.fixture
def bare(workspace):
    """The same over a home where nothing was learned yet."""
    versions.base_version(workspace)
    return TestClient(make_app(House(workspace)), base_url="http://127.0.0.1")


@pytest.fixture
def endpoint():
    """A judge on this machine that likes v2, whichever place it has; what it heard is kept."""

    class Judging(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.heard.append((body, self.headers.get("authorization")))
            said = json.dumps({"choices": [{"message": {"content": server.says(body["messages"][0]["content"])}}]})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(said.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Judging)
    server.heard = []
    server.says = lambda message: "[[A]]" if "<reply A>\nI am v2" in message else "[[B]]"
    server.address = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def wish(judge: dict, **more) -> dict:
    asked = {} if {"benchmark", "flipped"} & more.keys() else {"prompts": ["Hello?", "<b>Who?</b>"]}
    return {"left": {"version": "v1"}, "right": {"version": "live"}, "judge": judge} | asked | more


# --- a model as judge --------------------------------------------------------------------------------------------------


def test_an_endpoint_judges_both_sides_in_both_orders_and_what_it_said_is_kept(client, endpoint, line):
    judge = {"base_url": endpoint.address, "model": "wise", "api_key": "s3cret"}
    body = wish(judge, max_tokens=33, judging={"rubric": "Be kind.", "max_tokens": 9})
    answer = client.post("/api/compare/judged", json=body)
    told = answer.json()
    assert answer.status_code == 200, told
    assert (told["left"], told["right"], told["judge"]) == ("v1", "v2", f"wise at {endpoint.address}")
    figures = told["figures"]
    assert (figures["pairs"], figures["wins"], figures["losses"], figures["unreadable"]) == (2, 2, 0, 0)
    assert figures["position_bias"] == 0 and figures["p"] == 0.5 and told["notes"] == []
    assert told["sentence"].endswith("finds v2 better on 2 of 2 prompts and v1 on 0, 0 ties: no more than chance may give "
                                     "(p = 0.5).")  # fmt: skip
    first = told["pairs"][0]
    assert first["left"] == "I am v1, and I heard: Hello?" and first["right"] == "I am v2, and I heard: Hello?"
    assert (first["new_first"], first["old_first"], first["says"]) == ("[[A]]", "[[B]]", "win")
    assert {longest for *_, longest in client.app.state.house.router.asked} == {33}
    assert len(endpoint.heard) == 4 and {key for _, key in endpoint.heard} == {"Bearer s3cret"}
    assert {heard["max_tokens"] for heard, _ in endpoint.heard} == {9}
    assert "Be kind." in endpoint.heard[0][0]["messages"][0]["content"]

    kept = client.get("/api/compare/judged").json()
    assert [one["figures"] for one in kept] == [figures] and "pairs" not in kept[0] and kept[0]["by"] == "local"
    again = client.get(f"/api/compare/judged/{kept[0]['id']}").json()
    assert again["pairs"] == told["pairs"] and again["sentence"] == told["sentence"]
    events = [e for e in questions.audit(line.workspace) if e.action == "replies.judged"]
    assert events[0].subject == f"version:{versions.by_name(line.workspace, 'v2').id}"
    assert "s3cret" not in answer.text + json.dumps([e.detail for e in events])
    assert client.get("/api/compare/judged/999").status_code == 404
    html = drawn_judgement(told)
    assert "&lt;b&gt;Who?" in html and "<b>Who?" not in html and "Be kind." in html


def test_a_version_of_ours_judges_through_the_router_and_a_place_that_it_loves_decides_nothing(client):
    told = client.post("/api/compare/judged", json=wish({"version": "v0"}, judging={"max_tokens": 7})).json()
    assert told["judge"] == "v0" and told["figures"]["ties"] == 2 and told["figures"]["position_bias"] == 1.0
    asked = client.app.state.house.router.asked
    assert [(name, longest) for name, message, longest in asked if message.startswith(TEMPLATE[:30])] == [("v0", 7)] * 4
    own = client.post("/api/compare/judged", json=wish({"version": "v2"})).json()
    assert own["notes"] == ["The judge is one of the two, and models favour their own words. Ask another one."]


def test_what_a_version_mumbles_as_judge_is_in_no_figure(client):
    client.app.state.house.router.verdict = "both are nice"
    told = client.post("/api/compare/judged", json=wish({"version": "v0"})).json()
    assert told["figures"]["unreadable"] == 2 and told["figures"]["position_bias"] is None
    assert "2 not readable" in told["sentence"] and "both are nice" in drawn_judgement(told)


def test_of_a_benchmark_only_validation_items_that_no_training_row_has_are_asked(client, endpoint, line):
    trained = line.rows("Lamps", "train")[0].prompt
    items = [{"prompt": trained, "expected": "x", "split": "validation"}]
    items += [
        {"prompt": f"unheard of {split} thing number {n * n}", "expected": [f"one {n}", f"two {n}"], "split": split}
        for split in ("validation", "test")
        for n in range(3, 8)
    ]
    knobs = {"template": "Say: {prompt}"}
    benchmarks.from_items(line.workspace, "Things", items, "token_f1", knobs, "me")
    body = wish({"base_url": endpoint.address, "model": "wise"}, benchmark="Things", most=3)
    told = client.post("/api/compare/judged", json=body).json()
    assert told["asked"] == "Things@1" and len(told["pairs"]) == 3, told
    assert all(pair["prompt"].startswith("Say: unheard of validation thing") for pair in told["pairs"])
    assert "<expected>\none 3 or two 3\n</expected>" in "".join(str(heard) for heard, _ in endpoint.heard).replace(
        "\\n", "\n"
    )
    said = " ".join(message for _, message, _ in client.app.state.house.router.asked)
    assert "of test thing" not in said and trained not in said


def test_rows_that_flipped_are_judged_worst_first_and_said_to_be_chosen(client, endpoint, line):
    body = wish({"base_url": endpoint.address, "model": "wise"}, flipped=True, most=4)
    told = client.post("/api/compare/judged", json=body).json()
    flips = questions.compare(line.workspace, "v1", "v2")["flips"]
    assert [pair["item"] for pair in told["pairs"]] == [flip["item"] for flip in flips[:4]]
    assert told["pairs"][0]["expected"] == flips[0]["response"] and "say nothing of other rows" in told["notes"][0]


REFUSED = [
    (wish({"base_url": "http://judge.example/v1", "model": "m"}), 400, "is not this machine, and prompts sent there leave it"),
    (wish({"base_url": "http://127.0.0.1@judge.example/v1", "model": "m"}), 400, "an address such as"),
    (wish({"base_url": "http://judge.example/v1", "model": "m", "api_key": "k", "outside": True}), 400, "use https"),
    (wish({"base_url": "http://127.0.0.1:9/v1"}), 400, "model: String should have at least 1 character"),
    (wish({"version": "v99"}), 404, "v99"),
    (wish({"version": "v0"}, benchmark="Things"), 404, "There is no benchmark 'Things'"),
    (wish({"version": "v0"}, prompts=["x"], flipped=True), 400, "Give exactly one of the three"),
    (wish({"version": "v0"}, prompts=[]), 400, "Give exactly one of the three"),
    (wish({"version": "v0"}, flipped=True, left={"base_url": "http://127.0.0.1:9/v1", "model": "m"}), 400, "Rows flip between"),
    (wish({"version": "v0"}, most=51), 422, "less than or equal to 50"),
    (wish({"version": "v0"}, judging={"template": "{first}"}), 422, "must see both replies"),
]  # fmt: skip


def test_a_judge_that_may_not_be_asked_is_refused_before_anybody_is(client, monkeypatch):
    monkeypatch.setattr(httpx.Client, "post", lambda *_, **__: pytest.fail("a host was asked"))
    monkeypatch.setattr(httpx.Client, "stream", lambda *_, **__: pytest.fail("a host was asked"))
    for body, status, sentence in REFUSED:
        answer = TestClient.request(client, "POST", "/api/compare/judged", json=body)
        assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text
    assert client.app.state.house.router.asked == [] and judging.before(client.app.state.house.workspace) == []


def test_a_judge_that_does_not_answer_is_named_and_nothing_is_kept(client, endpoint):
    endpoint.shutdown()
    endpoint.server_close()
    body = wish({"base_url": endpoint.address, "model": "wise"}, judging={"retries": 1, "wait_s": 0})
    answer = client.post("/api/compare/judged", json=body)
    assert answer.status_code == 404 and "gave no verdict in 2 tries" in answer.json()["error"]
    assert client.get("/api/compare/judged").json() == []


def test_the_form_of_the_judge_asks_what_its_widgets_say(line):
    tab = Compare(House(line.workspace, Parrot(line.workspace)))
    with gr.Blocks():
        tab.build()
    sides = ("v1", "", "v2", "")
    said = tab._judge(*sides, "Hello?\n\n Why? ", False, "v0", "", "prompts", None, 20, "Be brief.")
    assert "of 2 pairs" in said and "Be brief." in said and "What v0 says" in said
    assert "of 5 pairs" in tab._judge(*sides, "", False, "v0", "", "flipped", None, 5, "Be brief.")
    assert "There is no prompt" in tab._judge(*sides, " ", False, "v0", "", "prompts", None, 20, "r")
    assert "There is no benchmark yet" in tab._judge(*sides, "", False, "v0", "", "benchmark", None, 20, "r")
    assert "is not this machine" in tab._judge(
        *sides, "x", False, "http://judge.example/v1", "m", "prompts", None, 20, "r"
    )


@pytest.mark.browser
def test_a_judgement_is_drawn_beside_the_prompts_and_stays_on_the_page(tmp_path, browser):
    from playwright.sync_api import expect

    make_base(tmp_path / "base")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        found = process.stdout.readline().strip()
        with httpx.Client(base_url=found, timeout=30) as client:
            while not client.get("/api/health").json()["page"]:
                pass
        page, problems = browser.new_page(viewport={"width": 1280, "height": 1000}), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(found)
        page.get_by_role("tab", name="Compare", exact=True).click()
        page.get_by_text("Your own prompts, and other endpoints").click()
        page.locator("#clm-prompts textarea").fill("Hello?")
        page.locator("#clm-judge-ask").click()
        expect(page.locator("#clm-judge-answer")).to_contain_text("not asked: the same words", timeout=15_000)
        expect(page.locator("#clm-judged")).to_contain_text("v0 finds v0 better on 0 of 1 prompts", timeout=15_000)
        page.get_by_role("tab", name="Benchmarks", exact=True).click()
        page.get_by_text("Public suites (lm-evaluation-harness)").click()
        page.locator("#clm-suite").click()
        expect(page.locator("#clm-suite-answer")).to_contain_text("needs a folder", timeout=15_000)
        assert not problems
        page.close()
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_S)


# --- public suites: what is refused before it runs ---------------------------------------------------------------------

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{right}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def folder(tmp_path):
    """A folder with two tasks over a local file, a group of both, and Python that leaves a mark where it runs."""
    rows = [{"start": row["prompt"], "ends": ["go on", "stop here"], "right": n % 2} for n, row in
            enumerate(make_rows(6, TASKS["Colours"]))]  # fmt: skip
    place = tmp_path / "suites"
    place.mkdir()
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("one", "two"):
        (place / f"{name}.yaml").write_text(TASK.format(name=name, file=place / "rows.jsonl"))
    (place / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    (place / "own.py").write_text(f"open({str(place / 'ran')!r}, 'w')\ndef same(docs): return docs\n")
    return place


def ask(folder, *tasks, **more) -> dict:
    return {"folder": str(folder), "tasks": list(tasks), **more}


def test_without_the_harness_a_suite_is_refused_with_how_to_install_it(bare, folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more)
    )
    answer = bare.post("/api/suites", json=ask(folder, "one"))
    assert answer.status_code == 404 and "pip install -c constraints.txt -e .[harness]" in answer.json()["error"]
    assert questions.jobs(bare.app.state.house.workspace, kind="suite") == []


@needs_harness
def test_what_is_not_there_is_refused_and_what_is_becomes_a_job_of_the_version_that_is_live_now(client, folder):
    for body, status, sentence in [
        (ask(folder / "gone", "one"), 400, "gone is no folder"),
        (ask(folder, "one", "mmlu"), 400, "'mmlu' is not among the tasks in"),
        (ask(folder, "one", version="v99"), 404, "v99"),
        (ask(folder), 422, "at least 1 item"),
        (ask(folder, "one", most_items=0), 422, "greater than or equal to 1"),
        (ask(folder, "one", volume=11), 422, "Extra inputs"),
    ]:
        answer = client.post("/api/suites", json=body)
        assert (answer.status_code, sentence in answer.json()["error"]) == (status, True), answer.text
    workspace = client.app.state.house.workspace
    assert questions.jobs(workspace, kind="suite") == []
    asked = client.post("/api/suites", json=ask(folder, "both", "both"))
    job = asked.json()
    assert asked.status_code == 201 and job["wish"]["version"] == "v2" and job["wish"]["tasks"] == ["both"], job
    assert questions.job_title(questions.job(workspace, job["id"])) == "both on v2"


@needs_harness
@pytest.mark.parametrize("text, named", [
    (TASK + "process_docs: !function own.same\n", "the tag !function"),
    (TASK.replace("metric: acc", "metric: ./own.py"), "the metric ./own.py"),
    (TASK + "class: own.Task\n", "the class own.Task"),
    ("include: hidden.yml\n" + TASK, "the tag !function"),
])  # fmt: skip
def test_a_task_that_would_run_python_is_refused_unless_it_is_trusted(bare, folder, text, named):
    (folder / "sly.yaml").write_text(text.format(name="sly", file=folder / "rows.jsonl"))
    (folder / "hidden.yml").write_text("process_docs: !function own.same\n")
    (folder / "all.yaml").write_text("group: all\ntask: [one, {group: inner, task: [sly]}]\n")
    for asked in ("sly", "all"):
        refused = bare.post("/api/suites", json=ask(folder, asked))
        assert refused.status_code == 400, refused.text
        assert f"would run Python of its own ({named})" in refused.json()["error"]
    assert bare.post("/api/suites", json=ask(folder, "one", "two")).status_code == 201, "of others nothing is read"
    assert bare.post("/api/suites", json=ask(folder, "all", trust_code=True)).status_code == 201
    assert not (folder / "ran").exists()


@needs_harness
def test_a_template_that_reaches_into_python_is_stopped_unless_it_is_trusted(folder, tiny_model):
    text = TASK.format(name="sly", file=folder / "rows.jsonl").replace("{{start}}", "{{start.__class__.__name__}}")
    (folder / "sly.yaml").write_text(text)
    told = AutoModelForCausalLM.from_pretrained(tiny_model), load_tokenizer(tiny_model)
    with pytest.raises(BadData, match="cannot be run: access to attribute '__class__' of 'str' object is unsafe"):
        harness.run(*told, HarnessSettings(folder=folder, tasks=["sly"]))
    assert (
        harness.run(*told, HarnessSettings(folder=folder, tasks=["sly"], trust_code=True))["sly"]["acc"]["value"] >= 0
    )


# --- public suites: what is run ----------------------------------------------------------------------------------------


@needs_harness
def test_a_suite_is_asked_over_the_api_and_run_by_the_clock_in_a_child(client, folder, line, tiny_model):
    workspace = line.workspace
    with workspace.write() as session:  # the record written by hand has a job of its own
        made = session.get_one(Job, line.job.id)
        made.status = "done"
        session.add(made)
    asked = client.post("/api/suites", json=ask(folder, "both", version="v0", most_items=4)).json()
    clock = Clock(workspace, spawn)
    clock.tick()
    clock._worker.join(120)
    job = client.get(f"/api/jobs/{asked['id']}").json()
    assert job["status"] == "done", job
    figures = job["result"]["scores"]["both"]["figures"]
    told = AutoModelForCausalLM.from_pretrained(tiny_model), load_tokenizer(tiny_model)
    assert figures == harness.run(*told, HarnessSettings(folder=folder, tasks=["both"], most_items=4))
    assert {"one", "two"} <= figures.keys() and len(job["result"]["scores"]["both"]["files"]) == 64
    kept = [e for e in questions.audit(workspace) if e.action == "suite.run"]
    assert kept[0].detail["scores"] == job["result"]["scores"] and kept[0].subject == f"version:{line.base.id}"
    assert "What the suite says of v0" in drawn_suite(job["result"]) and "acc" in drawn_suite(job["result"])


@needs_harness
def test_each_item_is_read_through_the_weights_that_its_router_names(tiny_model, tmp_path):
    from lm_eval.api.instance import Instance

    from clm_app.engine.suite_reader import Reader

    torch.manual_seed(5)
    router, base, other = Router(), *(AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    for weight in other.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    other.save_pretrained(tmp_path / "adapters/0000")
    router.folders["Colours"] = "adapters/0000"
    router.add("Colours", [row["prompt"] for row in make_rows(24, TASKS["Colours"])])
    router.save(tmp_path)
    contexts = ["red now today please", "nothing known at all", "blue then again soon", "nothing of that either"]
    places = [0, 1, 2, 2]  # the last one is another context of the third item
    asked = [
        Instance("loglikelihood", {}, (context, " go on"), 0, ("t", place, 1))
        for context, place in zip(contexts, places, strict=True)
    ]
    told, tokenizer = [], load_tokenizer(tiny_model)

    def heard(model) -> list[float]:
        return [nats for nats, _ in Reader(model, tokenizer, 2, lambda *now: told.append(now)).loglikelihood(asked)]

    plain, tuned = heard(base), heard(other)
    assert all(abs(one - two) > 0.01 for one, two in zip(plain, tuned, strict=True))
    assert heard(Routed(base, tmp_path)) == pytest.approx([tuned[0], plain[1], tuned[2], tuned[3]], abs=1e-4)
    assert told[-1] == (4, 4) and all(done <= of for done, of in told)


class Child:
    """A child that says some events as it starts, and has ended."""

    def __init__(self, events, hear) -> None:
        self.last = ["killed"]
        for event in events:
            hear(event)

    def wait(self, _=None) -> int:
        return 0

    def stop(self) -> None:
        """Nothing is left to stop."""


@pytest.fixture
def suite_job(workspace, folder):
    """Return a function that makes a suite job whose children say, one after the other, what the test writes."""

    versions.base_version(workspace)

    def make(*children):
        job = Job(kind="suite", wish=ask(folder, "one", "two", version="v0"))
        with workspace.write() as session:
            session.add(job)
        queue, said, orders = Queue(workspace, "test"), iter(children), []

        def start(command, *, on_event, **_):
            orders.append(json.loads(open(command[-1]).read())["settings"]["tasks"])
            return Child(next(said), on_event)

        return KINDS["suite"](workspace, queue, queue.claim(), start, lambda: None), orders

    return make


def scored(task: str, value: float) -> Scored:
    figures = {task: {"acc": {"value": value, "standard_error": None}}}
    return Scored(task=task, figures=figures, files="f", seconds=1)


@needs_harness
def test_a_killed_child_is_started_again_with_the_tasks_that_are_left(suite_job):
    halfway = Measuring(task="two", split="suite", done=1, of=2)
    job, orders = suite_job([scored("one", 0.5), halfway], [scored("two", 0.25), Finished()])
    result = job.go()
    assert orders == [["one", "two"], ["two"]] and job.share == 0.75
    assert [told["figures"][task]["acc"]["value"] for task, told in result["scores"].items()] == [0.5, 0.25]
    assert job.go() == result and len(orders) == 2, "what is scored is not asked again"


@needs_harness
def test_a_child_that_says_why_or_never_ends_a_task_ends_the_job_with_a_sentence(suite_job, workspace):
    job, _ = suite_job([scored("one", 0.5), Failed(sentence="two cannot be run: no data.")])
    with pytest.raises(Exception, match="two cannot be run: no data"):
        job.go()
    with workspace.write() as session:
        session.add(ended := session.get_one(Job, job.job.id))
        ended.status = "failed"
    job, orders = suite_job([], [], [])
    with pytest.raises(Exception, match="ended from outside 3 times, last with: killed"):
        job.go()
    assert len(orders) == 3
    assert "suite.run" not in {event.action for event in questions.audit(workspace)}


@needs_harness
def test_the_form_of_a_suite_makes_the_wish_that_its_widgets_say(line, folder):
    tab = Benchmarks(House(line.workspace, Parrot(line.workspace)))
    with gr.Blocks():
        tab.build()
    values = {name: widget.value for name, widget in tab.suite.widgets.items()}
    assert "needs a folder" in tab._ask_suite(*values.values())
    values |= {"folder": str(folder), "tasks": "one, two", "most_items": "3"}
    said = tab._ask_suite(*values.values())
    (job,) = questions.jobs(line.workspace, kind="suite")
    assert f"Job {job.id} runs one, two on v2" in said and job.wish["most_items"] == 3 and not job.wish["trust_code"]
    assert f"Job {job.id}" in tab._suites()
