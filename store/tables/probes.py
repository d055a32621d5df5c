"""What was measured of a version beside its tasks: what it knows and can do in general."""

from __future__ import annotations

from datetime import datetime

from sqlmodel import Field, SQLModel

from store.tables._columns import document, now


class ProbeReading(SQLModel, table=True):
    """One probe's value on one version, with its 95 % interval over items; the newest of a probe counts."""

    __tablename__ = "probe_reading"
    id: int | None = Field(default=None, primary_key=True)
    version_id: int = Field(foreign_key="version.id", index=True)
    probe: str
    value: float
    unit: str = Field(description="such as bits per byte, or share right (0..1)")
    lower_is_better: bool
    low: float
    high: float
    items: int = Field(description="items behind the value")
    ruler: str = Field(description="digest of items and knobs: readings compare only where it is the same")
    figures: dict = document()  # further figures of the same outcomes, by name
    object: str = Field(description="digest of the outcomes file: one JSON line per item")
    created_at: datetime = Field(default_factory=now)
