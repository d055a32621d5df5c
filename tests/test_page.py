"""What the page and the routes promise: the port first, only this machine, sentences for errors, buttons that work."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.smallest import TASKS, make_rows

ROOT = Path(__file__).parent.parent
WAIT_S = 60
ROWS = "\n".join(
    json.dumps({"prompt": f"question {i} <b>{{{{value}}}}", "response": f"answer {i % 3}"}) for i in range(30)
)

SERVER = '''
import sys, time
from pathlib import Path
from clm_app.registry import versions
from clm_app.serving.chat import Piece
from clm_app.settings import Settings
from clm_app.workspace import Workspace
from ui.house import House
from ui.server import serve

home = Path(sys.argv[1])
workspace = Workspace(Settings(home=home / "work", base_model=str(home / "base")))


class Parrot:
    """Stands in for the router: says back what it heard, word by word."""

    def chat(self, version, messages, options):
        name = versions.by_name(workspace, version).name
        for count, word in enumerate(messages[-1]["content"].split(" "), 1):
            time.sleep(0.02)
            yield Piece(text=word + " ", completion_tokens=count, version=name)
        yield Piece(finish_reason="stop", version=name)

    def warm(self, version): ...
    def switch(self): ...


serve(House(workspace, Parrot()), port=0, on_stop=lambda: print("put away", flush=True),
      on_open=lambda address: print(address, flush=True))
'''  # fmt: skip


def make_base(folder: Path) -> None:
    """Write a model folder that can be registered, though not loaded."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    head = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(8))


