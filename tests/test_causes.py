"""What went wrong is named where it is known, before a run where the rows or files say it, and nowhere else."""

from __future__ import annotations

import gzip
import json
import random

import pytest

from clm_app.data import vocabulary
from clm_app.data.reading import read_rows
from clm_app.data.rows import Row
from clm_app.data.soundness import following, refuse_untaught_classes
from clm_app.engine import loop
from clm_app.errors import BadData, BadSettings
from clm_app.judging.causes import LOOKS, Case, causes, guessing, told
from clm_app.judging.gate import GateSettings, Guessing, Pair, judge
from clm_app.settings import Settings
from clm_app.wishes import LearnWish, ask
from tests.smallest import TASKS, make_rows

ROWS = [Row(**row) for row in make_rows(128, TASKS["Colours"])]
USUAL = {"learning_rate": 1e-3, "usual_rate": 1e-3, "first_loss": 4.0, "loss": 0.5, "cut_rows": 0}


def shuffled(rows: list[Row], seed: int = 0) -> list[Row]:
    """Return the rows, each with another one's answer."""
    answers = [row.response for row in rows]
    random.Random(seed).shuffle(answers)
    return [Row(prompt=row.prompt, response=answer) for row, answer in zip(rows, answers, strict=True)]


def case(right: int, rows: list[Row] = ROWS, old: list[Pair] = [], same: bool = False, **figures) -> Case:  # noqa: B006
    """Return a candidate that answers so many of 100 items of a new task rightly."""
    losses = {"loss_before": [4.0] * 100, "loss_after": [4.0 if same else 0.5] * 100}
    new = Pair(task="Bikes", before=[0.0] * 100, after=[1.0] * right + [0.0] * (100 - right), **losses)
    verdict = judge(new, old, GateSettings(), guessing=guessing(rows))
    return Case(verdict, new, rows, USUAL | figures, {"max_tokens": 64})


# --- causes of what was judged ----------------------------------------------------------------------------------------

NAMED = {  # {cause: (the case, words of the sentence)}
    "nothing_changed": (case(0, same=True), "all 100 answers are as likely as before"),
    "rows_cut": (case(0, cut_rows=100), "100 of 128 rows are longer than 64 tokens"),
    "learning_rate": (case(10, learning_rate=0.03, loss=3.0), "0.03 is 30 times the usual 0.001"),
    "shuffled_labels": (case(25, shuffled(ROWS)), "the answers do not follow from the prompts"),
    "loss_never_fell": (case(0, loss=3.9), "its loss was 4.00 at the first step and 3.90 at the end"),
}


@pytest.mark.parametrize("cause", NAMED)
def test_a_candidate_that_is_refused_has_its_cause_named_in_the_evidence(cause):
    given, words = NAMED[cause]
    found = causes(given)
    assert [one.cause for one in found] == [cause] and words in found[0].sentence
    verdict = told(given.verdict, found)
    assert verdict.verdict == "hold" and verdict.sentence == given.verdict.sentence, "it stays one sentence"
    assert verdict.evidence["causes"] == [{"cause": cause, "sentence": found[0].sentence}]


def test_every_look_has_its_case():
    assert set(LOOKS) == set(NAMED)


def test_what_was_promoted_or_refused_for_another_reason_has_no_cause():
    assert causes(case(90)) == [] and causes(case(90, learning_rate=0.03)) == [], "it went well all the same"
    assert causes(case(20)) == [], "it learned too little, and nobody knows why"
    lost = Pair(task="Lamps", before=[1.0] * 100, after=[0.0] * 30 + [1.0] * 70)
    forgets = case(90, old=[lost])
    assert forgets.verdict.verdict == "repair" and causes(forgets) == []
    assert [one.cause for one in causes(case(90, old=[lost], learning_rate=0.03))] == ["learning_rate"]


def test_items_that_were_trained_on_are_named_even_where_the_candidate_is_promoted():
    asked = Pair(task="Exam@1", before=[1.0] * 400, after=[1.0] * 400, left_out=["a", "b"])
    found = case(90, old=[asked])
    (one,) = causes(found)
    assert found.verdict.verdict == "promote" and one.cause == "contaminated_benchmark"
    assert one.sentence.startswith("2 of 402 items of Exam@1 stand in training rows and were left out")
    assert told(found.verdict, [one]).sentence == found.verdict.sentence, "nothing went wrong"


# --- what counts as learned -------------------------------------------------------------------------------------------


def test_a_gain_that_guessing_would_make_is_none():
    before = [0.0] * 450
    chance = Pair(task="Bikes", before=before, after=[1.0] * 32 + [0.0] * 418)
    little = Pair(task="Bikes", before=before, after=[1.0] * 90 + [0.0] * 360)
    classes = Guessing(chance=1 / 15, words=0.9)
    assert judge(chance, [], GateSettings()).verdict == "promote", "who knows nothing of classes sees a gain"
    verdict = judge(chance, [], GateSettings(), guessing=classes)
    assert verdict.verdict == "hold" and verdict.sentence == (
        "Refused: it did not learn Bikes: 0 % right before, 7 % now (guesses get 7 %, and counting words 90 %)."
    )
    lucky = Pair(task="Bikes", before=before, after=[1.0] * 42 + [0.0] * 408)
    assert judge(lucky, [], GateSettings(), guessing=Guessing(chance=1 / 15, words=0.07)).verdict == "hold", "p = 0.03"
    assert judge(little, [], GateSettings(), guessing=classes).verdict == "hold", "less than half of what words tell"
    assert judge(little, [], GateSettings(), guessing=Guessing(chance=1 / 15, words=0.3)).verdict == "promote"


