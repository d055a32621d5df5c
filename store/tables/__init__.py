"""The record, one file per family of SQLite tables; importing this package makes every table known to SQLModel."""

from store.tables.data import Snapshot, Task, Withdrawn
from store.tables.judging import Approval, Benchmark, BenchmarkReading, ParityReading
from store.tables.probes import ProbeReading
from store.tables.trust import AuditEvent
from store.tables.versions import Decision, Deployment, Measurement, Version
from store.tables.work import Job, Run

__all__ = [
    "Approval", "AuditEvent", "Benchmark", "BenchmarkReading", "Decision", "Deployment", "Job", "Measurement",
    "ParityReading", "ProbeReading", "Run", "Snapshot", "Task", "Version", "Withdrawn",
]  # fmt: skip
