"""What is measured is true: exact answers without generating, padding that changes nothing, figures as worked by hand."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from clm_app.data.rows import Row, dump
from clm_app.data.template import load_tokenizer
from clm_app.engine.batches import IGNORED, Encoded, answer_logits, tensors
from clm_app.engine.loop import Engine
from clm_app.engine.measure import outcomes, sit
from clm_app.judging.gate import exact_outcomes
from clm_app.judging.matrix import Matrix, retention, tracks
from clm_app.registry import versions
from store.tables import Job, Measurement, Run, Snapshot, Task, Version
from tests.smallest import TASKS, make_rows

CPU = torch.device("cpu")


# --- from a model to outcomes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_learned(tiny_model, tokenizer, tmp_path_factory):
    """(model, encoded, rows): a model that answers some of the rows and not others, rows of many lengths."""
    from clm_app.engine.order import Order
    from clm_app.engine.settings import TrainingSettings

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("half_learned")
    rng = random.Random(1)
    rows = [Row(**r) for task in TASKS.values() for r in make_rows(16, task)]
    rows = [Row(prompt=r.prompt + " and so on" * rng.randrange(9), response=r.response) for r in rows]
    dump(rows[:16], folder / "rows.jsonl")  # one task of three
    knobs = TrainingSettings(epochs=30, batch_rows=8, learning_rate=5e-3, least_steps=1, prompt_dropout=0.0)
    order = Order(
        folder=folder, base=tiny_model, adapter=None, rows=folder / "rows.jsonl", kept={}, strategy="naive",
        strategy_settings={}, method="full", method_settings={}, training=knobs, before=[], after=[], threads=1,
    )  # fmt: skip
    Engine(order, lambda event: None).run()
    model = AutoModelForCausalLM.from_pretrained(folder / "weights").eval()
    return model, Encoded(load_tokenizer(folder / "weights"), 512), rows


def test_exact_from_one_pass_is_what_greedy_generation_says_item_by_item(half_learned):
    model, encoded, rows = half_learned
    found = outcomes(model, rows, encoded, CPU)
    for row, line in zip(rows, found, strict=True):
        prompt, answer = encoded(row)
        ids = torch.tensor([prompt])
        said = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(answer), do_sample=False
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert line["exact"] == (said == answer) and line["item"] == row.key and line["tokens"] == len(answer)
    right = sum(line["exact"] for line in found)
    assert 8 <= right < len(rows), "the model must be right on some items and wrong on others, or this shows nothing"


def test_an_answer_that_only_begins_right_is_not_exact(half_learned):
    model, encoded, rows = half_learned
    known = next(r for r, line in zip(rows, outcomes(model, rows, encoded, CPU), strict=True) if line["exact"])
    longer, shorter = (
        Row(prompt=known.prompt, response=text) for text in (known.response + " now", known.response.split()[0])
    )
    assert [line["exact"] for line in outcomes(model, [known, longer, shorter], encoded, CPU)] == [True, False, False]


def test_padding_on_the_left_changes_nothing(half_learned):
    model, encoded, rows = half_learned
    lengths = {sum(map(len, encoded(row))) for row in rows}
    assert len(lengths) > 10
    with torch.no_grad():
        together, targets = answer_logits(model, tensors(rows, encoded, CPU))
        for i, row in enumerate(rows):
            alone, expected = answer_logits(model, tensors([row], encoded, CPU))
            width = expected.shape[1]
            assert torch.equal(targets[i, -width:], expected[0]) and (targets[i, :-width] == IGNORED).all()
            assert (together[i, -width:] - alone[0]).abs().max() < 1e-4
    batched, single = outcomes(model, rows, encoded, CPU), [outcomes(model, [row], encoded, CPU)[0] for row in rows]
    assert [line["exact"] for line in batched] == [line["exact"] for line in single]
    assert max(abs(b["loss"] - s["loss"]) for b, s in zip(batched, single, strict=True)) < 1e-4


def test_the_loss_is_that_of_the_answer_with_its_end_token_alone(half_learned):
    model, encoded, rows = half_learned
    prompt, answer = encoded(rows[0])
    assert answer[-1] == encoded.tokenizer.eos_token_id
    with torch.no_grad():
        every = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    expected = -sum(every[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
    assert outcomes(model, rows[:1], encoded, CPU)[0]["loss"] == pytest.approx(expected, abs=1e-4)


def test_an_exam_writes_each_item_and_says_the_means(half_learned, exam_on, tmp_path):
    model, encoded, rows = half_learned
    dump(rows, tmp_path / "test.jsonl")
    said = []
    event = sit(model, exam_on(tmp_path / "test.jsonl"), encoded, CPU, tmp_path / "after" / "1-test.jsonl", said.append)
    found = outcomes(model, rows, encoded, CPU)
    assert said == [event] and event.when == "after" and event.items == len(rows)
    assert event.exact_match == sum(line["exact"] for line in found) / len(rows)
    assert event.answer_loss == pytest.approx(
        sum(line["loss"] for line in found) / sum(line["tokens"] for line in found)
    )
    assert exact_outcomes(tmp_path / "after" / "1-test.jsonl") == {line["item"]: line["exact"] for line in found}


# --- the retention matrix --------------------------------------------------------------------------------------------

# Worked by hand: after task 1: 0.9; after task 2: 0.6 and 0.8; after task 3: 0.5, 0.7 and 1.0.
WORKED = [[0.9, None, None], [0.6, 0.8, None], [0.5, 0.7, 1.0]]


def test_the_figures_of_a_matrix_are_those_worked_by_hand():
    matrix = Matrix(tasks=list("abc"), versions=["v1", "v2", "v3"], values=WORKED)
    assert matrix.average_accuracy == pytest.approx((0.5 + 0.7 + 1.0) / 3)
    assert matrix.backward_transfer == pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2)
    assert matrix.just_learned == pytest.approx((0.9 + 0.8 + 1.0) / 3)
    single = Matrix(tasks=["a"], versions=["v1"], values=[[0.4]])
    assert (single.average_accuracy, single.backward_transfer, single.just_learned) == (0.4, 0.0, 0.4)


def test_the_matrix_is_read_from_the_record_as_it_was_measured(workspace):
    base = versions.base_version(workspace)
    with workspace.write() as session:
        session.add(Job(kind="learn"))
        for name in "abc":
            session.add(Task(name=name, key=name))
        session.flush()
        for track in ("main", "naive"):
            for i in range(3):
                if track == "main":
                    session.add(
                        Snapshot(task_id=i + 1, object="x", train_rows=1, validation_rows=1, test_rows=1, source="")
                    )
                    session.flush()
                run = Run(job_id=1, track=track, position=i, task_id=i + 1, snapshot_id=i + 1, parent_version_id=base.id,
                          strategy="naive", method="lora", seed=0, folder="")  # fmt: skip
                session.add(run)
                session.flush()
                made = Version(
                    name=f"{track}{i + 1}", track=track, run_id=run.id, kind="adapter", base_path="", base_digest=""
                )
                session.add(made)
                session.flush()
                for j, value in enumerate(WORKED[i][: i + 1] if track == "main" else []):
                    for split, metric, figure in (("test", "exact_match", value), ("test", "answer_loss", 9.0),
                                                  ("validation", "exact_match", 0.0)):  # fmt: skip
                        session.add(Measurement(version_id=made.id, task_id=j + 1, snapshot_id=j + 1, split=split,
                                                metric=metric, value=figure, items=10, object="x"))  # fmt: skip
    matrix = retention(workspace, 1)
    assert (matrix.tasks, matrix.versions, matrix.values) == (list("abc"), ["main1", "main2", "main3"], WORKED)
    assert retention(workspace, 1, "naive") is None and retention(workspace, 9) is None
    assert tracks(workspace, 1) == ["main", "naive"]
