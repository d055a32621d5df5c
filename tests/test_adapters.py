"""What task adapters promise: no adapter but the trained one changes, and every prompt finds its own."""

from __future__ import annotations

import json
import random
from math import log
from pathlib import Path

import numpy as np
import pytest
from sqlmodel import select

from clm_app.data.rows import Row, dump
from clm_app.engine.order import Exam
from clm_app.errors import BadSettings
from clm_app.registry import versions
from clm_app.registry.versions import STARTER
from clm_app.routes import BASE, RIDGE, WIDTH, Router, Routing, asked, hashed, is_routed, routing, views
from clm_app.serving.backends.llama_cpp import LlamaCpp
from clm_app.serving.backends.transformers import Transformers
from clm_app.serving.chat import ChatOptions, Message
from clm_app.serving.choice import choose as choose_backend
from clm_app.strategies._base import Situation
from clm_app.strategies._combined import choose, made, part_of
from clm_app.wishes import LearnWish, ask
from store.objects import Objects, folder_digest
from store.tables import Job, Run, Snapshot, Task, Version
from tests.smallest import TASKS, make_rows

COLOURS, ANIMALS = ([row["prompt"] for row in make_rows(24, TASKS[name])] for name in ("Colours", "Animals"))
ENOUGH = {"epochs": 30, "batch_rows": 4}  # passes after which the tiny model answers every prompt of a task


# --- the router ------------------------------------------------------------------------------------------------------


def router(**prompts: list[str]) -> Router:
    found = Router()
    for i, (task, asked_for) in enumerate(prompts.items()):
        found.folders[task] = f"adapters/{i:04d}"
        found.add(task, asked_for)
    return found


def test_a_prompt_goes_to_the_task_whose_words_it_has():
    found = router(Colours=COLOURS, Animals=ANIMALS)
    assert {found.route(prompt) for prompt in COLOURS} == {"Colours"}
    assert {found.route(prompt) for prompt in ANIMALS} == {"Animals"}
    assert found.route("cat") == "Animals", "one word is enough"


def test_a_prompt_without_a_known_word_goes_to_the_base():
    assert router(Colours=COLOURS).route("xylophone") == BASE


def test_naive_bayes_gives_the_weighted_log_ratio_that_its_sources_give():
    found = router(one=["a"], two=["b"])
    # "a" gives the features word "a", pairs "^ a" and "a $", triple "^ a $", letters "<a>": each 1 of 2 rows, all in "one".
    rate = (1 + 1) / 2
    inside, outside = (1 + 10 * rate) / (1 + 10), (0 + 10 * rate) / (1 + 10)
    weight = 1.0 + 2 * 0.5 + 0.5 + 0.2
    assert found.bayes(views("a")) == pytest.approx(
        {"one": weight * log(inside / rate), "two": weight * log(outside / rate)}
    )


def test_ridge_regression_is_the_one_that_all_rows_at_once_give():
    found = router(Colours=COLOURS, Animals=ANIMALS)
    rows = np.stack([hashed(views(prompt)) for prompt in [*ANIMALS, *COLOURS]])
    targets = np.array([[0.0, 1.0]] * len(ANIMALS) + [[1.0, 0.0]] * len(COLOURS))
    # the same minimum, by least squares over the rows with the ridge as extra rows
    ridged = np.vstack([rows, np.sqrt(RIDGE) * np.eye(WIDTH)])
    expected = np.linalg.lstsq(ridged, np.vstack([targets, np.zeros((WIDTH, 2))]), rcond=None)[0]
    assert np.allclose(found.weights, expected, atol=1e-3)


def test_a_small_task_is_not_swallowed_by_a_large_one():
    found = router(Large=[f"{word} {prompt}" for word in "abcdefgh" for prompt in COLOURS], Small=ANIMALS[:3])
    assert found.route(ANIMALS[10]) == "Small"


def test_the_order_of_tasks_and_rows_does_not_matter():
    first, second = router(Colours=COLOURS, Animals=ANIMALS), router(Animals=ANIMALS[::-1], Colours=COLOURS)
    assert first.scores(views("the red cat now")) == pytest.approx(second.scores(views("the red cat now")))


