"""What is remembered stays: sealed events, whole transactions, unchanged objects, one writer, curves that survive a kill."""

from __future__ import annotations

import json
import socket
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.exc import DBAPIError
from sqlmodel import SQLModel, select

from clm_app.settings import Settings
from clm_app.workspace import Workspace
from store.db import Database, migrate, newest_revision, query, record, seal
from store.objects import ObjectIsDamaged, Objects
from store.series.progress import curve, latest
from store.tables import AuditEvent, Job, Task

# --- the audit trail -------------------------------------------------------------------------------------------------


def events(database) -> list[AuditEvent]:
    with database.read() as session:
        return list(session.exec(select(AuditEvent).order_by(AuditEvent.id)))


@pytest.fixture
def database(tmp_path):
    made = Database(tmp_path)
    yield made
    made.close()


def test_each_event_is_sealed_onto_the_one_before(database):
    for number in range(3):
        with database.write() as session:
            record(session, "local", "task.created", f"task:{number}", name="Ünïcode", number=number)
    found = events(database)
    assert [e.previous for e in found] == ["", found[0].seal, found[1].seal]
    assert [e.seal for e in found] == [seal(e) for e in found], "a seal can be computed again from the stored row"


@pytest.mark.parametrize("change", [
    {"actor": "someone"}, {"action": "task.deleted"}, {"subject": "task:9"}, {"detail": {"name": "other"}},
    {"previous": "0" * 64},
])  # fmt: skip
def test_a_seal_breaks_with_any_part_of_its_event(database, change):
    with database.write() as session:
        record(session, "local", "task.created", "task:1", name="one")
    event = events(database)[0]
    assert seal(AuditEvent(**event.model_dump() | change)) != event.seal


