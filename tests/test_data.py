"""What a person gives: every file is read alike or refused in one sentence, and a refusal leaves nothing behind."""

from __future__ import annotations

import asyncio
import csv
import errno
import gzip
import json
import random
from pathlib import Path
from types import SimpleNamespace

import duckdb
import httpx
import pytest
from pydantic import ValidationError
from sqlmodel import select

from clm_app import wishes
from clm_app.data import streams
from clm_app.data.ingest import rows_of, snapshot, split, tasks
from clm_app.data.reading import read_rows
from clm_app.data.rows import Row, load
from clm_app.engine import memory
from clm_app.errors import BadData, BadInput, BadModel, BadSettings, ClmError, NotThere, OutOfRoom, plain
from clm_app.registry import versions
from clm_app.settings import Settings
from clm_app.wishes import LearnWish, ask
from clm_app.workspace import Workspace
from store.tables import AuditEvent, Decision, Job, Measurement, Run, Snapshot, Task
from tests.smallest import make_rows

SETTINGS = Settings()
GOOD = make_rows(40)


def text_of(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def count_rows(workspace) -> dict[str, int]:
    """Return how many rows there are of everything that a wish or a file can leave behind."""
    with workspace.read() as session:
        kinds = (Task, Snapshot, Job, Run, Measurement, Decision, AuditEvent)
        return {kind.__name__: len(session.exec(select(kind)).all()) for kind in kinds}


def objects_of(workspace) -> list[Path]:
    return [p for p in workspace.objects.root.rglob("*") if p.is_file()]


# --- what is refused -------------------------------------------------------------------------------------------------

# name: (file name, content, what the sentence says of the value, of the rule, of the next step)
BAD_FILES = {
    "wrong columns": ("a.csv", "colour,size\nred,1\n", "colour, size", "are needed", "Rename two columns"),
    "only one column": ("a.jsonl", '{"prompt": "a"}\n', "the columns prompt", "a response column", "Rename"),
    "empty": ("a.jsonl", "", "a.jsonl has no rows", "at least 10 rows", "Give a file"),
    "only blank lines": ("a.jsonl", "\n \n\n", "a.jsonl has no rows", "at least 10 rows", "Give a file"),
    "an empty table": ("a.csv", "prompt,response\n", "a.csv has no rows", "at least 10 rows", "Give a file"),
    "an empty list": ("a.json", "[]", "a.json has no rows", "at least 10 rows", "Give a file"),
    "one row": ("a.jsonl", text_of(GOOD[:1]), "1 different row;", "at least 10", "Add rows"),
    "one row said often": ("a.jsonl", text_of(GOOD[:1] * 50), "1 different row;", "at least 10", "Add rows"),
    "a row of 10 MB": ("a.jsonl", text_of([*GOOD, {"prompt": "x" * 10_000_000, "response": "y"}]),
                       "line 41: the row has 10000 kB", "at most 64 kB", "Shorten it"),
    "broken UTF-8": ("a.jsonl", text_of(GOOD[:4]).encode() + b'{"prompt": "caf\xe9", "response": "x"}\n',
                     "line 5: byte 0xe9", "is not UTF-8", "Save the file as UTF-8"),
    "a broken line": ("a.jsonl", text_of(GOOD[:2]) + '{"prompt": "a", \n', "line 3 is not JSON", "Each line is one object",
                      "with prompt and response"),
    "a line that is no object": ("a.jsonl", text_of(GOOD[:2]) + "[1, 2]\n", "line 3 is list", "not an object", "Each line is"),
    "a line nested too deep": ("a.jsonl", text_of(GOOD[:2]) + "[" * 200_000, "line 3", "is not JSON", "Each line is"),
    "JSON cut off": ("a.json", '[{"prompt": "a"', "a.json is not JSON", "Give a list of objects", ".jsonl file"),
    "JSON nested too deep": ("a.json", "[" * 200_000, "a.json is not JSON", "Give a list of objects", ".jsonl file"),
    "JSON without a list": ("a.json", '{"prompt": "a"}', "a.json", "not a list of objects", "Give ["),
    "an empty response": ("a.jsonl", text_of([*GOOD, {"prompt": "a", "response": "  "}]), "line 41: response is '  '",
                          "not empty", "Fill it or drop the row"),
    "no response": ("a.jsonl", text_of([*GOOD, {"prompt": "a"}]), "line 41: response is 'None'", "not empty", "Fill it"),
    "a response that is no text": ("a.jsonl", text_of([*GOOD, {"prompt": "a", "response": {"b": 1}}]), "line 41: response",
                                   "must be a text", "Fill it"),
    "half a surrogate pair": ("a.jsonl", text_of(GOOD) + '{"prompt": "a\\ud800", "response": "b"}\n', "line 41: character 1",
                              "half of a surrogate pair", "Mend that row"),
    "a chat without an answer": ("a.jsonl", text_of([{"messages": [{"role": "user", "content": "a"}]}]), "line 1: messages",
                                 "need a user and an assistant turn", "Mend that row"),
    "broken gzip": ("a.jsonl.gz", b"\x1f\x8b\x08 this is no gzip", "a.jsonl.gz cannot be read", ":", "save it again"),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(text_of(GOOD).encode())[:60], "a.jsonl.gz cannot be read", ":", "save it"),
    "a table with a broken quote": ("a.csv", 'prompt,response\na,b\nc,"d', "line 3", ":", "Check the quotes"),
    "a table with a short row": ("a.csv", "prompt,response\n" + "a,b\n" * 3 + "c\n", "line 5: response is 'None'",
                                 "not empty", "Fill it"),
    "no Parquet": ("a.parquet", b"PAR1 this is none PAR1", "a.parquet", "not a Parquet file", "Write it again"),
    "another kind of file": ("a.xlsx", b"PK", "a.xlsx ends in .xlsx", ".jsonl, .json, .csv and .parquet", "Convert it"),
    "no ending": ("rows", text_of(GOOD), "rows ends in nothing", ".jsonl, .json, .csv and .parquet", "Convert it"),
}  # fmt: skip


