"""A candidate before the gate, through the public door: repaired before refusal, held to benchmarks, bound to its evidence."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from clm_app.judging.gate import GateSettings, Pair, judge
from jobs import judgement
from jobs.judgement import Judgement
from tests.smallest import TASKS, make_rows

KNOBS = {"epochs": 12, "least_steps": 1, "batch_rows": 8, "learning_rate": 5e-3, "prompt_dropout": 0.0}
GATE = {"least_items": 10, "margin_points": 45}
WISH = {"training": KNOBS, "gate": GATE, "method": "full", "strategy": "naive"}


@pytest.fixture(scope="module")
def judged(open_app, tmp_path_factory):
    """(app, {job: its story}): one task learned, a benchmark of it frozen, then a second one without protection, twice."""
    folder, app = tmp_path_factory.mktemp("rows"), open_app("judged")
    files = {}
    for name in ("Colours", "Animals"):
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in make_rows(128, TASKS[name])))

    def learn(name: str, **more) -> dict:
        return app.follow(app.learn(stream=[{"name": name, "path": str(files[name])}], **WISH | more)["id"])

    stories = {"first": learn("Colours", check_served=True)}
    made = app.client.post(
        "/api/benchmarks", data={"kind": "exact_match", "task": "Colours", "name": "Colours as asked"}
    )
    assert made.status_code == 201, made.text
    stories["unrepaired"] = learn("Animals", repair={"enabled": False})
    stories["repaired"] = learn("Animals", benchmarks=["Colours as asked"])
    return app, stories


def test_what_hurts_an_old_task_is_refused_where_no_repair_may_be_tried(judged):
    app, stories = judged
    (decision,) = stories["unrepaired"]["decisions"]
    assert decision["verdict"] == "hold" and decision["sentence"].endswith("; no repair was tried.")
    assert "it learned Animals" in decision["sentence"] and "it forgets Colours" in decision["sentence"]
    assert stories["unrepaired"]["result"]["refused"] == ["v2"]


def test_the_same_update_is_repaired_first_and_promoted_with_its_certificate(judged):
    app, stories = judged
    first, last = stories["repaired"]["decisions"]
    assert (first["verdict"], last["verdict"]) == ("repair", "promote"), last["sentence"]
    assert (
        first["sentence"].startswith("Needs repair: it learned Animals")
        and "; it was repaired first, by " in last["sentence"]
    )
    repair = last["evidence"]["repair"]
    assert repair["passed"] and repair["rung"] == repair["tried"][-1]["rung"] and repair["certificate"]["bounds"]
    assert last["evidence"]["looks"] > 1, "the second look at the same items has its price"
    assert app.get("/api/health")["live"] == stories["repaired"]["result"]["accepted"][0] == "v3"


def test_a_repaired_candidate_is_held_to_the_benchmark_as_it_is_served(judged):
    app, stories = judged
    lines = {line["task"]: line for line in stories["repaired"]["decisions"][-1]["evidence"]["old"]}
    asked = lines["Colours as asked@1"]
    assert asked["status"] == "kept" and asked["bound_to"]["benchmark"] and asked["items"] >= 10
    readings = app.get("/api/benchmarks/Colours as asked/readings")
    assert {r["version"] for r in readings} == {"v1", "v3"} and {r["on"] for r in readings} == {"served"}


def test_every_decision_comes_out_the_same_when_it_is_derived_again(judged):
    app, stories = judged
    for decision in [d for story in stories.values() for d in story["decisions"]]:
        again = app.get(f"/api/decisions/{decision['id']}/derived")
        assert again["same"], again["sentence"]
        told = decision["evidence"]
        assert told["weights"]["after"]["object"] and told["code"] and told["noise"]["items"] >= 10
        assert all(line["bound_to"]["after"] for line in (told["new"], *told["old"]))
    gone = app.client.get("/api/decisions/999/derived")
    assert gone.status_code == 404 and "There is no decision 999" in gone.text


def test_evidence_that_was_changed_no_longer_comes_out_the_same(judged, workspace):
    from clm_app.judging.decisions import derived
    from clm_app.settings import Settings
    from clm_app.workspace import Workspace
    from store.tables import Decision

    app, _ = judged
    other = Workspace(Settings(home=app.home), lock=False)
    with other.read() as session:
        row = session.get_one(Decision, 1)
    row.evidence = row.evidence | {"gate": {"verdict": "promote", "sentence": "Promoted: trust me."}}
    assert derived(other, 1).is_same, "as stored it is true"
    told = SimpleNamespace(**row.model_dump())
    fake = SimpleNamespace(read=lambda: _session(told), objects=other.objects)
    assert not derived(fake, 1).is_same
    other.close()


class _session:
    """Stands for a session that finds one row."""

    def __init__(self, row) -> None:
        self.row = row

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def get(self, *_):
        return self.row


def test_the_first_version_was_compared_as_it_is_served(judged):
    app, stories = judged
    (decision,) = stories["first"]["decisions"]
    (reading,) = app.get("/api/versions/v1/parity")
    assert reading["verdict"] == "same" and decision["evidence"]["served"] == reading["sentence"]


@pytest.mark.parametrize("damage", ["weights", "served"])
def test_a_candidate_that_passed_is_refused_where_its_weights_or_what_is_served_are_not_what_was_measured(
    monkeypatch, damage
):
    from clm_app.errors import BadModel

    def damaged(*_):
        raise BadModel("The weights of v1 are not what was stored: files were changed.")

    differs = SimpleNamespace(verdict="differs", sentence="v1 does not answer as it was trained. BOS twice.",
                              evidence={"cause": "bos_twice"})  # fmt: skip
    monkeypatch.setattr(judgement, "refuse_damage", damaged if damage == "weights" else lambda *_: None)
    monkeypatch.setattr(judgement.parity, "check", lambda *_: differs)
    asked = Judgement.__new__(Judgement)
    asked.workspace, asked.version, asked.spawn, asked.beat = None, None, None, lambda stage: None
    asked.wish = SimpleNamespace(check_served=True)
    passed = judge(Pair(task="Bikes", before=[0] * 40, after=[1] * 40), [], GateSettings())
    found = asked.blocked(passed)
    assert found.verdict == "hold" and found.evidence["blocked"] == found.sentence
    assert [one["cause"] for one in found.evidence["causes"]] == [
        "bos_twice" if damage == "served" else "weights_damaged"
    ]
    assert ("BOS twice" if damage == "served" else "are not what was stored") in found.sentence
    asked.wish = SimpleNamespace(check_served=False)
    assert asked.blocked(passed).verdict == ("hold" if damage == "weights" else "promote")
