"""What benchmarks promise: frozen once, clean of what was trained on, heard truly, heard once, and heard to the end."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from sqlmodel import select
from transformers import AutoModelForCausalLM

from clm_app import wishes
from clm_app.data import ingest
from clm_app.data.rows import Row
from clm_app.data.template import load_tokenizer, row_ids
from clm_app.engine import examining, measure, probing
from clm_app.engine.batches import Encoded
from clm_app.engine.examiner import ExaminationSettings, Paper, Sitting
from clm_app.errors import BadData, BadInput, BadModel, BadSettings, ChildFailed, NotThere
from clm_app.events import Failed, Measuring
from clm_app.judging import benchmarks, leakage
from clm_app.probes.kinds._base import BenchmarkItem
from clm_app.registry import versions
from clm_app.routes import Router
from clm_app.serving.backends.transformers import Transformers
from clm_app.serving.chat import ChatOptions, Message
from clm_app.settings import Settings
from clm_app.workspace import Workspace
from jobs.cycle import Cancelled
from jobs.examination import examine
from jobs.supervisor import spawn
from store.tables import AuditEvent, Version
from store.tables._columns import now
from tests.smallest import TASKS, make_rows

ITEMS = [{"prompt": f"Which colour has thing {i}?", "expected": answer}
         for i, answer in enumerate(["go on", "turn left", "stop here", "turn right"] * 5)]  # fmt: skip


@pytest.fixture(scope="module")
def newest(tmp_path_factory) -> Path:
    """An empty record with the newest schema: bringing one there takes a second, and thirty tests want one."""
    made = Workspace(Settings(home=tmp_path_factory.mktemp("newest")))
    made.close()
    return made.home / "record.sqlite"


@pytest.fixture
def workspace(newest, tmp_path, tiny_model):
    """A fresh home over the tiny model."""
    (tmp_path / "home").mkdir()
    shutil.copy(newest, tmp_path / "home")
    made = Workspace(Settings(home=tmp_path / "home", base_model=str(tiny_model), threads=1))
    yield made
    made.close()


def make(workspace, name="Things", items=ITEMS, kind="exact_match", **settings):
    return benchmarks.from_items(workspace, name, items, kind, settings, "Ada")


def audited(workspace, action: str) -> list[dict]:
    with workspace.read() as session:
        return [e.detail for e in session.exec(select(AuditEvent).where(AuditEvent.action == action))]


def written(file: Path, lines: list[dict]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


# --- made once --------------------------------------------------------------------------------------------------------

SAME = [{"prompt": "How long?", "expected": "an hour", "label": "time", "split": "validation"},
        {"prompt": "Which one?", "expected": "the red one", "label": "", "split": "test"}]  # fmt: skip


def as_jsonl(folder: Path) -> Path:
    return written(folder / "a.jsonl", SAME)


def as_packed_json(folder: Path) -> Path:
    file = folder / "b.json.gz"
    file.write_bytes(gzip.compress(json.dumps(SAME).encode()))
    return file


def as_csv_with_other_names(folder: Path) -> Path:
    file = folder / "c.csv"
    file.write_text("Question,Answer,label,Split\nHow long?,an hour,time,dev\nWhich one?,the red one,,test\n")
    return file


def as_parquet(folder: Path) -> Path:
    from store.db import query

    query(f"COPY (SELECT * FROM read_json('{written(folder / 'd.jsonl', SAME)}')) TO '{folder / 'd.parquet'}'")
    return folder / "d.parquet"


@pytest.mark.parametrize("write", [as_jsonl, as_packed_json, as_csv_with_other_names, as_parquet])
def test_the_same_items_are_the_same_benchmark_whatever_file_they_come_in(workspace, tmp_path, write):
    row = benchmarks.from_file(workspace, "Words", write(tmp_path), "exact_match", {}, "Ada")
    by_hand = benchmarks.from_items(workspace, " words ", SAME, "exact_match", {}, "Ada")
    assert (row.id, row.version, row.validation_items, row.test_items) == (by_hand.id, 1, 1, 1)
    (item,) = benchmarks.items_of(workspace, row, "validation")
    assert (item.prompt, item.expected, item.label) == ("How long?", "an hour", "time")


def test_columns_of_a_csv_hold_rubrics_and_choices(workspace, tmp_path):
    file = tmp_path / "pick.csv"
    file.write_text('prompt,expected,choices,rubric\nA?,go,go|go on,\nB?,go on,"[""go"", ""go on""]",{}\n')
    row = benchmarks.from_file(workspace, "Pick", file, "multiple_choice", {}, "Ada")
    items = [item for part in ("validation", "test") for item in benchmarks.items_of(workspace, row, part)]
    assert [item.choices for item in items] == [["go", "go on"]] * 2


def test_without_a_split_items_are_halved_by_class_and_equal_prompts_stay_together(workspace):
    items = [*ITEMS, *({"prompt": one["prompt"].upper() + " ", "expected": "another"} for one in ITEMS[:6])]
    row = make(workspace, items=items, compare="letters")
    parts = [benchmarks.items_of(workspace, row, part) for part in ("validation", "test")]
    prompts = [{leakage.plain(item.prompt) for item in part} for part in parts]
    assert not prompts[0] & prompts[1] and sum(map(len, parts)) == len(items)
    assert abs(len(prompts[0]) - len(prompts[1])) <= 1
    assert [len({item.group for item in part} - {"another"}) for part in parts] == [4, 4], "every class in both halves"


def test_a_version_never_changes_and_other_content_is_the_next_one(workspace):
    first = make(workspace)
    assert make(workspace).id == first.id, "the same content is there already"
    others = [
        make(workspace, items=ITEMS[:-1]),
        make(workspace, template="Tell me: {prompt}"),
        make(workspace, kind="token_f1"),
    ]
    assert [row.version for row in others] == [2, 3, 4]
    assert (
        benchmarks.find(workspace, "things").version == 4
        and benchmarks.find(workspace, "Things@1").object == first.object
    )
    assert make(workspace).version == 1, "an old one is found again behind newer ones"
    assert [told["name"] for told in audited(workspace, "benchmark.made")] == [f"Things@{i}" for i in (1, 2, 3, 4)]
    with pytest.raises(NotThere, match=r"There is no benchmark 'Things@9'. Benchmarks are Things@4, Things@3"):
        benchmarks.find(workspace, "Things@9")


def test_items_that_were_changed_on_disk_are_never_judged_by(workspace):
    row = make(workspace)
    file = workspace.objects.path(row.object) / "test.jsonl"
    file.chmod(0o600)
    file.write_text(file.read_text().replace("go on", "go off"))
    with pytest.raises(BadData, match="Things@1 are not what was frozen"):
        benchmarks.items_of(workspace, row, "test")


def test_a_tasks_held_out_rows_become_a_benchmark_as_they_are(workspace, rows_file):
    taken = ingest.snapshot(workspace, "Colours", rows_file(60, TASKS["Colours"]), "Ada")
    row = benchmarks.from_task(workspace, "colours", "exact_match", {}, "Ada")
    assert (row.name, row.validation_items, row.test_items) == ("Colours", taken.validation_rows, taken.test_rows)
    held_out = ingest.rows_of(workspace, taken, "test")
    assert [(i.prompt, i.expected) for i in benchmarks.items_of(workspace, row, "test")] == [
        (r.prompt, r.response) for r in held_out
    ]


@pytest.mark.parametrize("items, kind, settings, said", [
    ([{"text": "", "answer": "x"}], "exact_match", {}, "the page, item 1: prompt is ''; it must be a text"),
    ([{"ask": "a"}], "exact_match", {}, "the page has the columns ask; a prompt column"),
    ([{"prompt": "a"}], "exact_match", {}, "the page, item 1: .*has no expected answer"),
    ([{"prompt": "a", "expected": "b", "rubric": "{"}], "exact_match", {}, "rubric is not JSON"),
    ([{"prompt": "a", "expected": "b", "choices": {}}], "exact_match", {}, "choices is dict; it must be a list"),
    ([{"prompt": "a", "expected": "b", "split": "exam"}], "exact_match", {}, "split is 'exam'; it is one of train"),
    ([{"prompt": "a", "expected": "b", "split": "dev"}], "exact_match", {}, "no item to test on"),
    ([{"prompt": "a", "expected": "b", "split": "test"}, {"prompt": "c", "expected": "d"}], "exact_match", {}, "others none"),
    ([{"prompt": "a", "expected": "b", "split": "train"}], "exact_match", {}, r"0 in all, after the training rows"),
    ([], "exact_match", {}, "no item to test on"),
    ([{"prompt": "a" * 70_000, "expected": "b"}], "exact_match", {}, "at most 64 kB fit a row"),
    (ITEMS, "exact", {}, "'exact' is not among the kinds: "),
    (ITEMS, "exact_match", {"colour": 1}, "kind exact_match cannot be set so: colour"),
    (ITEMS, "exact_match", {"template": "no place"}, "a template without"),
])  # fmt: skip
def test_what_cannot_be_judged_by_is_refused_in_a_sentence(workspace, items, kind, settings, said):
    with pytest.raises((BadData, BadSettings), match=said):
        make(workspace, items=items, kind=kind, **settings)
    assert benchmarks.everything(workspace) == []


@pytest.mark.parametrize("name", ["", "a/b", "a@1", "x" * 81])
def test_a_name_that_could_not_be_asked_for_is_refused(workspace, name):
    with pytest.raises(BadData, match="needs 1 to 80 characters without slashes, @"):
        make(workspace, name=name)


# --- leaks ------------------------------------------------------------------------------------------------------------

LONG = "my desk lamp flickers every evening since the storm and the switch gets warm"


@pytest.mark.parametrize("item, row, how", [
    ("What is my balance?", "what is  my balance", "exact"),
    (LONG, LONG + " too", "near"),
    ("put milk on my shopping list", "hello, please PUT milk on my shopping list because we are out of it", "inside"),
    ("I owe 12 + 35 to them, how much?", "i owe 12 + 35 to them how much", "exact"),
    ("I owe 12 + 35 to them, how much?", "I owe 12 + 36 to them, how much?", None),
    ("I owe 12 + 35 to them, how much?", "I owe 12 - 35 to them, how much?", None),
    ("how do i freeze my card", "how long is the queue at the bank", None),
    ("what is it", "tell me what is it that you do all day long", None),
    ("???", "!!!", None),
])  # fmt: skip
def test_what_counts_as_read_before(item, row, how):
    found = [one.how for one in leakage.Index([leakage.plain(item)]).alike(leakage.plain(row))]
    assert found == ([how] if how else [])


def test_near_duplicates_are_exactly_those_that_comparing_every_pair_finds():
    words = [f"{a} {b} {c} {d}" for a in ("red", "green") for b in ("lamp", "bike", "plan") for c in ("is", "was", "be")
             for d in ("on the table", "on a table", "under the tables", "off")]  # fmt: skip
    texts, rows, found = words[::2], [f"the {text}" for text in words], 0
    index = leakage.Index(texts)
    for row in rows:
        near = {one.place for one in index.alike(row) if one.how == "near"}
        sets = [(leakage.letters(text), leakage.letters(row)) for text in texts]
        assert near == {i for i, (a, b) in enumerate(sets) if len(a & b) / len(a | b) >= 0.8}
        found += len(near)
    assert found > 10


def test_a_thousand_items_are_looked_for_in_many_rows_within_seconds():
    texts = [
        f"question {i} asks {i * 7} about the {i % 13}th lamp of house {i % 29} in the long street" for i in range(1000)
    ]
    rows = [
        f"row {i} tells {i * 3} about the {i % 17}th lamp of house {i % 31} in the long street" for i in range(2500)
    ]
    index, began = leakage.Index(texts), time.process_time()
    assert [one for row in [*rows, texts[7]] for one in index.alike(row)] == [leakage.Alike(7, "exact", 1.0)]
    assert (time.process_time() - began) * 50_000 / len(rows) < 20, "seconds for 50,000 rows that are all much alike"


def test_a_leak_is_named_with_its_task_and_left_out_also_where_it_is_trained_on_later(workspace, rows_file):
    rows = [{"prompt": f"Thing {i} of the other sort, what is it?", "response": "no idea"} for i in range(20)]
    row = make(workspace)
    assert benchmarks.clean_items(workspace, row, "test").left_out == [] and row.report["leakage"]["leaks"] == []
    leaking = benchmarks.items_of(workspace, row, "test")[0]
    rows += [{"prompt": leaking.prompt.upper(), "response": "x", "split": "train"}]
    rows = [one | {"split": one.get("split", ("train", "val", "test")[i % 3])} for i, one in enumerate(rows)]
    taken = ingest.snapshot(workspace, "Other", written(workspace.home / "other.jsonl", rows), "Ada")
    clean = benchmarks.clean_items(workspace, row, "test")
    assert clean.left_out == [leaking.key] and len(clean.items) == row.test_items - 1
    (leak,) = benchmarks.leakage_of(benchmarks.find(workspace, "Things")).leaks
    assert (leak.task, leak.snapshot_id, leak.how, leak.closeness) == ("Other", taken.id, "exact", 1.0)
    assert audited(workspace, "benchmark.leaks_found") == [{"name": "Things@1", "items": 1, "tasks": ["Other"]}]


def test_held_out_rows_of_a_snapshot_leak_nothing_but_rows_that_a_version_keeps_do(workspace):
    row = make(workspace)
    leaking = benchmarks.items_of(workspace, row, "test")[1]
    rows = [{"prompt": f"number {i} and {i}", "response": "a", "split": ("train", "val")[i % 2]} for i in range(20)]
    rows += [{"prompt": leaking.prompt, "response": "a", "split": "test"}]
    taken = ingest.snapshot(workspace, "Other", written(workspace.home / "other.jsonl", rows), "Ada")
    assert benchmarks.clean_items(workspace, row, "test").left_out == []
    kept = workspace.objects.put_bytes(Row(prompt=leaking.prompt, response="a").model_dump_json().encode() + b"\n")
    base = versions.base_version(workspace)
    with workspace.write() as session:
        session.add(Version(name="v1", parent_id=base.id, kind="full", base_path="x", base_digest="x",
                            memory={str(taken.id): kept, "state/ewc": "z"}))  # fmt: skip
    assert benchmarks.clean_items(workspace, row, "test").left_out == [leaking.key]


# --- what is heard ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed(tiny_model, tmp_path_factory) -> Path:
    """A version whose router sends colours to other weights than the base's."""
    folder = tmp_path_factory.mktemp("routed")
    router = Router()
    router.folders["Colours"] = "adapters/0000"
    router.add("Colours", [row["prompt"] for row in make_rows(24, TASKS["Colours"])])
    router.save(folder)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    model.save_pretrained(folder / "adapters/0000")
    return folder