def test_rows_that_are_taken_away_are_as_if_they_had_never_been_learned(tmp_path):
    found, never = router(Colours=COLOURS, Animals=ANIMALS), router(Colours=COLOURS, Animals=ANIMALS[5:])
    found.add("Animals", ANIMALS[:5], sign=-1)
    assert found.counts == never.counts and found.rows == never.rows
    assert np.allclose(found.gram, never.gram, atol=1e-5) and np.allclose(found.weights, never.weights, atol=1e-3)


def test_a_saved_router_is_the_same_router_and_equal_ones_are_equal_files(tmp_path):
    found = router(Colours=COLOURS, Animals=ANIMALS)
    for name, one in (("a", found), ("b", router(Colours=COLOURS, Animals=ANIMALS))):
        (tmp_path / name).mkdir()
        one.save(tmp_path / name)
    assert folder_digest(tmp_path / "a") == folder_digest(tmp_path / "b")
    again = Router.load(tmp_path / "a")
    assert (
        again.scores(views("red cat")) == pytest.approx(found.scores(views("red cat"))) and again.tasks == found.tasks
    )
    assert is_routed(tmp_path / "a") and not is_routed(tmp_path) and not is_routed(None)


def test_what_the_person_said_is_routed_and_nothing_else():
    turns = [("system", "cat"), ("user", "red"), ("assistant", "dog"), ("user", "and now?")]
    assert asked(Message(role=role, content=text) for role, text in turns) == "red\nand now?"


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def learn(order_for, train, tmp_path):
    """Return a function that learns one task of TASKS over what was learned before, and returns what was seen."""

    def do(folder: str, task: str, before=None, stop_before: int | None = None, rows=None, **changes):
        file, place = tmp_path / f"{folder}.rows.jsonl", tmp_path / folder
        dump([Row(**row) for row in rows or make_rows(24, TASKS[task])], file)
        known = {} if before is None else {
            "adapter": Path(before.trained.folder), "kept": before.kept, "kept_tasks": before.kept_tasks,
        }  # fmt: skip
        seen_exams = [Exam(snapshot_id=9, task=task, split="validation", file=file)]
        fields = {"strategy": "adapters", "task": task, "training": ENOUGH, "after": seen_exams} | known | changes
        order = order_for(folder, **fields)
        order = order.model_copy(update={"rows": file})
        seen = train(order, stop_before=stop_before)
        kept = place / "kept.jsonl"
        seen.kept, seen.kept_tasks = dict(order.kept), dict(order.kept_tasks)
        if kept.exists():
            seen.kept[str(len(seen.kept) + 1)], seen.kept_tasks[str(len(seen.kept_tasks) + 1)] = kept, task
        seen.place = Path(seen.trained.folder) if seen.trained else None
        return seen

    return do


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_second_task_leaves_the_first_ones_adapter_bit_by_bit_as_it_was(learn, method):
    first = learn("one", "Colours", method=method)
    second = learn("two", "Animals", first, method=method)
    assert first.trained.weights_kind == second.trained.weights_kind == "routed"
    assert folder_digest(first.place / "adapters/0000") == folder_digest(second.place / "adapters/0000")
    assert folder_digest(second.place / "adapters/0001") != folder_digest(second.place / "adapters/0000")
    assert json.loads((second.place / "routes.json").read_text())["folders"] == {
        "Colours": "adapters/0000", "Animals": "adapters/0001",
    }  # fmt: skip


