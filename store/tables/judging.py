"""What is judged with and who had a say: benchmarks, what they read of a version, approvals, export parity."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import UniqueConstraint
from sqlmodel import Field, SQLModel

from store.tables._columns import document, now


class Benchmark(SQLModel, table=True):
    """Items to judge by, frozen: another content is another version of the same name. See clm_app/judging/benchmarks.py."""

    __table_args__ = (UniqueConstraint("key", "version"),)
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(description="as the person wrote it, trimmed")
    key: str = Field(index=True, description="name in lower case")
    version: int = Field(default=1, description="1, 2, … of this name")
    kind: str = Field(description="a name on the shelf clm_app.probes.kinds")
    settings: dict = document()  # the kind's knobs, template included
    object: str = Field(description="digest of the folder with validation.jsonl and test.jsonl")
    validation_items: int = Field(description="to search with")
    test_items: int = Field(description="to judge with, once per candidate")
    source: str = Field(default="", description="file it was read from, or page")
    report: dict = document()  # what the checks found, leakage included
    by: str = Field(default="local")
    created_at: datetime = Field(default_factory=now)


class BenchmarkReading(SQLModel, table=True):
    """What one benchmark says of one version or endpoint; equal keys are never measured twice."""

    __tablename__ = "benchmark_reading"
    id: int | None = Field(default=None, primary_key=True)
    benchmark_id: int = Field(foreign_key="benchmark.id", index=True)
    version_id: int | None = Field(default=None, foreign_key="version.id", index=True, description="None: an endpoint")
    endpoint: str = Field(default="", description="address and model, where it is no version of ours")
    split: str = Field(description="validation or test")
    on: str = Field(description="trained: the weights as trained; served: through the backend that serves them")
    backend: str = Field(description="engine, or a name on the shelf clm_app.serving.backends")
    key: str = Field(index=True, description="SHA-256 over weights, benchmark, split and settings")
    value: float
    low: float
    high: float
    unit: str
    lower_is_better: bool = Field(default=False)
    items: int
    figures: dict = document()  # further figures of the same outcomes, by name
    settings: dict = document()  # how it was run: tokens, batch, template
    object: str = Field(description="digest of the outcomes file: one JSON line per item")
    seconds: float = Field(default=0.0)
    created_at: datetime = Field(default_factory=now)


class Approval(SQLModel, table=True):
    """What a named person said of a decision: approve, reject, or override with a reason."""

    id: int | None = Field(default=None, primary_key=True)
    decision_id: int = Field(foreign_key="decision.id", index=True)
    version_id: int = Field(foreign_key="version.id", index=True)
    says: str = Field(description="approve, reject or override")
    by: str
    reason: str = ""
    at: datetime = Field(default_factory=now)


class ParityReading(SQLModel, table=True):
    """Whether the served artefact answers as the trained one: the golden prompts through both."""

    __tablename__ = "parity_reading"
    id: int | None = Field(default=None, primary_key=True)
    version_id: int = Field(foreign_key="version.id", index=True)
    backend: str
    verdict: str = Field(description="same, or differs")
    sentence: str = Field(description="for a manager; where it differs, with the cause")
    evidence: dict = document()
    seconds: float = Field(default=0.0)
    created_at: datetime = Field(default_factory=now)
