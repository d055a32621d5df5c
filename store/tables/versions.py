"""Versions, what was measured of them, what was decided, and which of them people talk to."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Column, ForeignKey, Integer
from sqlmodel import Field, SQLModel

from store.tables._columns import document, now


class Version(SQLModel, table=True):
    """A set of weights: a base folder, and over it an adapter unless the weights are the base itself."""

    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(unique=True, description="v0, v1, …; naive-1 on a comparison track")
    track: str = Field(default="main", index=True)
    parent_id: int | None = Field(default=None, foreign_key="version.id")
    run_id: int | None = Field(  # use_alter: runs name their parent version, so the two tables refer to each other
        default=None, sa_column=Column(Integer, ForeignKey("run.id", name="fk_version_run", use_alter=True))
    )
    kind: str = Field(
        description="base (a folder outside the store); full, adapter or routed (one adapter per task): objects"
    )
    base_path: str = Field(description="folder with the full-precision base; relative to the workspace if inside it")
    base_digest: str = Field(description="SHA-256 over the base folder's files")
    object: str | None = Field(
        default=None, description="digest of the adapter or full-weights folder; None for a base"
    )
    state: str = Field(default="candidate", description="base, candidate, accepted, refused or comparison")
    method: str = ""
    strategy: str = ""
    settings: dict = document()
    seed: int = 0
    parameters: int = Field(default=0, description="parameters of the whole model")
    trained_parameters: int = 0
    memory: dict = (
        document()
    )  # what is kept for next time: {snapshot id: object of kept rows, state/<strategy>: object}
    created_at: datetime = Field(default_factory=now)


class Measurement(SQLModel, table=True):
    """One figure of one version on one task's split; the object holds the outcome of every item behind it."""

    id: int | None = Field(default=None, primary_key=True)
    version_id: int = Field(foreign_key="version.id", index=True)
    task_id: int = Field(foreign_key="task.id", index=True)
    snapshot_id: int = Field(foreign_key="snapshot.id")
    split: str = Field(description="validation or test")
    metric: str = Field(description="exact_match (share of items, 0..1) or answer_loss (nats per answer token)")
    value: float
    items: int = Field(description="items behind the value")
    object: str = Field(description="digest of the outcomes file: one JSON line per item")
    created_at: datetime = Field(default_factory=now)


class Decision(SQLModel, table=True):
    """What the gate said of a candidate against the version it would replace, with the evidence it said it from."""

    id: int | None = Field(default=None, primary_key=True)
    version_id: int = Field(foreign_key="version.id", index=True)
    against_version_id: int = Field(foreign_key="version.id")
    verdict: str = Field(description="promote, hold or inconclusive")
    sentence: str = Field(description="the verdict for a manager, one sentence")
    evidence: dict = document()
    created_at: datetime = Field(default_factory=now)


class Deployment(SQLModel, table=True):
    """One move of an alias. The newest row of an alias says what is live; older rows are its history."""

    id: int | None = Field(default=None, primary_key=True)
    alias: str = Field(default="live", index=True)
    version_id: int = Field(foreign_key="version.id")
    previous_version_id: int | None = Field(default=None, foreign_key="version.id")
    decision_id: int | None = Field(default=None, foreign_key="decision.id", description="None: a person chose")
    actor: str = Field(default="gate")
    reason: str = ""
    created_at: datetime = Field(default_factory=now)