PROMPTS = ["red now", "blue again please", "nothing known <|end|> at all", "ünï ☃ code", "go"]
CHOICES = ["go on", "go", "turn left", "<|end|>"]


@pytest.fixture
def sitting(tiny_model, tmp_path):
    """Return a function that makes an order without papers for the tiny model, in a folder of its own."""

    def make(on="trained", adapter=None, batch_tokens=64, max_new_tokens=6) -> Sitting:
        folder = tmp_path / f"sitting-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return Sitting(
            folder=folder, version="v1", base=tiny_model, adapter=adapter, on=on, backend="transformers", threads=1,
            converted=folder / "copy", papers=[],
            run=ExaminationSettings(batch_tokens=batch_tokens, max_new_tokens=max_new_tokens),
        )  # fmt: skip

    return make


@pytest.fixture
def sits(sitting):
    """Return a function that lets a version sit items in this process and returns the lines, in the items' order.

    partial: what an earlier child left. heard: takes the events.
    """

    def do(items, kind, settings=None, partial="", heard=None, **told):
        order = sitting(**told)
        (order.folder / "items.jsonl").write_text("".join(item.model_dump_json() + "\n" for item in items))
        (order.folder / "k.partial").write_text(partial)
        paper = Paper(key="k", name="Things@1", kind=kind, settings=settings or {}, split="test",
                      file=order.folder / "items.jsonl")  # fmt: skip
        examining.sit_all(order.model_copy(update={"papers": [paper]}), (heard if heard is not None else []).append)
        found = [json.loads(line) for line in (order.folder / "k.jsonl").read_text().splitlines()]
        assert [line["item"] for line in found] == [item.key for item in items]
        assert not (order.folder / "k.partial").exists()
        return found

    return do


