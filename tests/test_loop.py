"""The whole loop through the public door: learn, judge, deploy, serve; be killed at any moment, and reach out to nobody.

The app is the real one in a process of its own, and so are its children; only the model is the smallest true one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from clm_app.data import streams
from clm_app.data.rows import load
from clm_app.settings import Settings
from tests.smallest import TASKS, App, make_rows

pytestmark = pytest.mark.timeout(1200)  # a fixture here holds many starts of children

GUARD = '''
import os, socket
from pathlib import Path

place = Path(os.environ["GUARD"])
(place / f"process-{os.getpid()}").touch()

def is_here(host):
    name = host.decode() if isinstance(host, bytes) else host
    return name in (None, "", "localhost", "0.0.0.0", "::", "::1") or str(name).startswith("127.")

def guarded(real, find):
    def call(*arguments, **named):
        host = find(*arguments)
        if not is_here(host):
            with open(place / "outside.txt", "a") as out:
                out.write(f"{os.getpid()} {real.__name__} {host}\\n")
            raise OSError(f"the guard lets nobody out to {host}")
        return real(*arguments, **named)
    return call

def peer(sock, *rest):
    return rest[-1][0] if sock.family in (socket.AF_INET, socket.AF_INET6) and isinstance(rest[-1], tuple) else None

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, guarded(getattr(socket.socket, name), peer))
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    setattr(socket, name, guarded(getattr(socket, name), lambda host=None, *rest: host))
'''  # fmt: skip
KNOBS = {"epochs": 20, "least_steps": 1, "batch_rows": 8, "learning_rate": 5e-3, "prompt_dropout": 0.0, "seed": 0}
WISH = {
    "strategy": "replay", "strategy_settings": {"share": 0.5, "rows_per_task": 40}, "method": "lora",
    "method_settings": {"rank": 32, "alpha": 64, "dropout": 0.02}, "gate": {"least_items": 10, "margin_points": 50},
}  # fmt: skip


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> Path:
    """A folder that every process of the app loads a guard from; what it lets nobody do is written down there."""
    place = tmp_path_factory.mktemp("guard")
    (place / "sitecustomize.py").write_text(GUARD)
    return place


@pytest.fixture(scope="module")
def guarded_app(guard, open_app):
    """Return a function that starts the app under the guard."""
    return lambda name: open_app(name, PYTHONPATH=str(guard), GUARD=str(guard))


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> list[dict[str, str]]:
    """Three tasks, each with a file of rows that a model of two layers can learn."""
    folder, found = tmp_path_factory.mktemp("stream"), []
    for name, labels in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in make_rows(96, labels)))
        found.append({"name": name, "path": str(file)})
    return found


@pytest.fixture(scope="module")
def taught(guarded_app, stream):
    """(app, story of the job) after the stream was learned, beside a naive run."""
    app = guarded_app("taught")
    job = app.learn(stream=stream, training=KNOBS, compare_naive=True, **WISH)
    return app, app.follow(job["id"])


def children_of(app: App, module: str = "clm_app.engine.child") -> list[psutil.Process]:
    found = []
    for child in psutil.Process(app.process.pid).children(recursive=True):
        try:
            found += [child] if module in child.cmdline() else []
        except psutil.NoSuchProcess:
            continue
    return found


def said(home: Path, kind: str, run: int = 1) -> list[dict]:
    """Return the events of a kind that a run's children have said."""
    file = home / "runs" / str(run) / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in events if event["kind"] == kind]


# --- learned ---------------------------------------------------------------------------------------------------------


def test_three_tasks_are_learned_one_after_the_other_and_the_old_ones_are_kept(taught):
    _, story = taught
    assert story["status"] == "done" and story["error"] is None and story["done_share"] == 1.0
    main = story["matrices"]["main"]
    assert main["tasks"] == list(TASKS) and main["versions"] == ["v1", "v2", "v3"]
    assert all(main["values"][i][j] is not None for i in range(3) for j in range(i + 1)), (
        "each old task is measured again"
    )
    assert main["values"][0][1] < 0.5 and main["values"][1][2] < 0.5, "and the next one before it is learned"
    assert main["average_accuracy"] >= 0.9 and main["backward_transfer"] > -0.1


def test_without_protection_the_same_stream_is_forgotten(taught):
    _, story = taught
    main, naive = story["matrices"]["main"], story["matrices"]["naive"]
    assert naive["versions"] == ["naive-1-1", "naive-1-2", "naive-1-3"]
    assert naive["backward_transfer"] < -0.4 and naive["average_accuracy"] < main["average_accuracy"] - 0.2
    assert naive["values"][0][0] >= 0.9, "each task was learned when it was new"


