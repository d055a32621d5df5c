"""The only place that holds a database connection: SQLite for the record, DuckDB in memory for questions.

One process writes: it holds the workspace's lock file, and every write goes through one lock (SQLite 3.40 has a race
when two connections checkpoint at once, fixed in 3.51.3). DuckDB never owns a file; it reads JSONL and Parquet.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlmodel import Session, create_engine, select

from store.tables import AuditEvent
from store.tables._columns import now

MIGRATIONS = Path(__file__).parent / "migrations"


class HomeIsTaken(RuntimeError):
    """Another running CLM holds this workspace."""


class Home:
    """The lock on a workspace folder: one writing process at a time, released by the kernel when that process ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.handle = folder, None

    def take(self) -> None:
        """Take the lock and write our process id into it.

        Raises:
            HomeIsTaken: another process holds it; the message names that process.
        """
        handle = open(self.folder / "app.lock", "a+", encoding="utf-8")  # noqa: SIM115 held for the process's life
        try:
            if os.name == "nt":
                import msvcrt

                handle.seek(0)
                msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            handle.close()
            raise HomeIsTaken(
                f"The workspace {self.folder} is in use by process {holder}, and one process may write to it. "
                "Use the page that is open already, end that process, or choose another folder with --home."
            ) from err
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        self.handle = handle

    def release(self) -> None:
        """Give the lock back; safe to call twice."""
        if self.handle:
            self.handle.close()
            self.handle = None


class Database:
    """SQLite in WAL mode with foreign keys, brought to the newest schema when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "record.sqlite"
        self._lock = threading.RLock()
        migrate(self.path)
        self.engine = create_engine(f"sqlite:///{self.path}", connect_args={"check_same_thread": False, "timeout": 30})
        event.listen(self.engine, "connect", _prepare)

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a session for reading; what it loads stays usable afterwards, and nothing is written."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """Yield a session whose changes are committed together at the end, or not at all."""
        with self._lock, Session(self.engine, expire_on_commit=False) as session:
            yield session
            session.commit()

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()


def _prepare(connection: sqlite3.Connection, _record: Any) -> None:
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


def newest_revision() -> str:
    """Return the id of the last migration: files are named 0001_…, 0002_…"""
    return max(p.name[:4] for p in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def migrate(path: Path) -> None:
    """Bring the file at `path` to the newest schema; a copy of a file with rows is kept beside it first."""
    if _revision(path) == newest_revision():
        return
    from alembic import command  # only now: its import costs a third of a second, and most starts need no migration
    from alembic.config import Config

    if path.exists():
        with sqlite3.connect(path) as old, sqlite3.connect(path.with_suffix(".before-migration.sqlite")) as copy:
            old.backup(copy)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("sqlalchemy.url", f"sqlite:///{path}")
    command.upgrade(config, "head")


def _revision(path: Path) -> str | None:
    if not path.exists():
        return None
    with contextlib.closing(sqlite3.connect(path)) as connection:
        try:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.OperationalError:
            return None
    return row[0] if row else None


def record(session: Session, actor: str, action: str, subject: str, **detail: Any) -> AuditEvent:
    """Append an audit event to the caller's own transaction, so that both are true or neither is."""
    last = session.exec(select(AuditEvent).order_by(AuditEvent.id.desc()).limit(1)).first()
    event_ = AuditEvent(
        actor=actor,
        action=action,
        subject=subject,
        detail=detail,
        at=now(),
        previous=last.seal if last else "",
        seal="",
    )
    event_.seal = seal(event_)
    session.add(event_)
    session.flush()
    return event_


def seal(event_: AuditEvent) -> str:
    """Return the SHA-256 that binds an event to its content and to the event before it."""
    content = [event_.previous, event_.at.isoformat(), event_.actor, event_.action, event_.subject, event_.detail]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def query(sql: str, parameters: list[Any] | None = None) -> list[dict[str, Any]]:
    """Ask DuckDB in memory (files are named in the SQL or its parameters) and return rows as dicts.

    Extensions are neither installed nor loaded by themselves: that would contact an outside host.
    """
    import duckdb

    with duckdb.connect(
        ":memory:", config={"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
    ) as connection:
        cursor = connection.execute(sql, parameters or [])
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