def refusal(workspace, what, *arguments, **named) -> str:
    """Return the sentence with which `what` refuses, after seeing that nothing was left behind."""
    rows, objects = count_rows(workspace), objects_of(workspace)
    with pytest.raises(ClmError) as caught:
        what(*arguments, **named)
    assert count_rows(workspace) == rows and objects_of(workspace) == objects
    assert not [p for p in workspace.home.iterdir() if p.name.startswith("tmp")], "no half of a snapshot is left"
    sentence = plain(caught.value)
    assert sentence == str(caught.value) and "\n" not in sentence and len(sentence) < 600
    return sentence


def wish_for(file, **more) -> LearnWish:
    return LearnWish(stream=[{"name": "Bad", "path": str(file)}], **more)


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_with_value_rule_and_next_step_and_leaves_nothing(workspace, tmp_path, case):
    name, content, *parts = BAD_FILES[case]
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    told = refusal(workspace, snapshot, workspace, "Bad", file, "local")
    assert all(part in told for part in (file.name, *parts)), told
    assert refusal(workspace, ask, workspace, wish_for(file), "local") == told, "a wish over it is refused alike"


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(workspace, tmp_path):
    gone = refusal(workspace, snapshot, workspace, "Bad", tmp_path / "gone.jsonl", "local")
    assert "gone.jsonl cannot be read: No such file or directory. Check the name" in gone
    (tmp_path / "folder.jsonl").mkdir()
    folder = refusal(workspace, snapshot, workspace, "Bad", tmp_path / "folder.jsonl", "local")
    assert "folder.jsonl is a folder; one file of rows is needed here. Name a" in folder


def test_a_file_that_may_not_be_read_is_refused(workspace, rows_file, monkeypatch):
    file = rows_file(40)

    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    monkeypatch.setattr("builtins.open", forbidden)  # root may read everything, so the mode alone would not do
    told = refusal(workspace, snapshot, workspace, "Bad", file, "local")
    assert "rows.jsonl cannot be read" in told and "Permission denied" in told and "Check the file" in told


