"""Columns that every family uses: JSON documents and UTC times."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, Column
from sqlmodel import Field


def now() -> datetime:
    """Return the present in UTC; every time in the record is an aware UTC time."""
    return datetime.now(UTC)


def document() -> Any:
    """Return a JSON column that starts as an empty object and is never null."""
    return Field(default_factory=dict, sa_column=Column(JSON, nullable=False))