class Running:
    """The app in a process of its own, over a temporary home."""

    def __init__(self, home: Path) -> None:
        make_base(home / "base")
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(home)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        self.address = self.process.stdout.readline().strip()
        self.client = httpx.Client(base_url=self.address, timeout=30)
        self.first_health = self.client.get("/api/health").json()
        self.answered_after_s = time.monotonic() - self.began
        self.first_page = self.client.get("/").text

    def wait_for_page(self) -> None:
        until = time.monotonic() + WAIT_S
        while not (health := self.client.get("/api/health").json())["page"]:
            assert not health["problem"], health["problem"]
            assert time.monotonic() < until, "the page did not become ready"
            time.sleep(0.1)

    def end(self) -> tuple[int, str]:
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        said, _ = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, said


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The app with its page ready."""
    running = Running(tmp_path_factory.mktemp("app"))
    running.wait_for_page()
    yield running
    if running.process.poll() is None:
        running.end()


def test_importing_the_server_imports_nothing_slow():
    code = "import sys, ui.server; print([m for m in ('gradio', 'torch', 'transformers', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_port_answers_before_the_page_is_built(app):
    assert app.first_health["status"] == "ok" and app.first_health["page"] is False
    assert app.first_health["live"] == "v0"
    assert "CLM is starting" in app.first_page
    assert "gradio" in app.client.get("/").text


def test_only_names_of_this_machine_are_answered(app):
    port = app.address.rsplit(":", 1)[1]
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[::"):
        refused = app.client.get("/api/health", headers={"host": host})
        assert refused.status_code in (400, 421), host
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}"):
        assert app.client.get("/api/health", headers={"host": host}).status_code == 200, host


def test_a_page_of_another_origin_changes_nothing(app):
    wish = {"stream": [{"name": "nothing"}]}
    foreign = ("http://evil.example", "null", "http://127.0.0.1:1", app.address.replace("127.0.0.1", "localhost"))
    for origin in foreign:
        for path in ("/api/learn", "/gradio_api/queue/join", "/v1/chat/completions"):
            refused = app.client.post(path, json=wish, headers={"origin": origin})
            assert refused.status_code == 403 and "error" in refused.json(), (origin, path)
    assert app.client.post("/api/learn", json=wish, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    own = app.client.post("/api/learn", json=wish, headers={"origin": app.address})
    assert own.status_code == 404 and "nothing" in own.json()["error"]


def test_the_page_offers_no_public_endpoint_and_no_outside_script(app):
    told = app.client.get("/gradio_api/info").json()
    assert told["named_endpoints"] == {} and told["unnamed_endpoints"] == {}
    assert app.client.get("/docs").status_code == 404
    assert "default-src 'self'" in app.client.get("/").headers["content-security-policy"]


def test_upload_errors_are_sentences_and_keep_nothing(app):
    cases = {
        ("One", "a.csv", "a,b\n1,2\n"): "columns",
        ("Two", "b.jsonl", ""): "no rows",
        ("Three/four", "c.jsonl", ROWS): "task name",
        ("Five", "d.exe", "MZ"): "d.exe",
    }
    for (name, file, content), expected in cases.items():
        refused = app.client.post("/api/tasks", data={"name": name}, files={"file": (file, content.encode())})
        sentence = refused.json()["error"]
        assert refused.status_code == 400 and expected in sentence and sentence.endswith("."), (name, sentence)
    assert not {"One", "Two", "Three/four", "Five"} & {t["name"] for t in app.client.get("/api/tasks").json()}
    assert "file" in app.client.post("/api/tasks", data={"name": "Six"}).json()["error"]
    assert "no route" in app.client.get("/api/nothing").json()["error"]


def test_a_task_a_job_and_its_end_over_the_api(app):
    added = app.client.post("/api/tasks", data={"name": "Over the API"}, files={"file": ("rows.jsonl", ROWS.encode())})
    assert added.status_code == 201 and added.json()["snapshot"]["report"]["rows"] == 30
    rows = app.client.get("/api/tasks/over the api/rows", params={"split": "test", "limit": 2}).json()
    assert len(rows) == 2 and rows[0]["prompt"].startswith("question")
    job = app.client.post("/api/learn", json={"stream": [{"name": "Over the API"}]}).json()
    kinds = []
    with app.client.stream("GET", f"/api/jobs/{job['id']}/events") as events:
        for line in events.iter_lines():
            if line.startswith("event: "):
                kinds.append(line.removeprefix("event: "))
                if len(kinds) == 1:
                    assert httpx.post(f"{app.address}/api/jobs/{job['id']}/cancel").json()["status"] == "cancelled"
    assert kinds == ["job", "end"]
    again = app.client.post(f"/api/jobs/{job['id']}/cancel")
    assert again.status_code == 400 and "cancelled already" in again.json()["error"]
    assert app.client.get("/api/jobs/999/events").status_code == 404


def test_going_live_needs_a_reason_and_another_version(app):
    assert app.client.post("/api/versions/v0/deploy", json={"reason": ""}).status_code == 422
    assert "live already" in app.client.post("/api/versions/v0/deploy", json={"reason": "again"}).json()["error"]
    assert app.client.post("/api/versions/v9/deploy", json={"reason": "x"}).status_code == 404
    assert app.client.get("/api/versions/live").json()["version"]["name"] == "v0"


def test_the_page_works_asks_no_outside_host_and_finds_its_job_again(app, browser):
    from playwright.sync_api import expect

    page, asked, problems = browser.new_page(viewport={"width": 1280, "height": 900}), set(), []
    page.on("request", lambda request: asked.add(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(app.address)
    expect(page.locator(".clm-header")).to_contain_text("live: v0", timeout=WAIT_S * 1000)

    page.get_by_role("tab", name="Data", exact=True).click()
    page.get_by_label("Task name").fill("Kept name")
    page.get_by_role("button", name="Keep as a task").click()
    expect(page.locator("#clm-data-answer")).to_contain_text("No file is chosen", timeout=15_000)
    expect(page.get_by_label("Task name")).to_have_value("Kept name")
    page.get_by_role("button", name="Add the built-in examples").click()
    expect(page.locator("#clm-data-answer")).to_contain_text("Added: Desk lamps", timeout=15_000)

    page.get_by_role("tab", name="Train", exact=True).click()
    page.get_by_label("Tasks, in the order").click()
    for name in ("E-bikes", "Desk lamps"):
        page.get_by_role("option", name=name).click()
    page.keyboard.press("Escape")
    expect(page.locator("#clm-about")).to_contain_text("Auto", timeout=15_000)
    expect(page.locator("#clm-also")).to_be_hidden()
    page.locator("#clm-strategy input").click()
    page.get_by_role("option", name="Replay (rehearse kept rows)").click()
    page.locator("#clm-also input").click()
    page.get_by_role("option", name="EWC").click()
    page.keyboard.press("Escape")
    expect(page.locator("#clm-about")).to_contain_text("Not yet measured here", timeout=15_000)
    page.get_by_label("Rows per task").locator("visible=true").fill("7")
    page.locator("#clm-start").click()
    expect(page.locator("#clm-train-answer")).to_contain_text("is asked for: E-bikes, Desk lamps", timeout=15_000)
    wish = app.client.get("/api/jobs").json()[0]["wish"]
    assert wish["strategy"] == "replay+ewc" and wish["strategy_settings"]["replay"]["rows_per_task"] == 7

    page.get_by_role("tab", name="Playground", exact=True).click()
    page.get_by_role("textbox", name="Message").fill(
        "say <img src=http://outside.example/x.png> ![](http://outside.example/y)"
    )
    page.keyboard.press("Enter")
    expect(page.locator(".clm-chat .clm-assistant").first).to_contain_text("<img src=http", timeout=15_000)
    expect(page.locator(".clm-chat .clm-assistant").first).to_contain_text("v0, 4 tokens", timeout=15_000)

    page.reload()  # the browser holds no truth: the rows do
    expect(page.locator("#clm-home")).to_contain_text("E-bikes", timeout=WAIT_S * 1000)
    expect(page.locator("#clm-home [role=progressbar]")).to_be_visible()
    outside = [u for u in asked if not u.startswith((app.address, "data:", "blob:"))]
    assert outside == [] and problems == []


def test_a_taken_port_is_refused_with_the_next_step():
    from clm_app.errors import BadSettings
    from ui.server import open_port

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(BadSettings, match=r"Port \d+ .* --port"):
            open_port(other.getsockname()[1])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
def test_sigterm_ends_the_app_and_what_it_holds_is_put_away(tmp_path):
    running = Running(tmp_path)
    assert running.end() == (0, "put away\n")


def test_a_knob_is_shown_with_its_bound_and_an_empty_one_means_not_given():
    from clm_app.engine.settings import TrainingSettings
    from ui.parts.forms import SettingsForm, meaning

    form = SettingsForm(TrainingSettings)
    fields = TrainingSettings.model_fields
    form.widgets = dict.fromkeys(("epochs", "learning_rate"))
    assert form.read([2, ""]) == {"epochs": 2, "learning_rate": None}
    assert meaning(fields["epochs"]).endswith("(above 0, at most 100)")


def test_the_matrix_is_said_alike_on_the_page_and_in_the_terminal():
    from rich.console import Console

    from clm_app.judging.matrix import Matrix
    from ui.cli import matrix_table
    from ui.parts.heat_map import heat_map

    matrix = Matrix(tasks=["a", "<b>"], versions=["v1", "v2"], values=[[1.0, None], [0.5, 0.8]])
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(matrix_table(matrix))
    text, html = console.export_text(), heat_map(matrix, "Kept", ["a", "<b>"])
    for said in ("65\N{NO-BREAK SPACE}%", "−50.0\N{NO-BREAK SPACE}points"):
        assert said in text and said in html
    assert "forgetting <strong>50.0\N{NO-BREAK SPACE}points" in html, "1.0 at best, 0.5 now"
    assert "&lt;b&gt;" in html and "<b>:" not in html


# --- strategies on the page ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chooser():
    """The choice of a strategy, built into a page of its own."""
    import gradio as gr

    from ui.parts.strategy_chooser import StrategyChooser

    made = StrategyChooser(None, "auto")
    with gr.Blocks():
        made.build_choice()
        made.build_forms()
    return made


def test_the_choice_of_a_strategy_is_the_shelf_with_the_default_first(chooser):
    from clm_app.catalog import shelf

    offered = [name for _, name in chooser.choice.choices]
    assert offered[0] == "auto" == chooser.choice.value and set(offered) == set(shelf("clm_app.strategies"))
    assert set(chooser.forms) == set(offered)


def test_what_only_holds_can_be_joined_and_what_decides_alone_cannot():
    from ui.parts.strategy_chooser import partners

    assert partners("auto") == partners("adapters") == []
    assert {"ewc", "l2sp", "si", "ema", "lwf"} <= set(partners("replay")) and "ewc" not in partners("ewc")
    assert not {"naive", "replay", "adapters", "auto"} & set(partners("ewc")), "these choose the rows, or do nothing"


def test_every_choice_with_the_defaults_of_its_form_is_a_wish_that_is_taken(chooser):
    from clm_app.wishes import LearnWish
    from ui.parts.strategy_chooser import partners

    values = [widget.value for form in chooser.forms.values() for widget in form.widgets.values()]
    for name in chooser.forms:
        for also in ([], *([other] for other in partners(name))):
            strategy, settings = chooser.read([name, also, *values])
            assert strategy == "+".join([name, *also])
            LearnWish(stream=[{"name": "a"}], strategy=strategy, strategy_settings=settings)
    assert chooser.read(["auto", ["ewc"], *values])[0] == "auto", "a partner that no longer goes with it is left out"


def test_the_cost_of_a_strategy_is_worked_out_from_the_runs_of_this_workspace(workspace):
    from clm_app.registry import versions
    from store.tables import Job, Measurement, Run, Snapshot, Task, Version
    from ui import questions
    from ui.parts.strategy_chooser import measured

    assert measured(questions.strategy_figures(workspace, "replay")) == "Not yet measured here."
    base = versions.base_version(workspace)
    # seconds and R of a job of two tasks, asked of auto, which chose replay: 30 s beside 10 s, 40 s beside 20 s
    tracks = {
        "main": ("replay", [30, 40], [[0.9, None], [0.8, 1.0]]),
        "naive": ("naive", [10, 20], [[0.9, None], [0.1, 1.0]]),
    }
    with workspace.write() as session:
        session.add(Job(kind="learn", wish={"strategy": "auto"}))
        for name in "ab":
            session.add(Task(name=name, key=name))
        session.flush()
        for i in (1, 2):
            session.add(Snapshot(task_id=i, object="x", train_rows=1, validation_rows=1, test_rows=1, source=""))
        session.flush()
        for track, (strategy, seconds, values) in tracks.items():
            for i in range(2):
                run = Run(job_id=1, track=track, position=i, task_id=i + 1, snapshot_id=i + 1, parent_version_id=base.id,
                          strategy=strategy, method="lora", seed=0, folder="", status="done",
                          figures={"seconds": seconds[i]}, settings={"why": "because" if track == "main" else ""})  # fmt: skip
                session.add(run)
                session.flush()
                made = Version(name=f"{track}{i}", track=track, run_id=run.id, parent_id=base.id, kind="full", base_path="",
                               base_digest="", strategy=strategy, settings=run.settings)  # fmt: skip
                session.add(made)
                session.flush()
                for j, value in enumerate(values[i][: i + 1]):
                    session.add(Measurement(version_id=made.id, task_id=j + 1, snapshot_id=j + 1, split="test",
                                            metric="exact_match", value=value, items=10, object="x"))  # fmt: skip
    found = questions.strategy_figures(workspace, "replay")
    assert (found["runs"], found["seconds"], found["times_naive"]) == (2, 35, 2.5)  # median of 30/10 and 40/20
    assert found["jobs"] == 1 and found["backward_transfer"] == pytest.approx(-0.1)
    assert questions.strategy_figures(workspace, "auto") == found, "auto is charged for what it chose"
    naive = questions.strategy_figures(workspace, "naive")
    assert naive["times_naive"] == 1.0 and naive["backward_transfer"] == pytest.approx(-0.8)
    assert questions.strategy_figures(workspace, "replay+ewc")["runs"] == 0
    assert measured(found).replace("\N{NO-BREAK SPACE}", " ") == (
        "Measured here: 35 s of training a run (median of 2 runs), 2.5 times what naive takes for the same task; "
        "backward transfer −10.0 points (mean of 1 job)."
    )
    assert questions.reasons(workspace, 1) == [{"strategy": "replay", "why": "because", "tasks": ["a", "b"]}]
    from ui.parts.version_card import version_card

    made = versions.by_name(workspace, "main1")
    assert "Auto chose replay. because" in version_card(workspace, made, 0)
    assert questions.counterpart(workspace, made) == "naive1" and questions.counterpart(workspace, base) is None


# --- rows: why they are kept, and taking one back ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def keeping(open_app, tmp_path_factory):
    """(app, key): two tasks learned with replay; the row of this key was withdrawn between them."""
    folder, app = tmp_path_factory.mktemp("rows"), open_app("keeping")
    for name in ("Colours", "Animals"):
        rows = [json.dumps(row) + "\n" for row in make_rows(64, TASKS[name])]
        (folder / f"{name}.jsonl").write_text("".join(rows))

    def learn(name: str) -> dict:
        return app.follow(app.learn(
            stream=[{"name": name, "path": str(folder / f"{name}.jsonl")}], strategy="replay", method="full",
            strategy_settings={"rows_per_task": 10}, gate={"least_items": 1, "alpha": 0.3, "margin_points": 100},
            training={"epochs": 10, "least_steps": 1, "batch_rows": 8, "learning_rate": 5e-3, "prompt_dropout": 0.0},
        )["id"])  # fmt: skip

    assert learn("Colours")["result"]["accepted"] == ["v1"]
    key = app.get("/api/versions/v1/kept")[0]["rows"][3]["key"]
    assert app.client.post("/api/rows/withdraw", json={"key": key, "reason": " "}).status_code == 400
    done = app.client.post("/api/rows/withdraw", json={"key": key, "reason": "the customer asked for it"})
    assert done.status_code == 201, done.text
    learn("Animals")
    return app, key


def test_a_kept_row_says_why_it_was_kept(keeping):
    app, _ = keeping
    (colours,) = app.get("/api/versions/v1/kept")
    assert (colours["task"], colours["strategy"]) == ("Colours", "replay") and colours["budget"]["rows_per_task"] == 10
    assert len(colours["rows"]) == 10
    trained = [row["label"] for row in app.get("/api/tasks/Colours/rows")]
    for row in colours["rows"]:
        mine = sum(other["label"] == row["label"] for other in colours["rows"])
        assert mine in (2, 3), "ten rows of four answers"
        assert row["why"] == (
            f"kept by replay: 1 of {mine} rows of this answer, drawn from {trained.count(row['label'])} with seed 0"
        )


def test_a_withdrawn_row_is_in_no_later_order_and_every_other_one_is(keeping):
    app, key = keeping
    order = json.loads((app.home / "runs" / "2" / "order.json").read_text())
    (file,) = order["kept"].values()
    kept = [json.loads(line) for line in Path(file).read_text().splitlines()]
    before = app.get("/api/versions/v1/kept")[0]["rows"]
    assert Path(file).is_relative_to(app.home / "runs" / "2"), "what is stored is never changed"
    assert [row["prompt"] for row in kept] == [row["prompt"] for row in before if row["key"] != key] and len(kept) == 9
    started = (app.home / "runs" / "2" / "events.jsonl").read_text()
    assert '"rehearsed"' in started and [row["key"] for row in before if row["withdrawn"]] == [key]


def test_a_row_is_withdrawn_once_with_a_reason_and_the_audit_trail_has_it(keeping):
    app, key = keeping
    (event,) = [e for e in app.get("/api/audit?limit=1000") if e["action"] == "row.withdrawn"]
    assert event["subject"] == f"row:{key}" and event["detail"]["reason"] == "the customer asked for it"
    again = app.client.post("/api/rows/withdraw", json={"key": key.upper(), "reason": "again"})
    assert again.status_code == 400 and "was withdrawn already, by local: the customer" in again.json()["error"]
    unknown = app.client.post("/api/rows/withdraw", json={"key": "0" * 12, "reason": "x"})
    assert unknown.status_code == 404 and "No task has a training row" in unknown.json()["error"]
    assert app.client.post("/api/rows/withdraw", json={"key": key}).status_code == 422


def test_two_versions_are_compared_row_by_row(keeping):
    from ui.parts.with_without import with_without

    app, _ = keeping
    told = app.get("/api/compare?before=v0&after=v1")
    colours, animals = told["tasks"]  # v1 was measured on Animals before v2 learned it, and so was the base
    assert (colours["task"], animals["task"]) == ("Colours", "Animals") and colours["after"] > colours["before"]
    assert animals["lost"] == animals["gained"] == 0, "neither has learned it"
    flips = told["flips"]
    assert len(flips) == colours["lost"] + colours["gained"] and flips
    assert colours["change_points"] == pytest.approx(100 * (colours["gained"] - colours["lost"]) / colours["items"])
    tested = {row["prompt"]: row["response"] for row in app.get("/api/tasks/Colours/rows?split=test")}
    assert all(tested[flip["prompt"]] == flip["response"] for flip in flips)
    html = with_without(told)
    assert flips[0]["prompt"] in html and f"{colours['gained']:,} gained" in html
    back = app.get("/api/compare?before=v1&after=v0")
    assert [f["kind"] for f in back["flips"]] == ["lost"] * colours["gained"] + ["gained"] * colours["lost"]
    rise = [f["loss_after"] - f["loss_before"] for f in back["flips"][: colours["gained"]]]
    assert rise == sorted(rise, reverse=True), "the worst first"
    assert "compared with itself" in app.client.get("/api/compare?before=v1&after=v1").json()["error"]