@pytest.fixture(scope="module")
def replies(tiny_model, tmp_path_factory):
    """What the model that is served says to PROMPTS, at most six tokens."""
    backend = Transformers(tiny_model, None, 1, tmp_path_factory.mktemp("copy") / "c")
    told = [[Message(role="user", content=prompt)] for prompt in PROMPTS]
    return ["".join(p.text for p in backend.stream(m, ChatOptions(max_tokens=6), lambda: False)) for m in told]


@pytest.mark.parametrize("on", ["trained", "served"])
def test_right_answers_are_heard_as_the_measure_of_training_hears_them(sits, tiny_model, on):
    items = [BenchmarkItem(prompt=p, expected=e) for p in PROMPTS for e in ("go on", "turn <|end|> left")]
    lines = sits(items, "exact_match", on=on)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), load_tokenizer(tiny_model)
    rows = [Row(prompt=item.prompt, response=item.expected) for item in items]
    known = measure.outcomes(model, rows, Encoded(tokenizer, 512), torch.device("cpu"))
    for line, one, row in zip(lines, known, rows, strict=True):
        assert line["loss"] == pytest.approx(one["loss"], abs=1e-3) and line["tokens"] == len(
            row_ids(tokenizer, row)[1]
        )
        assert bool(line["score"]) == one["exact"]


