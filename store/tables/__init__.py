"""The record, one file per family of SQLite tables; importing this package makes every table known to SQLModel."""

from store.tables.data import Snapshot, Task, Withdrawn
from store.tables.probes import ProbeReading
from store.tables.trust import AuditEvent
from store.tables.versions import Decision, Deployment, Measurement, Version
from store.tables.work import Job, Run

__all__ = [
    "AuditEvent", "Decision", "Deployment", "Job", "Measurement", "ProbeReading", "Run", "Snapshot", "Task", "Version",
    "Withdrawn",
]  # fmt: skip