def test_both_tasks_are_answered_after_the_second_where_naive_training_loses_the_first(
    learn, order_for, train, tmp_path
):
    files = {task: tmp_path / f"{task}.jsonl" for task in ("Colours", "Animals")}
    for task, file in files.items():
        dump([Row(**row) for row in make_rows(24, TASKS[task])], file)
    exams = [Exam(snapshot_id=i, task=task, split="test", file=file) for i, (task, file) in enumerate(files.items())]
    first = learn("one", "Colours", after=exams)
    second = learn("two", "Animals", first, after=exams, strategy_settings={"start": "base"})
    assert [m.exact_match for m in first.measured][0] == 1.0
    assert [m.exact_match for m in second.measured] == [1.0, 1.0]
    lines = [json.loads(line) for line in Path(second.measured[0].outcomes).read_text().splitlines()]
    assert {line["route"] for line in lines} == {"Colours"}, "the outcome says which adapter answered"
    before, after = (Path(seen.measured[0].outcomes).read_text().splitlines() for seen in (first, second))
    assert [json.loads(line)["loss"] for line in before] == pytest.approx([json.loads(line)["loss"] for line in after])
    naive = train(order_for("n1", training=ENOUGH, after=exams))
    naive = train(order_for("n2", training=ENOUGH, after=exams, adapter=Path(naive.trained.folder)).model_copy(
        update={"rows": files["Animals"]}))  # fmt: skip
    assert naive.measured[0].exact_match <= 0.25 < naive.measured[1].exact_match


def test_a_task_that_comes_again_is_trained_on_in_its_own_adapter_with_its_own_rows_alone(learn):
    first = learn("one", "Colours", strategy_settings={"rows_share": 0.5})
    second = learn("two", "Animals", first, strategy_settings={"rows_share": 0.5})
    third = learn("three", "Colours", second)
    assert folder_digest(third.place / "adapters/0001") == folder_digest(second.place / "adapters/0001")
    assert folder_digest(third.place / "adapters/0000") != folder_digest(second.place / "adapters/0000")
    assert third.trained.figures["rehearsed"] == {"1": 24, "2": 0}, "rows of the same adapter, at half of the mix"
    assert Router.load(third.place).tasks == ["Animals", "Colours"], "the last one learned stands last"


def test_a_task_that_cannot_be_told_from_a_past_one_shares_its_adapter(learn):
    first = learn("one", "Colours", strategy_settings={"rows_share": 0.5})
    same_words = [row | {"response": "it is " + row["response"]} for row in make_rows(24, TASKS["Colours"])]
    shared = learn("two", "More colours", first, rows=same_words, strategy_settings={"same_above": 0.01})
    if shared.trained.figures["strategy"]["routed_to"].get("Colours", 0) <= 0.01:
        pytest.fail(f"the probe told equal prompts apart: {shared.trained.figures['strategy']}")
    assert shared.trained.figures["strategy"]["adapters"] == 1
    assert shared.trained.figures["rehearsed"] == {"1": 24}
    apart = learn("three", "More colours", first, rows=same_words, strategy_settings={"same_above": 1.0})
    assert apart.trained.figures["strategy"]["adapters"] == 2


def test_a_new_adapter_begins_where_the_last_one_ended_or_with_nothing_learned(learn):
    first = learn("one", "Colours")
    losses = {
        start: learn(start, "Animals", first, strategy_settings={"start": start}).steps[0].loss
        for start in ("previous", "base")
    }
    fresh = learn("fresh", "Animals").steps[0].loss
    assert losses["base"] == pytest.approx(fresh) and losses["previous"] != pytest.approx(fresh)


@pytest.mark.parametrize(("share", "rows"), [(0.0, 0), (0.25, 6), (1.0, 24)])
def test_a_share_of_the_rows_is_kept(share, rows):
    new = [Row(**row) for row in make_rows(24, TASKS["Colours"])]
    assert len(made("adapters", {"rows_share": share}, 0).keep(new, random.Random(0))) == rows


def test_the_share_of_rehearsal_is_that_of_the_mix(learn):
    first = learn("one", "Colours", strategy_settings={"rows_share": 0.5})
    again = learn("two", "Colours", first, strategy_settings={"share": 0.25})
    assert again.trained.figures["rehearsed"] == {"1": 8}, "8 of 32"