@pytest.mark.parametrize("on", ["trained", "served"])
def test_replies_are_those_that_a_person_would_get(sits, replies, on):
    items = [BenchmarkItem(prompt=prompt, expected="x") for prompt in PROMPTS]
    assert [line["text"] for line in sits(items, "token_f1", on=on)] == replies and len(set(replies)) > 2


@pytest.mark.parametrize("on", ["trained", "served"])
@pytest.mark.parametrize("batch_tokens", [1, 200])
def test_choices_are_heard_each_with_its_end_whatever_fits_a_batch(sits, sitting, on, batch_tokens):
    items = [BenchmarkItem(prompt=prompt, expected="go", choices=CHOICES) for prompt in PROMPTS]
    forced = [BenchmarkItem(prompt=prompt, expected=choice) for prompt in PROMPTS for choice in CHOICES]
    each = iter([(line["loss"], line["tokens"]) for line in sits(forced, "exact_match", on=on)])
    candidate = {"trained": examining.Trained, "served": examining.Served}[on](sitting(on, batch_tokens=batch_tokens))
    found = {
        one.place: one.heard for batch in candidate.hear(benchmarks.made("multiple_choice", {}), items) for one in batch
    }
    for place in range(len(items)):
        losses, tokens = zip(*(next(each) for _ in CHOICES), strict=True)
        assert found[place].choices == pytest.approx(losses, abs=1e-4) and found[place].choice_tokens == tokens