def test_a_file_that_is_too_large_or_unpacks_to_too_much_is_refused(tmp_path, tiny_model):
    small = Workspace(Settings(home=tmp_path / "home", base_model=str(tiny_model), max_file_mb=1))
    text = text_of(make_rows(400) + [{"prompt": "x" * 50_000, "response": str(i)} for i in range(30)])
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert "has 2 MB; at most 1 MB are read at once. Split" in refusal(
        small, snapshot, small, "Bad", tmp_path / "a.jsonl", "local"
    )
    assert "unpacks to more than 1 MB. Split it" in refusal(
        small, snapshot, small, "Bad", tmp_path / "a.jsonl.gz", "local"
    )
    small.close()


@pytest.mark.parametrize("name", ["", "  ", "a/b", "a\nb", "x" * 81])
def test_a_task_name_that_cannot_be_used_is_refused(workspace, rows_file, name):
    told = refusal(workspace, snapshot, workspace, name, rows_file(40), "local")
    assert "needs 1 to 80 characters without slashes or line breaks. Choose another" in told


def test_a_task_name_is_given_once_whatever_its_case(workspace, rows_file):
    snapshot(workspace, "Lamps", rows_file(40), "local")
    for name in ("Lamps", " lamps ", "LAMPS"):
        told = refusal(workspace, snapshot, workspace, name, rows_file(50), "local")
        assert f"A task named {name.strip()!r} exists already. Choose another name, or open that task." == told
    with pytest.raises(BadData, match=r"names 'lamps' twice; a task is learned once in a stream\. Remove one"):
        LearnWish(stream=[{"name": "Lamps"}, {"name": " lamps"}])


def test_a_wish_for_what_is_unknown_is_refused(workspace, rows_file):
    file = rows_file(40)
    assert "There is no task 'Nothing' and no file for it. Add the file" in refusal(
        workspace, ask, workspace, LearnWish(stream=[{"name": "Nothing"}]), "local"
    )
    assert "'abacus' is not among the strategies: adapters, auto, der" in refusal(
        workspace, lambda: wish_for(file, strategy="abacus")
    )
    assert "'abacus' is not among the methods" in refusal(workspace, lambda: wish_for(file, method="abacus"))
    with pytest.raises((ValidationError, BadSettings)) as caught:
        wish_for(file, training={"epochs": 0})
    assert plain(caught.value) == "training.epochs is 0: Input should be greater than 0. Correct it and try again."
    with pytest.raises((ValidationError, BadSettings)) as caught:
        wish_for(file, strategy="replay", strategy_settings={"share": 2})
    assert "share is 2: Input should be less than or equal to 0.9" in plain(caught.value)


def test_a_wish_that_starts_from_no_version_is_refused(workspace, rows_file):
    versions.base_version(workspace)
    told = refusal(workspace, ask, workspace, wish_for(rows_file(40), start_from="v9"), "local")
    assert told == "There is no version 'v9'. Versions are live, v0."


def test_a_model_folder_that_is_none_is_refused(tmp_path, rows_file):
    home = Workspace(Settings(home=tmp_path / "home", base_model=str(tmp_path / "nowhere")))
    told = refusal(home, versions.base_version, home)
    assert "nowhere is no Hugging Face model folder: config.json, tokenizer.json, *.safetensors missing. Name" in told
    assert refusal(home, ask, home, wish_for(rows_file(40)), "local") == told
    home.close()


def test_a_model_too_large_for_memory_is_refused_before_anything_starts(workspace, rows_file, monkeypatch):
    versions.base_version(workspace)
    monkeypatch.setattr(memory, "gpus", lambda: [])
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=500 * 2**20))
    told = refusal(workspace, ask, workspace, wish_for(rows_file(40), method="full"), "local")
    for part in ("M parameters with a second model beside it needs about", "0.5 GB are free", "Choose method lora"):
        assert part in told
    with pytest.raises(BadModel, match=r"Halve batch_rows or max_tokens"):
        ask(workspace, wish_for(rows_file(40), method="lora"), "local")


def test_a_run_needs_more_memory_with_more_weights_rows_and_tokens(tiny_model):
    need = lambda parameters=10**8, kind="full", rows=16, tokens=256: memory.needed_gb(  # noqa: E731
        parameters, tiny_model, kind, rows, tokens, False
    )
    assert need(2 * 10**8) > need() > need(kind="adapter") and need(rows=32) > need() and need(tokens=512) > need()
    assert need(10**9, rows=1, tokens=8) == pytest.approx(16 + memory.OVERHEAD_GB, abs=0.1), "16 bytes per tuned weight"


