"""What a run needs and is not there: refused with what to do, where it is asked for and again before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file
from sqlmodel import select

from clm_app import situations
from clm_app.data.ingest import rows_of, snapshot
from clm_app.data.rows import Row, dump
from clm_app.data.template import load_tokenizer
from clm_app.data.vocabulary import vocabulary
from clm_app.data.withdrawal import withdraw
from clm_app.engine import memory
from clm_app.errors import BadData, BadModel, BadSettings
from clm_app.registry import versions
from clm_app.routes import Router
from clm_app.strategies._combined import made, part_of
from clm_app.wishes import LearnWish, ask
from store.tables import Job, Run, Version
from tests.smallest import TASKS, make_rows

NEEDS_ROWS = ("replay", "herding", "forgotten", "der", "joint", "replay+ewc")


@pytest.fixture
def learned(workspace, rows_file, tmp_path):
    """Return a function that writes down v1, which has learned tasks: {task: how many of its rows it keeps}."""

    def make(kind: str = "adapter", vocabulary: str = "", parameters: int = 1000, **tasks: int) -> Version:
        parent = versions.base_version(workspace)
        weights = tmp_path / "weights"
        weights.mkdir()
        save_file({"a": np.arange(64, dtype=np.float32)}, weights / "adapter_model.safetensors")
        kept = {}
        for position, (name, count) in enumerate(tasks.items()):
            taken = snapshot(workspace, name, rows_file(40, TASKS[name], f"{name}.jsonl"), "local")
            if count:
                dump(rows_of(workspace, taken, "train")[:count], tmp_path / f"{name}.kept")
                kept[str(taken.id)] = workspace.objects.put(tmp_path / f"{name}.kept")
            with workspace.write() as session:
                job = Job(kind="learn", status="done")
                session.add(job)
                session.flush()
                run = Run(job_id=job.id, position=0, task_id=taken.task_id, snapshot_id=taken.id, folder="", strategy="",
                          parent_version_id=parent.id, method="", seed=0, figures={"vocabulary": vocabulary})  # fmt: skip
                session.add(run)
                session.flush()
                parent = Version(name=f"v{position + 1}", kind=kind, run_id=run.id, parent_id=parent.id, memory=dict(kept),
                                 base_path=parent.base_path, base_digest=parent.base_digest, parameters=parameters,
                                 object=workspace.objects.put(weights))  # fmt: skip
                session.add(parent)
                session.flush()
        return parent

    return make


@pytest.fixture
def asked(workspace, rows_file):
    """Return a function that asks for a task over a version; it returns the job, or the sentence of its refusal."""

    def do(start_from: Version, task: str = "Tools", **wish) -> Job | str:
        stream = [{"name": task, "path": str(rows_file(40, TASKS[task], "asked.jsonl"))}]
        with workspace.read() as session:
            before = len(session.exec(select(Job)).all())
        try:
            return ask(workspace, LearnWish(stream=stream, start_from=start_from.name, **wish), "local")
        except (BadData, BadModel, BadSettings) as error:
            with workspace.read() as session:
                assert len(session.exec(select(Job)).all()) == before, "nothing is kept of a refused wish"
            return str(error)

    return do


# --- old rows --------------------------------------------------------------------------------------------------------


def test_every_strategy_that_rehearses_is_refused_where_no_row_of_any_past_task_is_kept(learned, asked):
    version = learned(Colours=0, Animals=0)
    for strategy in NEEDS_ROWS:
        assert part_of(strategy).needs_old_rows
        told = asked(version, strategy=strategy)
        assert "of Colours and Animals, which v2 has learned, none are kept" in told, strategy
        assert "Choose strategy auto" in told and "start from another version" in told and "as a task" in told
    assert asked(version, strategy="auto").status == "asked", "auto takes what needs no rows"


def test_a_task_that_comes_again_needs_no_rows_kept_of_itself(learned, asked):
    assert asked(learned(Tools=0), strategy="replay").status == "asked"


def test_rows_that_were_all_withdrawn_are_as_good_as_never_kept(learned, asked, workspace):
    version = learned(Colours=2)
    with workspace.read() as session:
        (taken, _), *_ = versions.lineage(session, version)
    first, second = rows_of(workspace, taken, "train")[:2]
    withdraw(workspace, first.key, "asked for", "local")
    assert asked(version, strategy="replay").status == "asked", "one is left"
    withdraw(workspace, second.key, "asked for", "local")
    assert "of Colours, which v1 has learned, none are kept" in asked(version, strategy="replay")


def test_where_some_tasks_keep_rows_the_card_says_which_are_not_protected(
    learned, asked, order_for, train, tmp_path, workspace
):
    assert asked(learned(Colours=4, Animals=0), strategy="replay").status == "asked"
    dump([Row(**row) for row in make_rows(4, TASKS["Animals"])], tmp_path / "kept.jsonl")
    how = {"learned": ["Colours", "Animals"], "kept": {"3": tmp_path / "kept.jsonl"}, "kept_tasks": {"3": "Animals"}}
    for strategy, at in (("replay", []), ("forgotten", []), ("replay+ewc", ["replay"])):
        figures = train(order_for(strategy.replace("+", "-"), strategy=strategy, **how)).trained.figures["strategy"]
        for part in at:
            figures = figures[part]
        assert figures["not_protected"] == ["Colours"], strategy
    assert "not_protected" not in train(order_for("naive", **how)).trained.figures["strategy"], (
        "it protects nothing anyway"
    )


@pytest.mark.parametrize("strategy", NEEDS_ROWS)
def test_an_order_without_kept_rows_is_refused_before_anything_is_loaded(strategy, order_for, tmp_path):
    order = order_for(strategy=strategy, learned=["Colours"], task="Animals", base=tmp_path / "no model here")
    with pytest.raises(BadSettings, match=r"of Colours, which .* none are kept"):
        made(strategy, {}, 0).refuse(order)


def test_rows_that_are_gone_are_refused_with_the_file_to_put_back(learned, asked, workspace, order_for, tmp_path):
    version = learned(Colours=4)
    place = workspace.objects.path(next(iter(version.memory.values())))
    place.rename(tmp_path / "away")
    told = asked(version, strategy="replay")
    assert "The rows that v1 keeps of Colours are gone" in told and place.name[:12] in told and "backup" in told
    (tmp_path / "away").rename(place)
    with workspace.read() as session:
        (taken, _), *_ = versions.lineage(session, version)
    workspace.objects.path(taken.object).rename(tmp_path / "rows")
    assert "The rows of Colours, which v1 has learned, are gone" in asked(version)
    with pytest.raises(BadData, match=r"gone\.jsonl are gone\. Put the file back"):
        made("naive", {}, 0).refuse(order_for(kept={"1": tmp_path / "gone.jsonl"}))


# --- the version before ----------------------------------------------------------------------------------------------


def test_weights_that_are_gone_changed_or_cut_short_are_refused(learned, asked, workspace, tmp_path, monkeypatch):
    version = learned(Colours=4)
    place = workspace.objects.path(version.object)
    file = place / "adapter_model.safetensors"
    place.rename(tmp_path / "away")
    assert "The weights of v1 are gone" in (told := asked(version)) and "start from another version" in told
    (tmp_path / "away").rename(place)
    assert asked(version).status == "asked"

    whole = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "The weights of v1 are not what was stored" in asked(version), "one bit is enough"
    monkeypatch.setattr(situations, "READ_WHOLE_GB", 0)
    assert asked(version).status == "asked", "large weights are not read whole"
    for cut in (len(whole) - 40, 20):
        file.write_bytes(whole[:cut])
        assert f"is {cut} bytes long" in (told := asked(version)) and "cut short" in told


def test_a_base_folder_that_was_cut_short_is_refused(workspace, asked, tiny_model, tmp_path):
    version = versions.base_version(workspace)
    shutil.copytree(tiny_model, tmp_path / "base")
    with workspace.write() as session:
        row = session.get_one(Version, version.id)
        row.base_path = str(tmp_path / "base")
        session.add(row)
    assert asked(version).status == "asked"
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "model.safetensors, which v0 stands on" in asked(version)
    shutil.rmtree(tmp_path / "base")
    assert "which is gone. Put the folder back" in asked(version)


def test_a_second_model_is_counted_where_a_strategy_needs_one(learned, asked, monkeypatch, tiny_model):
    version = learned(Colours=4, parameters=10**9)
    monkeypatch.setattr(memory, "gpus", lambda: [])
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=7e9))
    need = [memory.needed_gb(10**9, tiny_model, "adapter", 1, 8, False, needs_parent=two) for two in (False, True)]
    assert need[1] - need[0] == pytest.approx(4.0), "four bytes for each weight of a second model in float32"
    wish = {"method": "lora", "training": {"batch_rows": 1, "max_tokens": 8}}
    told = asked(version, strategy="lwf", **wish)
    assert "1,000 M parameters with a second model beside it needs about 9.1 GB" in told and "such as replay" in told
    assert asked(version, strategy="replay", **wish).status == "asked", "5.1 GB of 7"


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def test_a_version_that_was_learned_with_other_tokens_is_refused(learned, asked, tiny_model, order_for):
    version = learned(Colours=4, vocabulary="of another tokenizer")
    for strategy in ("naive", "lwf", "replay+ewc"):
        told = asked(version, strategy=strategy)
        assert "v1 was made with other tokens than" in told and "Put the tokenizer back" in told
    with pytest.raises(BadSettings, match="was made with other tokens"):
        made("ewc", {}, 0).refuse(order_for(vocabulary="of another tokenizer"))
    made("ewc", {}, 0).refuse(order_for(vocabulary=vocabulary(tiny_model)))


def test_a_run_notes_its_tokens_and_any_changed_token_is_another_vocabulary(order_for, train, tiny_model, tmp_path):
    for method in ("lora", "full"):
        figures = train(order_for(method, method=method)).trained.figures
        assert figures["vocabulary"] == vocabulary(tiny_model), (
            "saving the tokenizer beside full weights changes nothing"
        )
    told = json.loads((tiny_model / "tokenizer.json").read_text())
    assert dict(told["model"]["vocab"]) | {t["content"]: t["id"] for t in told["added_tokens"]} == (
        load_tokenizer(tiny_model).get_vocab()
    )
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(told, indent=3))
    assert vocabulary(tmp_path) == vocabulary(tiny_model), "how the file is written says nothing"
    first, second = list(told["model"]["vocab"])[10:12]
    vocab = told["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(told))
    assert vocabulary(tmp_path) != vocabulary(tiny_model)
    file.write_text(json.dumps({"model": {"vocab": [["<unk>", 0.0], ["a", -1.5]]}}))
    assert vocabulary(tmp_path) and vocabulary(tmp_path / "nowhere") == ""


# --- through the public door -----------------------------------------------------------------------------------------


@pytest.mark.timeout(900)
def test_a_stream_over_the_api_says_what_was_asked_of_the_router_and_forgets_withdrawn_words(open_app, tmp_path):
    app, files = open_app("refusals"), {}
    for name, labels in TASKS.items():
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in make_rows(64, labels)))
    knobs = {"epochs": 10, "least_steps": 1, "batch_rows": 8, "learning_rate": 5e-3, "prompt_dropout": 0.0}
    wish = {"training": knobs, "gate": {"least_items": 1, "alpha": 0.3, "margin_points": 100}, "method": "lora"}

    def learn(*names: str, **changes) -> dict:
        stream = [{"name": name, "path": str(files[name])} for name in names]
        story = app.follow(app.learn(stream=stream, **wish | changes)["id"])
        assert story["error"] is None
        return story

    alone = learn("Colours", strategy="naive", deploy=False)["result"]["accepted"][0]
    refused = app.client.post("/api/learn", json=wish | {
        "stream": [{"name": "Animals", "path": str(files["Animals"])}], "strategy": "der", "start_from": alone,
    })  # fmt: skip
    assert (
        refused.status_code == 400
        and f"of Colours, which {alone} has learned, none are kept" in refused.json()["error"]
    )

    first, second = learn("Colours", "Animals", strategy="auto")["result"]["accepted"]
    run = app.get(f"/api/versions/{second}")["run"]
    share = run["settings"]["routing"]["routed_to"]["Animals"]
    assert f"{share:.0%} of its held-out prompts find it beside 1 task" in run["settings"]["why"]
    assert run["figures"]["strategy"]["routed_to"] == run["settings"]["routing"]["routed_to"], "one probe, told twice"

    rows = app.get("/api/tasks/Colours/rows")
    key = rows[0]["key"] if "key" in rows[0] else Row(**{k: rows[0][k] for k in ("prompt", "response", "label")}).key
    assert app.client.post("/api/rows/withdraw", json={"key": key, "reason": "asked for"}).status_code == 201
    (third,) = learn("Tools", strategy="auto")["result"]["accepted"]

    def router_of(name: str) -> Router:
        digest = app.get(f"/api/versions/{name}")["version"]["object"]
        return Router.load(app.home / "objects" / digest[:2] / digest)

    found, never = router_of(third), Router()
    for name in (first, second, third):
        card = app.get(f"/api/versions/{name}")
        folder = Path(app.home / "objects" / card["snapshot"]["object"][:2] / card["snapshot"]["object"])
        told = [Row.model_validate_json(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        never.folders[card["task"]] = ""
        never.add(card["task"], [row.prompt for row in told if row.key != key])
    assert found.withdrawn == {key} and found.counts == never.counts and found.rows == never.rows
    assert np.allclose(found.gram, never.gram, atol=1e-4)
    assert all(np.allclose(found.sums[task], never.sums[task], atol=1e-4) for task in never.sums)
    assert router_of(second).rows["Colours"] == found.rows["Colours"] + 1, "what is stored is never changed"