@pytest.mark.parametrize("on", ["trained", "served"])
@pytest.mark.parametrize("window", [256, 16])
def test_running_text_is_heard_as_the_probes_hear_it(sits, tiny_model, on, window):
    items = [
        BenchmarkItem(prompt=" ".join([prompt] * times)) for prompt, times in zip(PROMPTS[2:], (20, 3, 1), strict=True)
    ]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), load_tokenizer(tiny_model)
    known = probing.likelihoods(model, [item.prompt for item in items], tokenizer, window)
    lines = sits(items, "perplexity", {"window_tokens": window}, on=on)
    for line, one in zip(lines, known, strict=True):
        assert line["loss"] == pytest.approx(one.nats, rel=1e-5) and line["tokens"] == one.tokens


@pytest.mark.parametrize("on", ["trained", "served"])
def test_each_item_is_answered_through_the_adapter_that_its_router_names(sits, routed, on):
    items = [BenchmarkItem(prompt=prompt, expected="go on") for prompt in PROMPTS]
    bare, lines = sits(items, "exact_match", on=on), sits(items, "exact_match", on=on, adapter=routed)
    differs = [abs(one["loss"] - other["loss"]) > 0.01 for one, other in zip(bare, lines, strict=True)]
    assert differs == [True, True, False, False, False]
    if on == "trained":
        assert [line["route"] for line in lines] == ["Colours", "Colours", "", "", ""]


