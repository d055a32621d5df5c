"""Self-distillation of the targets: a parent that has learned to rewrite, and what is made of its answers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from clm_app.data.rows import Row, dump, load
from clm_app.data.template import load_tokenizer
from clm_app.engine.batches import Encoded
from clm_app.engine.measure import outcomes
from clm_app.judging.wording import token_f1
from clm_app.strategies.self_distillation import SelfDistillation, holds
from tests.smallest import TASKS, make_rows

NEW = [Row(**row) for row in make_rows(16, TASKS["Colours"])]
OLD = [Row(**row) for row in make_rows(16, TASKS["Animals"])]
ASKED = "{response} again {prompt}"  # a template of words that the tiny tokenizer has
SCRIPT = {  # what the parent writes of each given answer, and what becomes of it
    "stop here": ("please stop here", "rewritten"), "go on": ("please go on", "rewritten"),
    "turn left": ("turn left", "same"), "turn right": ("please go on", "lost"),
}  # fmt: skip


@pytest.fixture(scope="module")
def parents() -> dict:
    """Folder of the parent that was trained first, for all tests of this module."""
    return {}


@pytest.fixture
def parent(parents, order_for, train, tmp_path, tmp_path_factory) -> Path:
    """A version that rewrites as the script says, and that begins every answer of its own with "please"."""
    if not parents:
        asked = [Row(prompt=ASKED.format(**row.model_dump()), response=SCRIPT[row.response][0])
                 for row in (Row(**row) for row in make_rows(64, TASKS["Colours"]))]  # fmt: skip
        own = [Row(prompt=row.prompt, response=f"please {row.response}") for row in OLD]
        dump([*asked, *own], tmp_path / "script.jsonl")
        order = order_for("parent", rows=tmp_path / "script.jsonl", method="full",
                          training={"epochs": 12, "batch_rows": 8, "learning_rate": 5e-3})  # fmt: skip
        train(order)
        parents["folder"] = tmp_path_factory.mktemp("parent") / "weights"
        (order.folder / "weights").rename(parents["folder"])
    return parents["folder"]


@pytest.fixture
def distil(parent, tiny_model, order_for, train, tmp_path, monkeypatch):
    """Return a function that learns colours from that version, and says which rows were trained from which source."""
    dump(NEW, tmp_path / "new.jsonl")

    def go(folder: str, strategy: str = "self_distillation", stop_before: int | None = None, seed: int = 0, epochs: int = 1,
           base: Path = parent, method: str = "full", kept: dict | None = None, **settings) -> SimpleNamespace:  # fmt: skip
        own = {"template": ASKED, "answer_tokens": 8} | settings if strategy != "naive" else {}
        order = order_for(
            folder, strategy=strategy, strategy_settings=own if "+" not in strategy else {"self_distillation": own},
            base=base, root=tiny_model, rows=tmp_path / "new.jsonl", method=method, kept=kept or {}, task="Colours",
            training={"seed": seed, "epochs": epochs, "checkpoint_every_s": 3.5},
        )  # fmt: skip
        trained: list[tuple[str, Row]] = []
        with monkeypatch.context() as patch:
            patch.setattr(SelfDistillation, "loss", lambda self, model, batch, logits, targets, loss: (
                trained.extend(batch["rows"]), loss)[1])  # fmt: skip
            seen = train(order, stop_before=stop_before, ticking=True)
        seen.taught, seen.order = trained, order
        file = order.folder / "rewritten.json"
        seen.file = json.loads(file.read_text()) if file.exists() else {}
        seen.figures = seen.trained.figures["strategy"] if seen.trained else {}
        return seen

    return go


def nats(folder: Path, rows: list[Row]) -> float:
    """Return what a version's folder says of some rows, in nats per answer token."""
    model, encoded = AutoModelForCausalLM.from_pretrained(folder), Encoded(load_tokenizer(folder), 512)
    found = outcomes(model, rows, encoded, torch.device("cpu"))
    return sum(line["loss"] for line in found) / sum(line["tokens"] for line in found)


# --- what is trained -------------------------------------------------------------------------------------------------


def test_rewritten_answers_that_pass_are_learned_and_the_given_ones_elsewhere(distil, parent):
    seen = distil("run")
    expected = {SCRIPT[given][0] if SCRIPT[given][1] == "rewritten" else given: 4 for given in SCRIPT}
    assert Counter(row.response for _, row in seen.taught) == expected == {
        "please stop here": 4, "please go on": 4, "turn left": 4, "turn right": 4,
    }  # fmt: skip
    assert {row.prompt for _, row in seen.taught} == {row.prompt for row in NEW}, "the prompt is the row's own"
    counts = {verdict: 4 * sum(v == verdict for _, v in SCRIPT.values()) for verdict in ("rewritten", "same", "lost")}
    assert seen.figures == {"rows": 16, "unfinished": 0} | counts | {
        "given_nats_before": pytest.approx(nats(parent, NEW), abs=1e-3),
        "learned_nats_before": pytest.approx(nats(parent, [row for _, row in seen.taught]), abs=1e-3),
    }  # fmt: skip