def test_the_gate_promoted_each_version_and_it_went_live(taught):
    app, story = taught
    assert [(d["version"], d["verdict"], d["against"]) for d in story["decisions"]] == [
        ("v1", "promote", "v0"), ("v2", "promote", "v1"), ("v3", "promote", "v2")]  # fmt: skip
    for task, decision in zip(TASKS, story["decisions"], strict=True):
        assert decision["sentence"].startswith(f"Promoted: it learned {task} (") and decision["sentence"].endswith(".")
    moves = app.get("/api/deployments")
    assert [(m["version"], m["previous"], m["actor"]) for m in reversed(moves)] == [
        ("v0", None, "system"), ("v1", "v0", "gate"), ("v2", "v1", "gate"), ("v3", "v2", "gate")]  # fmt: skip
    assert [m["reason"] for m in reversed(moves)][1:] == [d["sentence"] for d in story["decisions"]]


def test_a_versions_card_leads_back_to_everything_it_was_made_from(taught, stream):
    app, story = taught
    card = app.get("/api/versions/v2")
    version, run = card["version"], card["run"]
    assert (card["parent"], card["task"], version["kind"], version["state"]) == ("v1", "Animals", "adapter", "accepted")
    assert run["job_id"] == story["id"] and run["settings"]["training"]["epochs"] == KNOBS["epochs"]
    assert (
        run["settings"]["strategy"] == WISH["strategy_settings"]
        and run["settings"]["method"] == WISH["method_settings"]
    )
    assert run["code_version"].startswith("0.") and run["libraries"]["torch"] and run["hardware"]["cores"]
    assert (version["seed"], version["strategy"], version["method"]) == (0, "replay", "lora")
    assert card["snapshot"]["source"] == stream[1]["path"] and card["snapshot"]["train_rows"] > 0
    tested = {m["task"]: m for m in card["measurements"] if m["metric"] == "exact_match" and m["split"] == "test"}
    assert tested.keys() == set(TASKS) and tested["Animals"]["items"] == card["snapshot"]["test_rows"]
    assert {m["metric"] for m in card["measurements"]} == {"exact_match", "answer_loss"}
    assert [d["verdict"] for d in card["decisions"]] == ["promote"] and len(card["deployments"]) == 1
    assert [a["action"] for a in card["audit"]] == ["version.registered", "version.accepted", "version.deployed"]
    objects = app.home / "objects"
    for digest in (
        version["object"],
        card["snapshot"]["object"],
        tested["Animals"]["object"],
        *version["memory"].values(),
    ):
        assert (objects / digest[:2] / digest).exists()
    assert run["rehearsed"] == {"1": pytest.approx(card["snapshot"]["train_rows"], abs=1)}, "half of the mix"


def test_only_training_rows_are_ever_rehearsed(taught):
    app, _ = taught
    objects, cards = app.home / "objects", {name: app.get(f"/api/versions/{name}") for name in ("v1", "v2", "v3")}
    snapshots = {str(card["snapshot"]["id"]): card["snapshot"]["object"] for card in cards.values()}
    kept_of = cards["v3"]["version"]["memory"]
    assert kept_of.keys() == snapshots.keys()
    for snapshot, kept in kept_of.items():
        folder = objects / snapshots[snapshot][:2] / snapshots[snapshot]
        parts = {
            part: {row.prompt for row in load(folder / f"{part}.jsonl")} for part in ("train", "validation", "test")
        }
        rows = load(objects / kept[:2] / kept)
        assert len(rows) == 40 and {row.prompt for row in rows} <= parts["train"]
        assert not {row.prompt for row in rows} & (parts["validation"] | parts["test"])
        assert {
            label: sum(row.label == label for row in rows) for label in {row.label for row in rows}
        } == dict.fromkeys({row.label for row in rows}, 10)


def test_everything_that_happened_is_in_the_audit_trail_in_one_unbroken_chain(taught):
    app, _ = taught
    events = list(reversed(app.get("/api/audit?limit=10000")))
    assert [e["previous"] for e in events] == ["", *(e["seal"] for e in events[:-1])]
    actions = [e["action"] for e in events]
    counts = {"job.asked": 1, "job.claimed": 1, "job.done": 1, "task.created": 3, "snapshot.taken": 3, "run.opened": 6,
              "version.registered": 7, "version.accepted": 3, "version.deployed": 4}  # fmt: skip
    assert {action: actions.count(action) for action in counts} == counts


