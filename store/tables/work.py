"""Jobs and runs: what was asked for, who is doing it, and how far it has come."""

from __future__ import annotations

from datetime import datetime

from sqlmodel import Field, SQLModel

from store.tables._columns import document, now

ENDED = ("done", "failed", "cancelled")


class Job(SQLModel, table=True):
    """A wish in the durable ledger: asked, claimed, running, then done, failed or cancelled."""

    id: int | None = Field(default=None, primary_key=True)
    kind: str = Field(index=True, description="learn")
    wish: dict = document()  # what was asked, as the kind's settings model wrote it
    status: str = Field(default="asked", index=True)
    stage: str = Field(default="", description="what it does now, in a few words for a person")
    done_share: float = Field(default=0.0, description="0..1 of the whole job, for a progress bar")
    asked_by: str = Field(default="local")
    owner: str | None = Field(default=None, description="process that holds the lease")
    fence: int = Field(default=0, description="grows with every claim; a write with an older fence is refused")
    lease_until: datetime | None = Field(default=None)
    attempts: int = Field(default=0)
    is_cancel_asked: bool = Field(default=False)
    error: str | None = Field(default=None, description="one sentence: value, rule, next step")
    result: dict = document()
    created_at: datetime = Field(default_factory=now)
    started_at: datetime | None = None
    ended_at: datetime | None = None


class Run(SQLModel, table=True):
    """One training of one task from one version: everything that is needed to do it again."""

    id: int | None = Field(default=None, primary_key=True)
    job_id: int = Field(foreign_key="job.id", index=True)
    track: str = Field(default="main", description="main, or the name of a comparison such as naive")
    position: int = Field(description="0-based place of the task in the job's stream")
    task_id: int = Field(foreign_key="task.id", index=True)
    snapshot_id: int = Field(foreign_key="snapshot.id")
    rehearsed: dict = document()  # {snapshot id: rows replayed from it}
    parent_version_id: int = Field(foreign_key="version.id")
    strategy: str
    method: str
    settings: dict = document()
    seed: int
    status: str = Field(default="asked", index=True)
    attempt: int = Field(default=0, description="1 for the first child, 2 after one resume, …")
    folder: str = Field(description="relative to the workspace: order, events, checkpoints")
    code_version: str = ""
    libraries: dict = document()
    hardware: dict = document()
    figures: dict = document()  # steps, seconds, tokens/s, peak memory, final loss
    error: str | None = None
    created_at: datetime = Field(default_factory=now)
    started_at: datetime | None = None
    ended_at: datetime | None = None