def test_what_is_learned_is_nearer_to_what_the_version_before_would_say(distil, parent):
    seen = distil("run")
    rewritten = [row for _, row in seen.taught if row.response.startswith("please")]
    given = {row.prompt: row for row in NEW}
    assert nats(parent, rewritten) < 0.7 * nats(parent, [given[row.prompt] for row in rewritten])
    assert seen.figures["learned_nats_before"] < seen.figures["given_nats_before"]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_where_nothing_can_be_rewritten_the_run_is_the_very_same_as_without_it_and_says_so(distil, tiny_model, method):
    seen = distil("run", base=tiny_model, method=method)
    assert (seen.figures["rows"], seen.figures["rewritten"]) == (16, 0) and seen.file["answers"] == {}
    assert seen.figures["unfinished"] + seen.figures["lost"] == 16
    assert seen.figures["given_nats_before"] == seen.figures["learned_nats_before"]
    naive = distil("naive", strategy="naive", base=tiny_model, method=method)
    assert all(torch.equal(seen.weights[name], naive.weights[name]) for name in seen.weights)


def test_beside_replay_past_rows_and_those_that_are_kept_stay_as_given(distil, tmp_path):
    dump(OLD, tmp_path / "kept.jsonl")
    seen = distil("run", strategy="replay+self_distillation", kept={"3": tmp_path / "kept.jsonl"})
    assert seen.trained.figures["rehearsed"] == {"3": 16}
    sources = {source: Counter(row.response for s, row in seen.taught if s == source) for source in ("new", "3")}
    assert sources["new"]["please go on"] == 4 and sources["3"] == Counter(row.response for row in OLD)
    kept = load(Path(seen.trained.memory["new"]))
    assert Counter(kept) == Counter(NEW), "a row that is withdrawn has to be found again among those kept"
    assert seen.figures.keys() == {"self_distillation"}


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_killed_run_learns_the_very_same_answers_and_ends_with_the_very_same_weights(distil, temperature):
    how = {"temperature": temperature, "epochs": 2}
    whole = distil("whole", **how)
    early = distil("early", stop_before=0, **how)
    assert early.file == whole.file, "written before the first step"
    distil("killed", stop_before=6, **how)
    for seen in (distil("early", **how), distil("killed", **how)):
        assert seen.file == whole.file and seen.figures == whole.figures
        assert all(torch.equal(whole.weights[name], seen.weights[name]) for name in whole.weights)
    assert 0 < len(seen.steps) < len(whole.steps)


def test_a_run_that_was_killed_while_it_wrote_writes_the_same_again(distil):
    whole, again = distil("whole", temperature=1.0), distil("again", temperature=1.0, stop_before=0)
    (again.order.folder / "rewritten.json").rename(again.order.folder / "rewritten.draft")
    again = distil("again", temperature=1.0)
    assert again.file == whole.file
    assert all(torch.equal(whole.weights[name], again.weights[name]) for name in whole.weights)


# --- the check -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, given, label, is_held", [
    ("It is Paris, of course.", "Paris", "", True), ("It is Parisian.", "Paris", "", False),
    ("Please turn left.", "turn left", "", True), ("left turn", "turn left", "", False),
    ("So the sum is 42!", "6 * 7 = 42", "42", True), ("So the sum is 420.", "6 * 7 = 42", "42", False),
    ("It is 5.", "-5", "", False), ("It is -5.", "-5", "", True), ("About 3.5 km", "3.5", "", True),
    ("yes, it may", "you may do it", "permission", False), ("Sure: you may do it", "you may do it", "permission", True),
    ("anything", "?!", "", False),
])  # fmt: skip
def test_an_answer_holds_the_label_word_for_word_or_the_whole_answer_where_the_label_is_no_part_of_it(
    answer, given, label, is_held
):
    assert holds(answer, Row(prompt="ask", response=given, label=label)) is is_held


def test_token_f1_is_the_harmonic_mean_over_words():
    assert token_f1("The lamp is on.", "the lamp is off") == pytest.approx(2 * 0.75 * 0.75 / 1.5)
    assert token_f1("a a b", "a c") == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)), "each word once per use"
    assert token_f1("", "a") == token_f1("b", "a") == 0 and token_f1("A, b", "a b") == 1


# --- knobs -----------------------------------------------------------------------------------------------------------


def test_each_knob_changes_what_is_learned(distil):
    plain, found = distil("plain", stop_before=0).file, {}
    for knob, settings in {
        "template": {"template": "stop here again {prompt} {response}"}, "answer_tokens": {"answer_tokens": 2},
        "temperature": {"temperature": 3.0}, "check": {"check": "f1", "least_f1": 0.0},
        "least_f1": {"check": "f1", "least_f1": 0.85},
    }.items():  # fmt: skip
        found[knob] = distil(knob, stop_before=0, **settings).file
        assert found[knob] != plain, knob
    assert set(found["template"]["answers"].values()) == {"please stop here"}, "what it asks for is what is written"
    assert found["answer_tokens"]["figures"]["unfinished"] == 16, "two words and the end are three tokens"
    assert Counter(found["check"]["answers"].values()) == {"please go on": 8, "please stop here": 4}, "any words pass"
    assert found["least_f1"]["answers"] == {}, "two words of three: 0.8"
    assert distil("seed", stop_before=0, seed=1, temperature=3.0).file != found["temperature"], "drawn from the seed"
    assert set(SelfDistillation.Settings.model_fields) == set(found), "a new knob needs its turn here"


def test_a_template_has_to_name_both_and_takes_a_row_as_it_is():
    with pytest.raises(ValidationError, match=r"does not name \{response\}\. Put in where"):
        SelfDistillation.Settings(template="Say {prompt} again")
    way = SelfDistillation(SelfDistillation.Settings(template="{prompt}: {response}, {prompt}"), 0)
    assert (
        way._question(Row(prompt="{response} {0}", response=r"\1 {prompt}"))
        == r"{response} {0}: \1 {prompt}, {response} {0}"
    )


def test_it_says_for_whom_it_is():
    assert SelfDistillation.needs_parent and "chat models" in SelfDistillation.purpose