def test_people_talk_to_the_live_version_as_its_reply_is_made(taught):
    app, _ = taught
    right = 0
    for word, expected in (("red", "stop here"), ("owl", "says hoot"), ("pen", "writes text")):
        asked = [{"role": "user", "content": f"now {word} now now"}]
        body = {"model": "live", "stream": True, "messages": asked}
        with app.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200 and answer.headers["x-clm-version"] == "v3"
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
        assert choices[-1]["finish_reason"] == "stop"
        right += "".join(choice["delta"].get("content") or "" for choice in choices) == expected
    assert right >= 2, "the model that was measured is the model that answers"


# --- refused, cancelled ----------------------------------------------------------------------------------------------


def test_a_bad_update_is_refused_in_one_sentence_and_the_live_version_stays(taught, stream, tmp_path):
    app, _ = taught
    streams.write_shuffled(Path(stream[0]["path"]), tmp_path / "bad.jsonl", Settings())
    text = (tmp_path / "bad.jsonl").read_text()
    for word in TASKS["Colours"]:
        text = text.replace(f" {word} ", f" {word * 2} ")  # another task, so that all three earlier ones are old
    (tmp_path / "bad.jsonl").write_text(text)
    bad = [{"name": "Bad update", "path": str(tmp_path / "bad.jsonl")}]
    job = app.learn(stream=bad, training=KNOBS | {"learning_rate": 0.2, "epochs": 4}, **WISH)
    story = app.follow(job["id"])
    assert story["status"] == "done" and story["result"] == {"accepted": [], "refused": ["v4"], "comparison": []}
    (decision,) = story["decisions"]
    assert decision["verdict"] == "hold" and decision["sentence"].startswith("Refused: it forgets ")
    assert decision["sentence"].count(". ") == 0 and " % before, " in decision["sentence"]
    assert app.get("/api/health")["live"] == "v3" and app.get("/api/versions/v4")["version"]["state"] == "refused"
    assert len(app.get("/api/deployments")) == 4