@pytest.mark.parametrize("kind, on", [("exact_match", "trained"), ("token_f1", "trained"), ("token_f1", "served")])
def test_an_item_that_does_not_fit_is_no_other_question_but_too_long(sits, kind, on):
    items = [BenchmarkItem(prompt=prompt, expected="go") for prompt in ("red", "red " * 600, "red " * 150)]
    lines = sits(items, kind, on=on, max_new_tokens=300 if on == "trained" else 3)
    assert [line.get("too_long", 0) > 512 for line in lines] == [False, True, False]
    with pytest.raises(BadData, match=r"No item of Things@1 fits: the shortest needs 1,2\d\d tokens.*reads 512"):
        sits(items[1:2], kind, on=on)


def test_a_reply_that_has_less_room_is_what_it_would_be_alone(sits):
    items = [BenchmarkItem(prompt=prompt, expected="go") for prompt in ("red", "blue " * 480, "green")]
    together, (alone,) = sits(items, "token_f1", max_new_tokens=60), sits(items[1:2], "token_f1", max_new_tokens=60)
    assert together[1]["text"] == alone["text"] and len(together[0]["text"]) > len(alone["text"])


def test_a_torn_line_is_heard_again_and_whole_ones_are_not(sits):
    items, heard = [BenchmarkItem(prompt=prompt, expected="go") for prompt in PROMPTS], []
    lines = sits(items, "exact_match")
    kept = "".join(json.dumps(line | {"loss": 1.5, "took_s": 0.25}) + "\n" for line in lines[:2])
    again = sits(items, "exact_match", partial=kept + json.dumps(lines[2])[:20], heard=heard)
    assert [line["loss"] for line in again] == pytest.approx([1.5, 1.5, *(line["loss"] for line in lines[2:])])
    assert (heard[0].kind, heard[0].done, heard[0].of) == ("measuring", 2, 5)
    assert heard[-1].kind == "examined" and heard[-1].seconds > 0.5, "what the first child took is counted"


# --- heard once, and to the end -----------------------------------------------------------------------------------------


class Children:
    """Starts real children, counts them, and kills the first ones as soon as they have heard something."""

    def __init__(self, killed: int = 0) -> None:
        self.started, self.killed, self.said = 0, killed, []

    def __call__(self, command, *, on_event, **named):
        self.started += 1
        number = self.started

        def hear(event):
            self.said.append((number, event))
            on_event(event)
            if number <= self.killed and isinstance(event, Measuring) and event.done:
                os.kill(child.pid, signal.SIGKILL)

        child = spawn(command, on_event=hear, **named)
        return child


class Here:
    """Stands for children: each one sits its papers in this process before it is waited for. They are counted."""

    def __init__(self) -> None:
        self.started, self.last = 0, ["its last word"]

    def __call__(self, command, *, on_event, **named):
        self.started += 1
        examining.sit_all(Sitting.model_validate_json(Path(command[-1]).read_text()), on_event)
        return self

    def wait(self, timeout_s: float) -> int:
        return 0

    def stop(self) -> None:
        """Nothing runs."""


def quiet(stage: str, share: float) -> None:
    assert stage and 0 <= share <= 1


def test_a_killed_child_goes_on_behind_what_it_heard_and_nothing_is_heard_twice(workspace, sits):
    items = [{"prompt": f"thing {i} then", "expected": "go on", "split": "test"} for i in range(400)]
    row, children = make(workspace, items=items), Children(killed=1)
    slow = ExaminationSettings(batch_tokens=1)
    (reading,) = examine(workspace, children, versions.live(workspace), [row], "test", "trained", quiet, run=slow)
    first, second = ([e for n, e in children.said if n == number] for number in (1, 2))
    assert children.started == 2 and first[-1].kind == "measuring" and second[0].done >= first[-1].done > 0
    lines = [json.loads(line) for line in workspace.objects.path(reading.object).read_text().splitlines()]
    whole = sits([BenchmarkItem(prompt=i["prompt"], expected="go on") for i in items], "exact_match", batch_tokens=1)
    assert lines == whole and reading.items == 400, "as if nothing had happened"
    assert not list((workspace.home / "examinations").glob("*")), "nothing is left lying about"