def test_a_disk_too_small_for_a_run_is_refused(workspace, tiny_model, monkeypatch):
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**8))
    with pytest.raises(OutOfRoom, match=r"needs about 0\.2 GB on disk .* 0\.1 GB are free .* --home"):
        memory.refuse_what_does_not_fit(10**5, tiny_model, "adapter", 1, 8, workspace.home)


@pytest.mark.parametrize("place", ["clm_app.data.ingest.dump", "store.objects.shutil.copyfile", "store.objects.sync"])
def test_a_full_disk_is_a_sentence_and_leaves_nothing(workspace, rows_file, monkeypatch, place):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    workspace.objects.put_bytes(b"something")
    monkeypatch.setattr(place, full)
    told = refusal(workspace, snapshot, workspace, "Lamps", rows_file(40), "local")
    assert "disk is full" in told and "Free some space" in told
    monkeypatch.undo()
    assert snapshot(workspace, "Lamps", rows_file(40), "local").id == 1, "with room again it is taken"


def test_a_disk_that_fills_up_during_an_upload_is_a_sentence_too(workspace, monkeypatch):
    from ui.api.data import Data
    from ui.house import House
    from ui.server import make_app

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def upload():
        door = httpx.ASGITransport(make_app(House(workspace)), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=door, base_url="http://127.0.0.1") as client:
            return await client.post("/api/tasks", data={"name": "Lamps"}, files={"file": ("a.jsonl", b"{}")})

    monkeypatch.setattr(Data, "receive", full)
    answer = asyncio.run(upload())
    assert answer.status_code == 507 and "The disk is full. Free some space" in answer.json()["error"]
    assert count_rows(workspace)["Task"] == 0 and not list(workspace.uploads.iterdir())


def test_every_error_that_a_person_may_see_says_something():
    assert "disk is full" in plain(OSError(errno.ENOSPC, "No space left on device"))
    assert "Memory ran out" in plain(MemoryError()) and "KeyError: 'x'" in plain(KeyError("x"))
    assert (
        issubclass(BadData, BadInput) and BadData.status == 400 and NotThere.status == 404 and OutOfRoom.status == 507
    )


# --- what is read ----------------------------------------------------------------------------------------------------


def write_as(kind: str, rows: list[dict], folder: Path) -> Path:
    file = folder / f"rows.{kind}"
    plain_kind = kind.removesuffix(".gz")
    if plain_kind == "jsonl":
        text = text_of(rows)
    elif plain_kind == "json":
        text = json.dumps(rows)
    elif plain_kind == "csv":
        with open(file, "w", encoding="utf-8", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        text = file.read_text(encoding="utf-8")
        file.unlink()
    else:
        (folder / "source.jsonl").write_text(text_of(rows), encoding="utf-8")
        duckdb.connect().execute(
            f"COPY (SELECT * FROM read_json('{folder / 'source.jsonl'}')) TO '{file}' (FORMAT parquet)"
        )
        return file
    data = text.encode("utf-8-sig" if plain_kind == "csv" else "utf-8")  # spreadsheets write a byte-order mark
    file.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return file


ODD = [{"prompt": f'Ünï, "{i}"\nzwei', "response": f"größer, {i % 3} 🙂"} for i in range(12)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "json.gz", "csv.gz"])
def test_every_format_is_read_alike(tmp_path, kind):
    reading = read_rows(write_as(kind, ODD, tmp_path), SETTINGS)
    assert [(r.prompt, r.response, s) for r, s in reading.rows] == [(r["prompt"], r["response"], None) for r in ODD]
    assert reading.report["rows"] == 12 and reading.report["labels"] == 3 and reading.report["smallest_label"] == 4


def test_chat_records_and_other_column_names_are_read_alike(tmp_path):
    chats = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": r["prompt"]},
                           {"role": "assistant", "content": r["response"]}]} for r in ODD]  # fmt: skip
    named = [{"Question": r["prompt"], "Answer": r["response"], "id": i} for i, r in enumerate(ODD)]
    expected = [r for r, _ in read_rows(write_as("jsonl", ODD, tmp_path), SETTINGS).rows]
    for rows in (chats, named):
        assert [r for r, _ in read_rows(write_as("jsonl", rows, tmp_path), SETTINGS).rows] == expected