def test_no_more_adapters_are_made_than_there_may_be(learn):
    first = learn("one", "Colours", strategy_settings={"rows_share": 0.5})
    second = learn("two", "Animals", first, strategy_settings={"most_adapters": 1})
    assert Router.load(second.place).folders == {"Colours": "adapters/0000", "Animals": "adapters/0000"}
    assert second.trained.figures["rehearsed"] == {"1": 24}
    assert (
        learn("three", "Animals", first, strategy_settings={"most_adapters": 2}).trained.figures["strategy"]["adapters"]
        == 2
    )


def test_what_the_choice_asked_of_the_router_is_not_asked_again(learn, monkeypatch):
    first = learn("one", "Colours")
    monkeypatch.setattr("clm_app.strategies.adapters.routing", lambda *_: pytest.fail("it was asked twice"))
    told = Routing({"Colours": 0.6, "Animals": 0.4}, "Colours")
    second = learn("two", "Animals", first, routing=told)
    assert second.trained.figures["strategy"]["routed_to"] == told.routed_to
    assert second.trained.figures["strategy"]["adapters"] == 1, "three fifths would go to the other one"


def test_withdrawn_rows_are_taken_out_of_the_router_once_however_often_it_is_asked(learn):
    first = learn("one", "Colours")
    rows = [Row(**row) for row in make_rows(24, TASKS["Colours"])]
    file = first.place.parents[1] / "one.rows.jsonl"
    gone = {"withdrawn": [rows[0].key, rows[5].key], "counted": [("Colours", file)]}
    second = learn("two", "Animals", first, **gone)
    never = router(Colours=[row.prompt for row in rows if row.key not in gone["withdrawn"]], Animals=ANIMALS)
    same(Router.load(second.place), never)
    assert second.trained.figures["strategy"]["withdrawn"] == 2

    again = learn("two", "Animals", first, **gone)  # its checkpoint is found, as after a kill
    same(Router.load(again.place), never)
    third = learn("three", "Tools", second, **gone)
    assert third.trained.figures["strategy"]["withdrawn"] == 0, "they were out already"
    never.folders["Tools"] = "adapters/0002"
    never.add("Tools", [row["prompt"] for row in make_rows(24, TASKS["Tools"])])
    same(Router.load(third.place), never)
    assert first.trained.figures["strategy"]["withdrawn"] == 0 and Router.load(first.place).rows["Colours"] == 24


def test_a_row_that_was_learned_twice_is_taken_out_twice_and_never_comes_in_again():
    rows = [Row(**row) for row in make_rows(24, TASKS["Colours"])]
    found, never = Router(), Router()
    for one, kept in ((found, rows), (never, rows[1:])):
        one.folders["Colours"] = ""
        one.learn("Colours", kept)
        one.learn("Colours", kept)
    assert found.take_out([rows[0].key], [("Colours", rows), ("Colours", rows)]) == 2
    same(found, never)
    assert found.take_out([rows[0].key], [("Colours", rows), ("Colours", rows)]) == 0
    found.learn("Colours", rows)
    never.learn("Colours", rows[1:])
    same(found, never)


def same(found: Router, expected: Router) -> None:
    assert found.counts == expected.counts and found.rows == expected.rows
    assert np.allclose(found.gram, expected.gram, atol=1e-4)
    assert all(np.allclose(found.sums[task], expected.sums[task], atol=1e-4) for task in expected.sums)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_run_ends_with_the_same_folder(learn, method):
    first = learn("one", "Colours", method=method)
    whole = learn("two", "Animals", first, method=method)
    learn("three", "Animals", first, stop_before=20, training=ENOUGH | {"checkpoint_every_s": 0.1}, method=method)
    again = learn("three", "Animals", first, method=method)
    assert folder_digest(again.place) == folder_digest(whole.place)


def test_a_single_adapter_and_learned_full_weights_are_refused_with_what_to_do(
    learn, order_for, train, tiny_model, tmp_path
):
    single = Path(train(order_for("single")).trained.folder)
    with pytest.raises(BadSettings, match="Start from v0"):
        learn("one", "Colours", adapter=single)
    with pytest.raises(BadSettings, match="Start from v0"):
        learn("two", "Colours", root=tmp_path)