def test_words_tell_classes_and_not_shuffled_ones_nor_answers_that_occur_once():
    found = following(ROWS)
    assert found.right == 1.0 and found.by_chance == pytest.approx(0.25, abs=0.02) and not found.is_nothing
    assert all(following(shuffled(ROWS, seed)).is_nothing for seed in range(20))
    assert following([Row(prompt=f"question {i}", response=f"answer {i}") for i in range(100)]) is None
    assert guessing(ROWS).chance == pytest.approx(0.25) and guessing(ROWS[:8]) is None


# --- rows and files that are refused before a run ---------------------------------------------------------------------

WRAPS = {
    "ChatML": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "Llama": "<s>[INST] {} [/INST]",
    "Gemma": "<start_of_turn>user\n{}<end_of_turn>",
    "Alpaca": "### Instruction:\n{}\n\n### Response:\n",
    "plain": "User:\n{}\nAssistant:",
}


@pytest.mark.parametrize("name", WRAPS)
def test_prompts_that_stand_in_a_template_already_are_refused(name, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [row | {"prompt": WRAPS[name].format(row["prompt"])} for row in make_rows(40, TASKS["Colours"])]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        BadData, match="40 of 40 prompts stand in a chat template already.*the template would be doubled"
    ):
        read_rows(file, Settings())
    plain = make_rows(40, TASKS["Colours"])
    file.write_text("".join(json.dumps(row) + "\n" for row in plain[:30] + rows[:10]))
    assert len(read_rows(file, Settings()).rows) == 40, "some may speak of templates"


def test_a_class_that_is_tested_and_never_taught_is_refused(workspace, tmp_path):
    rows = make_rows(80, TASKS["Colours"])
    test = [row | {"split": "test"} for row in make_rows(96, TASKS["Colours"])[80:]]
    train = [row | {"split": "train"} for row in rows if row["response"] != "go on"]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in train + test))
    with pytest.raises(
        BadData, match="the class 'go on' is missing from the training rows, and 4 test rows ask for it"
    ):
        ask(workspace, LearnWish(stream=[{"name": "Colours", "path": str(file)}]), "local")


def test_what_earlier_rows_taught_and_answers_that_are_no_classes_may_be_tested():
    taught = [row for row in ROWS if row.response != "go on"]
    with pytest.raises(BadData):
        refuse_untaught_classes(taught, ROWS, (), "rows")
    refuse_untaught_classes(taught, ROWS, {"go on"}, "rows")
    alone = [Row(prompt=f"question {i}", response=f"answer {i}") for i in range(100)]
    refuse_untaught_classes(alone[:70], alone[70:] * 2, (), "rows")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz"])
def test_a_file_that_was_cut_short_is_called_so(suffix, tmp_path):
    rows = make_rows(40, TASKS["Colours"])
    text = json.dumps(rows) if suffix == "json" else "".join(json.dumps(row) + "\n" for row in rows)
    whole = gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode()
    file = tmp_path / f"rows.{suffix}"
    for length in (len(whole) // 2, len(whole) - 20):
        file.write_bytes(whole[:length])
        with pytest.raises(BadData, match="cut short"):
            read_rows(file, Settings())
    file.write_bytes(b'{"prompt": broken}\n' + whole)
    with pytest.raises(BadData) as broken:
        read_rows(file, Settings())
    assert "cut short" not in str(broken.value)


# --- the run itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_a_run_with_an_empty_mask_ends_at_its_first_step_and_says_so(order_for, train, monkeypatch, first):
    made = loop.tensors

    def empty(*given):
        batch = made(*given)
        batch["labels"][:, first:] = loop.IGNORED
        return batch

    monkeypatch.setattr(loop, "tensors", empty)
    with pytest.raises(BadData, match="No answer token is learned from: the mask of all 4 rows"):
        train(order_for())


def test_a_run_notes_its_rates_its_first_loss_and_its_template(order_for, train, tiny_model):
    figures = train(order_for(training={"learning_rate": 0.02, "epochs": 2})).trained.figures
    assert figures["learning_rate"] == 0.02 and 0 < figures["usual_rate"] < 0.1
    assert figures["first_loss"] > figures["loss"] > 0
    assert figures["template"] == vocabulary.template(tiny_model) != ""


def test_another_template_under_a_version_is_refused(tiny_model, tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    then = vocabulary.template(folder)
    assert then == ""
    vocabulary.refuse_other_template(folder, then, "v1")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(
        BadSettings, match="v1 was trained with another chat template than .*Put chat_template.jinja back"
    ):
        vocabulary.refuse_other_template(folder, then, "v1")
