"""The audit trail: append-only events, each sealed with the hash of the one before it."""

from __future__ import annotations

from datetime import datetime

from sqlmodel import Field, SQLModel

from store.tables._columns import document, now


class AuditEvent(SQLModel, table=True):
    """Who did what to which thing. Triggers in the database refuse to change or delete a row."""

    __tablename__ = "audit_event"
    id: int | None = Field(default=None, primary_key=True)
    at: datetime = Field(default_factory=now)
    actor: str
    action: str = Field(index=True, description="noun.verb, such as version.deployed")
    subject: str = Field(index=True, description="kind:id, such as version:4")
    detail: dict = document()
    previous: str = Field(description="seal of the event before; empty for the first")
    seal: str = Field(description="SHA-256 over previous, at, actor, action, subject and detail")