def test_weights_tuned_whole_for_a_task_go_on_whole_and_an_adapter_may_become_whole(learn):
    whole = learn("one", "Colours", method="full")
    assert (whole.place / "adapters/0000/model.safetensors").exists()
    assert not (whole.place / "adapters/0000/tokenizer.json").exists(), "the base has it"
    again = learn("two", "Colours", whole, method="full", training={"epochs": 1, "learning_rate": 1e-5})
    assert again.steps[0].loss < 0.5 * whole.steps[0].loss, "it went on from what it knew"
    with pytest.raises(BadSettings, match=r"tuned whole, and method lora trains an adapter. Choose method full"):
        learn("three", "Colours", whole)
    adapter = learn("four", "Colours")
    grown = learn("five", "Colours", adapter, method="full", training={"epochs": 1, "learning_rate": 1e-5})
    assert grown.steps[0].loss < 0.5 * adapter.steps[0].loss


# --- what uses it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [("lora", "lora"), ("full", "full"), ("full", "lora"), ("lora", "full")])
def test_a_conversation_is_answered_through_the_adapter_of_its_task(learn, tiny_model, tmp_path, methods):
    second = learn("two", "Animals", learn("one", "Colours", method=methods[0]), method=methods[1])
    backend = Transformers(tiny_model, second.place, threads=1, converted=tmp_path / "none")
    for task in ("Colours", "Animals", "Colours"):
        row = Row(**make_rows(4, TASKS[task])[0])
        pieces = backend.stream([Message(role="user", content=row.prompt)], ChatOptions(max_tokens=12), lambda: False)
        assert "".join(piece.text for piece in pieces).strip() == row.response
    asked_for = [Message(role="user", content="xylophone")]
    unknown, bare = (
        [p.text for p in b.stream(asked_for, ChatOptions(max_tokens=5), lambda: False)]
        for b in (backend, Transformers(tiny_model, None, threads=1, converted=tmp_path / "none"))
    )
    assert unknown == bare, "no task has a word of it, so the base answers"


def test_llama_cpp_leaves_a_version_with_an_adapter_per_task_to_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaCpp, "is_available", classmethod(lambda cls: None))
    Router().save(tmp_path)
    assert choose_backend("auto", STARTER)[0] == "llama_cpp"
    backend, why = choose_backend("auto", STARTER, tmp_path)
    assert backend == "transformers" and "an adapter per task" in why


@pytest.mark.parametrize(
    ("kind", "wish", "says"),
    [
        (
            "routed",
            {"strategy": "replay"},
            "replay trains one set of weights. Choose strategy adapters, or start from v0",
        ),
        ("routed", {"compare_naive": True}, None),
        (
            "full",
            {"strategy": "adapters"},
            "adapters needs a bare base or task adapters. Start from v0, or choose strategy replay",
        ),
        ("adapter", {"strategy": "adapters"}, "Start from v0"),
        ("routed", {}, None),
        ("full", {}, None),
    ],
)
def test_a_version_of_another_kind_is_refused_before_anything_is_written(kind, wish, says, workspace, rows_file):
    base = versions.base_version(workspace)
    with workspace.write() as session:
        job = Job(kind="learn")
        task = Task(name="past", key="past")
        session.add_all([job, task])
        session.flush()
        taken = Snapshot(task_id=task.id, object="", train_rows=1, validation_rows=1, test_rows=1, source="")
        session.add(taken)
        session.flush()
        run = Run(job_id=job.id, position=0, task_id=task.id, snapshot_id=taken.id, parent_version_id=base.id, folder="",
                  strategy="", method="", seed=0, track="main")  # fmt: skip
        session.add(run)
        session.flush()
        session.add(Version(name="v1", kind=kind, run_id=run.id, parent_id=base.id, base_path=base.base_path,
                            base_digest=base.base_digest, object=workspace.objects.put(STARTER), parameters=1000))  # fmt: skip
        job.status = "done"
        session.add(job)
    asked_for = LearnWish(stream=[{"name": "Next", "path": str(rows_file(40))}], start_from="v1", **wish)
    if says is None:
        assert ask(workspace, asked_for, "local").status == "asked"
        return
    with pytest.raises(BadSettings, match=says):
        ask(workspace, asked_for, "local")
    with workspace.read() as session:
        assert len(session.exec(select(Job)).all()) == 1, "nothing is kept of a refused wish"