@pytest.mark.parametrize("sql", ["UPDATE audit_event SET actor = 'nobody'", "DELETE FROM audit_event"])
def test_an_event_can_be_neither_changed_nor_deleted(database, sql):
    with database.write() as session:
        record(session, "local", "task.created", "task:1")
    outside = sqlite3.connect(database.path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        outside.execute(sql)
    outside.close()
    assert [e.actor for e in events(database)] == ["local"]


def test_a_failed_transaction_leaves_neither_row_nor_event(database):
    with pytest.raises(ZeroDivisionError), database.write() as session:
        session.add(Task(name="Half", key="half"))
        record(session, "local", "task.created", "task:1")
        raise ZeroDivisionError
    with pytest.raises(DBAPIError), database.write() as session:
        record(session, "local", "task.created", "task:2")
        session.add_all([Task(name="Twice", key="twice"), Task(name="Twice", key="other")])
    with database.read() as session:
        assert session.exec(select(Task)).all() == [] and events(database) == []


def test_rows_must_name_what_exists(database):
    from store.tables import Snapshot

    with pytest.raises(DBAPIError, match="FOREIGN KEY"), database.write() as session:
        session.add(Snapshot(task_id=99, object="x", train_rows=1, validation_rows=1, test_rows=1, source=""))


# --- objects ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def objects(tmp_path) -> Objects:
    return Objects(tmp_path / "objects")


def folder_with(place: Path, **files: str) -> Path:
    place.mkdir()
    for name, text in files.items():
        (place / name).write_text(text)
    return place


def test_the_same_content_is_kept_once_whatever_it_was_called(objects, tmp_path):
    one, two = folder_with(tmp_path / "one", a="1", b="2"), folder_with(tmp_path / "two", a="1", b="2")
    other = folder_with(tmp_path / "three", a="1", c="2")
    assert objects.put(one) == objects.put(two) != objects.put(other)
    assert objects.put_bytes(b"text") == objects.put_bytes(b"text")
    assert len([p for p in objects.root.glob("??/*")]) == 3 and not list(objects.root.glob("new-*"))


def test_a_stored_object_is_read_only_and_its_source_may_go(objects, tmp_path):
    source = folder_with(tmp_path / "one", a="1")
    place = objects.path(objects.put(source))
    (source / "a").write_text("changed")
    assert (place / "a").read_text() == "1"
    assert stat.S_IMODE((place / "a").stat().st_mode) & 0o222 == 0


@pytest.mark.parametrize("damage", ["changed", "gone", "more"])
def test_a_damaged_object_is_noticed(objects, tmp_path, damage):
    digest = objects.put(folder_with(tmp_path / "one", a="1", b="2"))
    place = objects.verify(digest)
    if damage != "more":
        (place / "a").chmod(0o600)
    {"changed": lambda: (place / "a").write_text("2"), "gone": (place / "a").unlink,
     "more": lambda: (place / "c").write_text("")}[damage]()  # fmt: skip
    with pytest.raises(ObjectIsDamaged, match=rf"Object {digest} now has digest .* Restore"):
        objects.verify(digest)


def test_an_object_that_was_never_stored_is_not_there(objects):
    with pytest.raises(KeyError, match="No object"):
        objects.path("0" * 64)


def test_a_copy_that_breaks_off_leaves_no_object(objects, tmp_path, monkeypatch):
    source = folder_with(tmp_path / "one", a="1", b="2")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("store.objects.sync", full)
    with pytest.raises(OSError, match="No space"):
        objects.put(source)
    assert not list(objects.root.glob("??/*")) and not list(objects.root.glob("new-*"))


# --- opening ---------------------------------------------------------------------------------------------------------


def columns(path: Path) -> dict[str, set[str]]:
    with sqlite3.connect(path) as connection:
        names = [n for (n,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {n: {row[1] for row in connection.execute(f"PRAGMA table_info({n})")} for n in names}


def test_the_migrations_make_exactly_the_tables_that_the_code_knows(tmp_path):
    migrate(tmp_path / "fresh.sqlite")
    made = columns(tmp_path / "fresh.sqlite")
    assert made.pop("alembic_version") == {"version_num"}
    assert made == {name: set(table.columns.keys()) for name, table in SQLModel.metadata.tables.items()}


def test_an_empty_file_becomes_the_newest_schema_and_opening_again_keeps_every_row(tmp_path):
    (tmp_path / "record.sqlite").touch()
    first = Database(tmp_path)
    with first.write() as session:
        session.add(Job(kind="learn", wish={"stream": ["Ünïcode"]}))
        record(session, "local", "job.asked", "job:1")
    first.close()
    again = Database(tmp_path)
    with again.read() as session:
        job = session.exec(select(Job)).one()
        assert job.wish == {"stream": ["Ünïcode"]} and job.created_at.utcoffset().total_seconds() == 0
    assert [e.seal for e in events(again)] == [seal(e) for e in events(again)]
    again.close()
    with sqlite3.connect(tmp_path / "record.sqlite") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(newest_revision(),)]
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_record_of_the_first_schema_is_brought_to_the_newest_with_its_rows_and_a_copy_beside(tmp_path):
    from alembic import command
    from alembic.config import Config

    from store.db import MIGRATIONS
    from store.tables import Withdrawn

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("sqlalchemy.url", f"sqlite:///{tmp_path / 'record.sqlite'}")
    command.upgrade(config, "0001")
    with sqlite3.connect(tmp_path / "record.sqlite") as old:
        old.execute("INSERT INTO task (name, key, created_at) VALUES ('Ünïcode', 'ünïcode', '2026-01-01 00:00:00')")
    assert "withdrawn" not in columns(tmp_path / "record.sqlite")
    database = Database(tmp_path)
    with database.write() as session:
        task = session.exec(select(Task)).one()
        session.add(Withdrawn(key="0" * 12, task_id=task.id, by="local", reason="asked for"))
    with pytest.raises(DBAPIError, match="UNIQUE"), database.write() as session:
        session.add(Withdrawn(key="0" * 12, task_id=task.id, by="local", reason="again"))
    database.close()
    assert task.name == "Ünïcode" and "withdrawn" not in columns(tmp_path / "record.before-migration.sqlite")


def test_a_second_process_cannot_take_the_home_and_is_told_what_to_do(workspace):
    code = (
        "import sys; from pathlib import Path; from clm_app.settings import Settings;"
        "from clm_app.workspace import Workspace; Workspace(Settings(home=Path(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(workspace.home)], capture_output=True, text=True)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and str(workspace.home) in said and "is in use by process" in said
    assert "Use the page that is open already, end that process, or choose another folder with --home." in said
    workspace.close()
    assert subprocess.run([sys.executable, "-c", code, str(workspace.home)]).returncode == 0, "it was given back"


def test_a_home_that_cannot_be_made_is_refused_in_a_sentence(tmp_path):
    from clm_app.errors import OutOfRoom

    (tmp_path / "file").touch()
    with pytest.raises(OutOfRoom, match=r"The workspace .*file.home cannot be made: .* --home"):
        Workspace(Settings(home=tmp_path / "file" / "home"))


# --- DuckDB ----------------------------------------------------------------------------------------------------------


def test_a_query_reads_files_and_never_reaches_out(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    assert query("SELECT sum(a) AS total FROM read_json(?)", [str(tmp_path / "rows.jsonl")]) == [{"total": 3}]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for sql in (f"SELECT * FROM '{address}/x.parquet'", f"SELECT * FROM read_csv('{address}/x.csv')",
                    "LOAD httpfs", "SELECT * FROM 's3://bucket/x.parquet'"):  # fmt: skip
            with pytest.raises(Exception, match=r"(?i)httpfs|extension"):
                query(sql)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert query("SELECT current_setting('autoinstall_known_extensions') AS i, "
                 "current_setting('autoload_known_extensions') AS l") == [{"i": False, "l": False}]  # fmt: skip


def progress(step: int, loss: float, at: float = 0.0) -> str:
    return json.dumps({"kind": "progress", "step": step, "of": 9, "loss": loss, "learning_rate": 0.1, "tokens_per_s": 1.0,
                       "eta_s": 1.0, "memory_mb": 1.0, "at": at}) + "\n"  # fmt: skip


def test_a_curve_survives_a_torn_last_line_and_a_step_said_twice(tmp_path):
    file = tmp_path / "events.jsonl"
    assert curve(file) == [] and latest(file) is None
    file.touch()
    assert curve(file) == []
    started = json.dumps({"kind": "started", "step": 0, "of": 9, "rehearsed": {"3": 4}, "device": "cpu"}) + "\n"
    before = started + progress(1, 3.0, at=1) + progress(2, 2.5, at=2)
    file.write_text(before + progress(3, 2.0, at=3)[:40])  # killed while it wrote
    assert [row["loss"] for row in curve(file)] == [3.0, 2.5]
    file.write_text(before + started + progress(2, 2.4, at=5) + progress(3, 1.9, at=6))  # resumed after step 1
    assert [(row["step"], row["loss"]) for row in curve(file)] == [(1, 3.0), (2, 2.4), (3, 1.9)]
    assert latest(file)["step"] == 3


def test_a_long_curve_is_thinned_and_keeps_its_last_point(tmp_path):
    file = tmp_path / "events.jsonl"
    file.write_text("".join(progress(step, 1 / step, step) for step in range(1, 1004)))
    found = curve(file, points=100)
    assert len(found) <= 110 and found[-1]["step"] == 1003
    assert [row["step"] for row in found] == sorted(row["step"] for row in found)