def test_a_label_is_the_response_where_none_is_given(tmp_path):
    rows = [r | {"label": f"kind {i % 2}"} for i, r in enumerate(ODD)]
    assert {r.label for r, _ in read_rows(write_as("jsonl", rows, tmp_path), SETTINGS).rows} == {"kind 0", "kind 1"}
    assert all(r.label == r.response for r, _ in read_rows(write_as("jsonl", ODD, tmp_path), SETTINGS).rows)


def test_duplicates_are_dropped_and_counted(tmp_path):
    twice = [*ODD, ODD[0], {"prompt": f"  {ODD[1]['prompt'].upper()} ", "response": ODD[1]["response"]}]
    reading = read_rows(write_as("jsonl", twice, tmp_path), SETTINGS)
    assert len(reading.rows) == 12 and reading.report["duplicates_dropped"] == 2


def test_rows_are_read_back_as_they_were_written(workspace, tmp_path):
    taken = snapshot(workspace, "Odd", write_as("jsonl", ODD * 1, tmp_path), "local")
    parts = [rows_of(workspace, taken, part) for part in ("train", "validation", "test")]
    assert sorted(r.prompt for part in parts for r in part) == sorted(r["prompt"] for r in ODD)


# --- the split and the snapshot --------------------------------------------------------------------------------------


def rows_with(*pairs) -> list[tuple[Row, str | None]]:
    return [(Row(prompt=p, response=r), s) for p, r, s in pairs]


def prompts(rows) -> set[str]:
    return {row.prompt.lower() for row in rows}


@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_is_ever_in_two_parts(seed):
    rng = random.Random(seed)
    rows = rows_with(*[(f"{rng.choice(['Ask', 'ask'])} {rng.randrange(40)}", f"answer {rng.randrange(6)}", None)
                       for _ in range(200)])  # fmt: skip
    parts = split(rows, seed)
    assert sum(map(len, parts.values())) == 200 and all(parts.values())
    train, validation, test = (prompts(parts[p]) for p in ("train", "validation", "test"))
    assert not train & validation and not train & test and not validation & test


def test_a_split_fills_every_part_with_its_share_of_every_label():
    rows = rows_with(*[(r["prompt"], r["response"], None) for r in make_rows(400)])
    parts = split(rows, 0)
    assert {p: len(r) for p, r in parts.items()} == {"train": 280, "validation": 60, "test": 60}
    assert all(len({r.label for r in rows}) == 4 for rows in parts.values())
    assert split(rows, 0) == parts != split(rows, 1)
    small = split(rows_with(*[(f"ask {i}", f"answer {i}", None) for i in range(10)]), 0)  # each label has one prompt
    assert all(small.values())


def test_rows_with_one_prompt_cannot_be_split(workspace, tmp_path):
    (tmp_path / "a.jsonl").write_text(text_of([{"prompt": "same", "response": f"r{i}"} for i in range(20)]))
    told = refusal(workspace, snapshot, workspace, "Bad", tmp_path / "a.jsonl", "local")
    assert "All rows share the prompt 'same'" in told and "Add other prompts" in told


def test_published_parts_are_taken_as_they_are():
    rows = rows_with(*[(f"ask {i}", f"answer {i % 2}", ("train", "test", "validation")[i % 3]) for i in range(30)])
    parts = split(rows, 0)
    assert {p: [r.prompt for r in rows] for p, rows in parts.items()} == {
        p: [row.prompt for row, s in rows if s == p] for p in parts
    }


def test_published_test_rows_are_never_trained_where_validation_is_not_published():
    rows = rows_with(*[(f"ask {i}", f"answer {i % 2}", "test" if i % 4 == 0 else "train") for i in range(80)])
    parts = split(rows, 0)
    assert prompts(parts["test"]) == {row.prompt for row, s in rows if s == "test"} and parts["validation"]
    assert not prompts(parts["train"]) & prompts(parts["validation"])