def test_what_was_heard_is_not_asked_again_and_a_later_leak_needs_no_child(workspace):
    row, children = make(workspace, template="Say: {prompt}"), Here()
    other, live = make(workspace, "Others", ITEMS[:8], "token_f1"), versions.live(workspace)

    def sit(*rows, **named):
        return examine(workspace, children, live, rows, "test", "trained", quiet, **named)

    first = sit(row, other)
    assert children.started == 1, "the version is loaded once for both"
    assert [r.id for r in sit(row, other)] == [r.id for r in first] and children.started == 1
    (again,) = sit(other, since=now())
    assert children.started == 2 and again.id not in {r.id for r in first}, "asked again where a person says why"
    children.started = 1
    assert sit(row, run=ExaminationSettings(batch_tokens=9))[0].id == first[0].id, (
        "how many at once is not what is asked"
    )
    with workspace.write() as session:
        session.add(twin := Version(**live.model_dump(exclude={"id", "name"}), name="twin"))
    (same,) = examine(workspace, children, twin, [row], "test", "trained", quiet)
    assert children.started == 1 and (same.version_id, same.key, same.value) == (twin.id, first[0].key, first[0].value)
    leaking = benchmarks.items_of(workspace, row, "test")[0]
    rows = [{"prompt": leaking.prompt, "response": "a"}, *make_rows(20)]
    rows = [one | {"split": ("train", "val", "test")[i % 3]} for i, one in enumerate(rows)]
    ingest.snapshot(workspace, "Other", written(workspace.home / "other.jsonl", rows), "Ada")
    (later,) = sit(row)
    assert children.started == 1 and later.id != first[0].id and later.object == first[0].object
    assert later.figures["left_out"] == {"leaking": 1, "too_long": 0} and later.items == first[0].items - 1
    assert audited(workspace, "benchmark.read")[-1]["version"] == "v0"


def test_other_weights_settings_splits_and_backends_are_other_keys(workspace):
    from jobs.examination import Asked

    row, live = make(workspace), versions.live(workspace)
    given = {
        "version": live,
        "row": row,
        "split": "test",
        "on": "trained",
        "backend": "engine",
        "run": ExaminationSettings(),
    }
    changes = [{"version": Version(name="v1", base_digest=live.base_digest, object="x")}, {"split": "validation"},
               {"row": make(workspace, template="Say {prompt}")}, {"row": make(workspace, items=ITEMS[:9])}, {"on": "served"},
               {"backend": "transformers"}, {"run": ExaminationSettings(max_new_tokens=3)}]  # fmt: skip
    assert len({Asked(**given | change).key for change in [{}, *changes]}) == len(changes) + 1


def test_items_that_all_leak_judge_nobody(workspace):
    row, live = make(workspace, items=ITEMS[:4]), versions.live(workspace)
    rows = [{"prompt": item["prompt"], "response": "a", "split": "train"} for item in ITEMS[:4]]
    rows += [one | {"split": ("val", "test")[i % 2]} for i, one in enumerate(make_rows(10))]
    ingest.snapshot(workspace, "Other", written(workspace.home / "other.jsonl", rows), "Ada")
    outcomes = [{"item": item.key, "score": 1.0} for item in benchmarks.items_of(workspace, row, "test")]
    from jobs.examination import Asked, Heard, _reading

    digest = workspace.objects.put_bytes("".join(json.dumps(line) + "\n" for line in outcomes).encode())
    asked = Asked(live, row, "test", "trained", "engine", ExaminationSettings())
    with pytest.raises(BadData, match="None of the 2 test items of Things@1 can judge v0: 2 stand in training rows"):
        _reading(workspace, asked, Heard(digest, 1.0), "Ada")


def test_a_job_that_is_cancelled_ends_its_child(workspace):
    row, children = make(workspace), Children()
    started = []

    def spawned(*arguments, **named):
        started.append(children(*arguments, **named))
        return started[-1]

    def stop(stage, share):
        raise Cancelled

    with pytest.raises(Cancelled):
        examine(workspace, spawned, versions.live(workspace), [row], "test", "trained", stop)
    assert not started[0].is_alive()