def test_a_refused_task_of_the_stream_is_measured_with_every_later_version(taught, stream, tmp_path):
    app, _ = taught
    rows = [{"prompt": f"number {i}", "response": str(i * 7919 % 1000)} for i in range(100)]  # nothing to learn in it
    (tmp_path / "noise.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    noise = {"name": "Noise", "path": str(tmp_path / "noise.jsonl")}
    job = app.learn(
        stream=[noise, stream[1]], training=KNOBS | {"epochs": 10}, start_from="v0", **WISH | {"deploy": False}
    )
    story = app.follow(job["id"])
    assert [d["verdict"] for d in story["decisions"]] == ["hold", "promote"], story["decisions"]
    assert None not in story["matrices"]["main"]["values"][1], "what was refused counts, or the average would flatter"
    assert len(app.get("/api/deployments")) == 4, "deploy was not asked for"


def test_a_job_is_cancelled_before_it_begins_or_while_it_trains_and_leaves_no_child(taught, stream):
    app, _ = taught
    long = KNOBS | {"epochs": 100}
    running = app.learn(stream=stream[:1], training=long, start_from="v0", **WISH)
    asked = app.learn(stream=stream[1:2], training=long, start_from="v0", **WISH)
    cancelled = app.client.post(f"/api/jobs/{asked['id']}/cancel").json()
    assert (cancelled["status"], cancelled["stage"]) == ("cancelled", "cancelled before it began")
    app.until(lambda: any(run["progress"] for run in app.get(f"/api/jobs/{running['id']}")["runs"]))
    assert len(children_of(app)) == 1
    app.client.post(f"/api/jobs/{running['id']}/cancel").raise_for_status()
    story = app.follow(running["id"])
    assert (story["status"], [run["status"] for run in story["runs"]]) == ("cancelled", ["cancelled"])
    assert story["decisions"] == [] and app.get("/api/health")["live"] == "v3" and children_of(app) == []
    assert app.client.post(f"/api/jobs/{running['id']}/cancel").status_code == 400
    assert app.get(f"/api/jobs/{asked['id']}")["runs"] == []


def test_a_wish_that_cannot_be_done_is_refused_at_once_and_not_written_down(taught, stream):
    app, _ = taught
    before = len(app.get("/api/jobs"))
    for wish, status, sentence in (
        ({"stream": []}, 422, "stream is []"),
        ({"stream": stream[:1], "training": {"epochs": 0}}, 422, "training.epochs is 0"),
        ({"stream": stream[:1], "strategy": "abacus"}, 400, "'abacus' is not among the strategies"),
        ({"stream": stream[:1], "start_from": "v99"}, 404, "There is no version 'v99'"),
        ({"stream": [{"name": "x", "path": "/nowhere.jsonl"}]}, 400, "/nowhere.jsonl cannot be read"),
        ({"stream": stream[:1], "abacus": 1}, 422, "abacus is 1"),
    ):
        answer = app.client.post("/api/learn", json=wish)
        assert answer.status_code == status and sentence in answer.json()["error"], answer.text
    assert len(app.get("/api/jobs")) == before


# --- killed ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(guarded_app, stream):
    """What was seen of a run whose child was killed, then the app with its next child, and that was then let finish."""
    app = guarded_app("interrupted")
    home, seen = app.home, SimpleNamespace(app=app)
    asked = app.learn(stream=stream[:1], training=KNOBS | {"checkpoint_every_s": 0.1}, **WISH)

    app.until(lambda: said(home, "checkpointed"))
    (child,) = children_of(app)
    os.kill(child.pid, signal.SIGKILL)
    app.until(lambda: len(said(home, "started")) == 2)
    first = said(home, "started")[1]["step"]
    app.until(lambda: said(home, "checkpointed")[-1]["step"] > first)
    seen.before = app.get(f"/api/jobs/{asked['id']}")
    (child,) = children_of(app)
    app.kill()
    seen.child, killed_at = child, time.monotonic()
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < killed_at + 20:
        time.sleep(0.02)
    seen.orphan_s = time.monotonic() - killed_at

    seen.committed = max(int(p.name[5:]) for p in (home / "runs" / "1" / "checkpoints").glob("step-*"))
    app.start()
    seen.at_once = app.get(f"/api/jobs/{asked['id']}")
    seen.after = app.follow(asked["id"])
    seen.started = said(home, "started")
    return seen


def test_a_run_whose_child_is_killed_goes_on_from_its_checkpoint(interrupted):
    first, second, _ = interrupted.started
    assert first["step"] == 0 < second["step"] < second["of"]
    assert interrupted.before["status"] == "running" and interrupted.before["runs"][0]["attempt"] == 2


def test_no_child_trains_on_after_the_app_was_killed(interrupted):
    assert not interrupted.child.is_running() or interrupted.child.status() == psutil.STATUS_ZOMBIE
    assert interrupted.orphan_s < 10


def test_after_a_restart_the_same_job_is_found_again_and_goes_on_from_the_last_checkpoint(interrupted):
    before, at_once, after = interrupted.before, interrupted.at_once, interrupted.after
    for field in ("id", "wish", "created_at", "started_at", "asked_by"):
        assert before[field] == at_once[field] == after[field]
    assert at_once["status"] in ("claimed", "running") and at_once["runs"][0]["id"] == before["runs"][0]["id"]
    assert after["status"] == "done" and len(after["runs"]) == 1 and after["attempts"] == 2
    assert interrupted.started[2]["step"] == interrupted.committed > interrupted.started[1]["step"]
    actions = [e["action"] for e in reversed(interrupted.app.get("/api/audit?limit=1000"))]
    assert (
        actions.count("job.claimed") == actions.count("job.taken_over") == actions.count("version.registered") - 1 == 1
    )


def test_a_killed_run_ends_with_the_weights_of_one_that_nobody_touched(interrupted, taught):
    killed = interrupted.app.get("/api/versions/v1")["version"]
    whole = taught[0].get("/api/versions/v1")["version"]
    alone = taught[0].get("/api/versions/naive-1-1")["version"]
    assert killed["object"] == whole["object"], "made in another home, killed twice"
    assert alone["object"] == whole["object"], "the first task has nothing to rehearse, so both tracks learn the same"
    curve = {e["step"]: e["loss"] for e in said(interrupted.app.home, "progress")}
    assert max(curve) == interrupted.started[0]["of"]


def test_the_curve_of_a_killed_run_has_each_step_once(interrupted):
    from store.series.progress import curve

    steps = [row["step"] for row in curve(interrupted.app.home / "runs" / "1" / "events.jsonl")]
    assert steps == sorted(set(steps)) and steps


# --- nobody is contacted ---------------------------------------------------------------------------------------------


def test_the_guard_sees_who_reaches_out(guard, tmp_path):
    shutil.copy(guard / "sitecustomize.py", tmp_path)
    code = (
        "import socket, urllib.request\n"
        "for reach in (lambda: socket.create_connection(('192.0.2.1', 80), 1), lambda: socket.getaddrinfo('example.org', 80),\n"
        "              lambda: urllib.request.urlopen('http://192.0.2.1', timeout=1)):\n"
        "    try: reach()\n"
        "    except OSError: pass\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "GUARD": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert len((tmp_path / "outside.txt").read_text().splitlines()) == 3


def test_no_outside_host_was_contacted_by_any_process(taught, interrupted, guard):
    outside = guard / "outside.txt"
    assert not outside.exists(), outside.read_text()
    assert len(list(guard.glob("process-*"))) >= 3 + 6 + 3, (
        "the apps, their training children and hosts were all guarded"
    )