def test_objects_link_what_the_parent_has_and_copy_what_is_new(tmp_path):
    objects = Objects(tmp_path / "store")
    for name, content in (("first", {"a": "same", "b": "old"}), ("second", {"a": "same", "b": "new"})):
        (tmp_path / name).mkdir()
        for file, text in content.items():
            (tmp_path / name / file).write_text(text)
    parent = objects.path(objects.put(tmp_path / "first"))
    child = objects.path(objects.put(tmp_path / "second", alike=parent))
    assert (child / "a").samefile(parent / "a") and not (child / "b").samefile(parent / "b")
    assert (child / "b").read_text() == "new" and (parent / "b").read_text() == "old"
    objects.verify(child.name)


# --- auto ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("situation", "settings", "strategy", "says"),
    [
        (Situation("base", 10**7, 0, 1000, ""), {}, "adapters", "only the router"),
        (Situation("routed", 10**7, 5, 1000, "lora"), {}, "adapters", "only the router"),
        (Situation("adapter", 10**7, 1, 1000, ""), {}, "replay", "holds 1 learned task in one set of weights"),
        (Situation("full", 10**7, 3, 1000, "full"), {}, "replay", "3 learned tasks"),
        (Situation("base", 10**9, 0, 1000, "full"), {}, "replay", "method full was asked for"),
        (Situation("base", 10**7, 0, 1000, "full"), {}, "adapters", "only the router"),
        (Situation("full", 10**7, 3, 1000, ""), {"may_keep_rows": False}, "lwf", "no old rows may be kept"),
    ],
)
def test_auto_takes_what_suits_the_line_of_versions_and_says_why(situation, settings, strategy, says):
    choice = choose("auto", settings, situation)
    assert choice.strategy == strategy and says in choice.why
    part_of(choice.strategy).Settings(**choice.settings)  # its settings are those of the one it chose


def test_a_very_small_model_is_tuned_whole_for_each_task_and_a_larger_one_by_adapters():
    wish = LearnWish(stream=[{"name": "any"}])
    assert [wish.method_for(size) for size in (4_000_000, 50_000_000, 8_000_000_000)] == ["full", "lora", "lora"]
    whole = LearnWish(stream=[{"name": "any"}], strategy="replay")
    assert [whole.method_for(size) for size in (50_000_000, 8_000_000_000)] == ["full", "lora"]


def test_auto_keeps_no_more_than_its_share_of_rows():
    full, routed = Situation("full", 10**7, 3, 1000, ""), Situation("routed", 10**7, 3, 1000, "")
    assert choose("auto", {"rows_share": 0.02}, full).settings == {"rows_per_task": 20}
    assert choose("auto", {"rows_share": 0.02}, routed).settings == {"rows_share": 0.02}
    assert choose("auto", {"may_keep_rows": False}, routed).settings == {"rows_share": 0.0}


KNOWN = Situation("routed", 10**7, 2, 1000, "", task="Birds", kept={"Cards": 37, "Loans": 8},
                  folders={"Cards": "adapters/0000", "Loans": "adapters/0001"}, adapter_gb=1.25)  # fmt: skip
APART, ALIKE = Routing({"Birds": 0.98, "Cards": 0.02}, "Cards"), Routing({"Birds": 0.59, "Cards": 0.41}, "Cards")