class Failing(Here):
    """A child that says what it is told to say and ends without having heard anything."""

    def __init__(self, *events) -> None:
        super().__init__()
        self.events = events

    def __call__(self, command, *, on_event, **named):
        self.started += 1
        for event in self.events:
            on_event(event)
        return self


def test_a_child_that_cannot_go_on_says_why_and_one_that_is_always_killed_is_given_up(workspace):
    row, live = make(workspace), versions.live(workspace)
    for child, said, tried in [
        (Failing(Failed(sentence="Memory ran out.")), "Memory ran out.", 1),
        (Failing(), "ended from outside 3 times, last with: its last word", 3),
    ]:  # fmt: skip
        with pytest.raises(ChildFailed, match=said):
            examine(workspace, child, live, [row], "test", "trained", quiet)
        assert child.started == tried and benchmarks.readings(workspace, row) == []


# --- through the app --------------------------------------------------------------------------------------------------


def test_a_wish_is_checked_whole_before_it_is_written_down(workspace):
    make(workspace, items=[one | {"split": "test"} for one in ITEMS])
    ask = lambda **wish: wishes.ask_examination(workspace, wishes.ExamineWish(benchmarks=["Things"], **wish), "Ada")  # noqa: E731
    for wish, error, said in [
        ({"fresh": True}, BadInput, "needs a reason"), ({"versions": ["v9"]}, NotThere, "There is no version 'v9'"),
        ({"split": "validation"}, BadData, "Things@1 has no validation items"),
    ]:  # fmt: skip
        with pytest.raises(error, match=said):
            ask(**wish)
    weights = next(Path(versions.live(workspace).base_path).glob("*.safetensors"))
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:-9])
        with pytest.raises(BadModel, match="it was cut short"):
            ask()
    finally:
        weights.write_bytes(whole)
    assert audited(workspace, "job.asked") == []
    job = ask(fresh=True, reason="the graphics card was changed")
    assert job.wish["benchmarks"] == ["Things@1"] and job.wish["versions"] == ["v0"], (
        "what is meant now, whatever comes"
    )
    assert audited(workspace, "job.asked")[0]["reason"] == "the graphics card was changed"


def test_from_a_file_to_readings_through_the_api(open_app, tmp_path):
    app, file = open_app(), written(tmp_path / "Things.jsonl", ITEMS)
    answer = app.client.post("/api/benchmarks", data={"kind": "exact_match"}, files={"file": open(file, "rb")})
    assert answer.status_code == 201 and answer.json()["title"] == "Things@1", answer.text
    for form, said in [
        ({"kind": "exact_match", "name": "X"}, "Give exactly one of the three"),
        ({"kind": "exact_match", "name": "X", "items": "[1]"}, "it must be a JSON list of objects"),
        ({"kind": "exact_match", "name": "X", "items": "[]", "settings": "["}, "settings is not JSON"),
        ({"kind": "exact_match", "task": "Nothing"}, "There is no task 'Nothing'"),
    ]:  # fmt: skip
        refused = app.client.post("/api/benchmarks", data=form)
        assert refused.status_code in (400, 404) and said in refused.text
    told = app.client.post("/api/benchmarks", data={"kind": "token_f1", "name": "Page", "items": json.dumps(ITEMS[:6])})
    assert told.status_code == 201 and [row["title"] for row in app.get("/api/benchmarks")] == ["Page@1", "Things@1"]
    assert {row["key"] for row in app.get("/api/benchmarks/Things@1/items?split=test&limit=3")} and (
        app.get("/api/benchmarks/things")["leaking_items"] == 0
    )
    asked = app.client.post("/api/examine", json={"benchmarks": ["Things", "Page"], "on": "served"})
    assert asked.status_code == 201, asked.text
    job = app.follow(asked.json()["id"])
    assert job["status"] == "done" and len(job["result"]["readings"]) == 2, job["error"]
    (reading,) = app.get("/api/benchmarks/Things/readings")
    assert (reading["version"], reading["on"], reading["backend"], reading["items"]) == (
        "v0",
        "served",
        "transformers",
        10,
    )
    assert reading["low"] <= reading["value"] <= reading["high"] and reading["figures"]["left_out"]["leaking"] == 0
    assert app.client.post("/api/examine", json={"benchmarks": ["Nothing"]}).status_code == 404