def test_the_same_content_is_one_object_and_one_snapshot(workspace, rows_file):
    first = snapshot(workspace, "Lamps", rows_file(40), "local")
    again = snapshot(workspace, "lamps", rows_file(40, name="copy.jsonl"), "local", is_new=False)
    other = snapshot(workspace, "Bikes", rows_file(40), "local")
    grown = snapshot(workspace, "Lamps", rows_file(48), "local", is_new=False)
    assert again.id == first.id and other.object == first.object and other.id != first.id
    assert grown.id != first.id and grown.object != first.object
    assert [(task.name, taken.id) for task, taken in tasks(workspace)] == [("Lamps", grown.id), ("Bikes", other.id)]
    assert count_rows(workspace)["AuditEvent"] == 2 + 3
    workspace.objects.verify(first.object)


def test_a_snapshot_does_not_follow_its_file(workspace, rows_file):
    file = rows_file(40)
    taken = snapshot(workspace, "Lamps", file, "local")
    before = rows_of(workspace, taken, "train")
    file.write_text("gone")
    assert rows_of(workspace, taken, "train") == before and taken.train_rows == len(before)


def test_a_wish_is_written_down_whole_and_once(workspace, rows_file):
    job = ask(workspace, wish_for(rows_file(40)), "anna")
    assert (job.status, job.asked_by, LearnWish(**job.wish).stream[0].name) == ("asked", "anna", "Bad")
    cancelled = wishes.cancel(workspace, job.id, "anna")
    assert cancelled.status == "cancelled" and cancelled.ended_at
    with pytest.raises(BadInput, match="cancelled already; there is nothing to cancel"):
        wishes.cancel(workspace, job.id, "anna")
    with pytest.raises(NotThere):
        wishes.cancel(workspace, 99, "anna")


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_one_task_per_file_in_order_of_name(tmp_path):
    for name in ("b_two.csv", "a_one.jsonl", "readme.md"):
        (tmp_path / name).write_text("")
    stream = streams.stream_from(tmp_path, None, tmp_path / "cache")
    assert [(s.name, Path(s.path).name) for s in stream] == [("a one", "a_one.jsonl"), ("b two", "b_two.csv")]
    assert len(streams.stream_from(tmp_path, 1, tmp_path / "cache")) == 1
    (tmp_path / "empty").mkdir()
    for bad in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(BadData, match=r"\. (Name|Put one) "):
            streams.stream_from(bad, None, tmp_path)


def test_the_demo_stream_and_its_bad_task_can_be_read():
    stream = streams.stream_from(None, None, Path())
    readings = [read_rows(Path(s.path), SETTINGS) for s in stream]
    assert len(stream) == 4 and all(r.report["rows"] >= 40 for r in readings)
    assert read_rows(streams.DEMO / f"{streams.DEMO_BAD_TASK[1]}.jsonl", SETTINGS).rows


def test_shuffled_rows_keep_prompts_and_answers_but_not_their_pairs(rows_file, tmp_path):
    source, target = rows_file(40), tmp_path / "made" / "shuffled.jsonl"
    streams.write_shuffled(source, target, SETTINGS)
    before, after = [r for r, _ in read_rows(source, SETTINGS).rows], load(target)
    assert [r.prompt for r in before] == [r.prompt for r in after]
    assert sorted(r.response for r in before) == sorted(r.response for r in after)
    assert sum(b == a for b, a in zip(before, after, strict=True)) < 20


@pytest.mark.real_data
def test_clinc150_keeps_its_published_parts(tmp_path):
    folder = Path(__file__).parents[2] / "shared" / "data" / "clinc150"
    if not folder.exists():
        pytest.skip("the clinc150 files are not beside the project")
    stream = streams.stream_from(folder, 2, tmp_path)
    parts = split(read_rows(Path(stream[0].path), SETTINGS).rows, 0)
    assert len(stream) == 2 and not prompts(parts["train"]) & prompts(parts["test"])
    published = [json.loads(line) for line in Path(stream[0].path).read_text(encoding="utf-8").splitlines()]
    for part, said in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert prompts(parts[part]) <= {row["prompt"].lower().strip() for row in published if row["split"] == said}


def test_rows_whose_answers_all_differ_are_split_like_any_others():
    rows = [(Row(prompt=f"question {i}", response=f"answer {i}"), None) for i in range(100)]
    assert {part: len(found) for part, found in split(rows, 0).items()} == {
        "train": 70, "validation": 15, "test": 15,
    }  # fmt: skip