@pytest.mark.parametrize(
    ("known", "settings", "chosen", "says"),
    [
        ({"routing": APART}, {}, {}, "98% of its held-out prompts find it beside 2 tasks, so it keeps weights of its own"),
        ({"routing": ALIKE}, {}, {},
         "41% of its held-out prompts look like Cards, so it shares the adapter of Cards and rehearses 37 kept rows"),
        ({"routing": ALIKE, "folders": {"Cards": "adapters/0000", "Loans": "adapters/0000"}}, {}, {},
         "shares the adapter of Cards and rehearses 45 kept rows"),
        ({"routing": ALIKE, "kept": {"Cards": 0, "Loans": 8}}, {}, {"same_above": 1.0},
         "no rows of Cards are kept to rehearse in one adapter for both, so it keeps weights of its own; expect the router "
         "to confuse about 41% of its prompts with Cards"),
        ({"routing": ALIKE}, {"may_keep_rows": False}, {"rows_share": 0.0, "same_above": 1.0, "share": 0.0},
         "no old rows may be kept to rehearse in one adapter for both"),
        ({"routing": APART, "room": 2}, {}, {"most_adapters": 2},
         "memory and disk have room for 2 of 1.2 GB each, and there are 2; Cards is the likest task, so it shares the "
         "adapter of Cards and rehearses 37 kept rows"),
        ({"routing": APART, "room": 2, "kept": {"Cards": 0, "Loans": 8}}, {}, {"most_adapters": 2},
         "shares the adapter of Cards, and nothing holds what that has learned: no rows of it are kept"),
        ({"routing": ALIKE, "room": 1}, {}, {"most_adapters": 2},
         "there are 2; 41% of its held-out prompts look like Cards, so it shares"),
        ({"routing": APART, "room": 3}, {}, {}, "98% of its held-out prompts find it"),
        ({"task": "Loans"}, {}, {}, "Loans was learned before, so its own adapter is trained on and rehearses 8 kept rows"),
    ],
)  # fmt: skip
def test_auto_says_what_the_router_and_the_room_made_it_choose(known, settings, chosen, says):
    choice = choose("auto", settings, KNOWN._replace(**known))
    assert choice.strategy == "adapters" and says in choice.why and choice.settings == {"rows_share": 0.05} | chosen
    part_of(choice.strategy).Settings(**choice.settings)


@pytest.mark.parametrize(
    ("kept", "strategy", "says"),
    [
        (
            {"Cards": 5, "Loans": 0},
            "replay",
            "No rows of Loans are kept, so that nothing protects what it knew of them",
        ),
        ({"Cards": 0, "Loans": 0}, "lwf", "and no rows of Cards and Loans are kept"),
        (
            {"Cards": 5, "Loans": 8},
            "replay",
            "Replay of at most 50 kept rows of each task: the version to go on from holds",
        ),
    ],
)
def test_auto_rehearses_over_one_set_of_weights_where_rows_are_kept_and_says_whose_are_not(kept, strategy, says):
    choice = choose("auto", {}, Situation("full", 10**7, 2, 1000, "", kept=kept))
    assert choice.strategy == strategy and says in choice.why


def test_the_router_says_where_held_out_prompts_would_go_and_who_is_likest():
    held_out = [Row(prompt=f"{word} and then", response="x") for word in ("cat", "dog", "red")]
    found = routing(
        router(Colours=COLOURS), "Animals", [Row(**row) for row in make_rows(24, TASKS["Animals"])], held_out
    )
    assert (
        found.routed_to == pytest.approx({"Animals": 2 / 3, "Colours": 1 / 3}) and list(found.routed_to)[0] == "Animals"
    )
    assert found.nearest == "Colours"


def test_any_other_strategy_is_taken_as_it_was_asked_for():
    assert choose("replay", {"share": 0.2}, Situation("base", 1, 0, 1, "")) == ("replay", {"share": 0.2}, "")


# --- several at once -------------------------------------------------------------------------------------------------


def test_strategies_that_cannot_work_together_are_refused_with_a_sentence():
    for name, says in (("replay+replay", "twice"), ("adapters+ewc", "works alone"), ("replay+herding", "both decide")):
        with pytest.raises(BadSettings, match=says):
            part_of(name)
    with pytest.raises(BadSettings, match="not among the strategies"):
        part_of("replay+abacus")
