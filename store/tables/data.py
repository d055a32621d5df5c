"""Tasks, their snapshots, and the rows withdrawn from them: what the model is asked to learn, and may not rehearse."""

from __future__ import annotations

from datetime import datetime

from sqlmodel import Field, SQLModel

from store.tables._columns import document, now


class Task(SQLModel, table=True):
    """One kind of work, such as a product line's questions. Its name is unique, whatever case it is written in."""

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(index=True, unique=True, description="as the person wrote it, trimmed")
    key: str = Field(unique=True, description="name in lower case: what uniqueness is decided on")
    created_at: datetime = Field(default_factory=now)


class Snapshot(SQLModel, table=True):
    """Immutable rows of one task, split once; the object holds train.jsonl, validation.jsonl and test.jsonl."""

    id: int | None = Field(default=None, primary_key=True)
    task_id: int = Field(foreign_key="task.id", index=True)
    object: str = Field(index=True, description="digest of the folder in the object store")
    train_rows: int
    validation_rows: int
    test_rows: int
    source: str = Field(description="file or folder it was read from, as given")
    report: dict = document()  # what the checks found: duplicates dropped, longest row, labels
    created_at: datetime = Field(default_factory=now)


class Withdrawn(SQLModel, table=True):
    """A row that a person took back: it is in no rehearsal of a run that is ordered from then on."""

    id: int | None = Field(default=None, primary_key=True)
    key: str = Field(unique=True, description="twelve hex digits that name the row's content, whatever task it is in")
    task_id: int = Field(foreign_key="task.id", description="a task that has the row; its newest one")
    by: str
    reason: str
    at: datetime = Field(default_factory=now)
