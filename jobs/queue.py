"""The durable job ledger: a job is asked, claimed with a lease, kept alive by heartbeats, and ended once.

Every claim raises the job's fence. A worker whose lease was taken over holds an older fence, and its writes are refused.
"""

from __future__ import annotations

from datetime import timedelta

from sqlmodel import Session, or_, select

from clm_app.workspace import Workspace
from store.db import record
from store.tables import Job
from store.tables._columns import now


class Cancelled(Exception):
    """A person asked the job to stop."""


class Fenced(RuntimeError):
    """Another worker has taken this job over; this one must stop without writing."""


class Queue:
    """The ledger as one worker sees it; `owner` names that worker in the rows."""

    def __init__(self, workspace: Workspace, owner: str) -> None:
        self.workspace, self.owner = workspace, owner
        self.lease = timedelta(seconds=workspace.settings.lease_s)

    def claim(self) -> Job | None:
        """Take the oldest job that is asked for, or whose lease has run out; None where there is none."""
        with self.workspace.write() as session:
            lapsed = (Job.status.in_(("claimed", "running"))) & (
                or_(Job.lease_until < now(), Job.lease_until.is_(None))
            )
            job = session.exec(select(Job).where((Job.status == "asked") | lapsed).order_by(Job.id)).first()
            if job is None:
                return None
            again = job.status != "asked"
            job.status, job.owner, job.fence, job.attempts = "claimed", self.owner, job.fence + 1, job.attempts + 1
            job.lease_until, job.started_at = now() + self.lease, job.started_at or now()
            session.add(job)
            record(
                session, "clock", "job.taken_over" if again else "job.claimed", f"job:{job.id}", attempt=job.attempts
            )
            return job

    def release_the_dead(self) -> int:
        """Let go of every job that is claimed or running; call it at start, when this process alone holds the home."""
        with self.workspace.write() as session:
            dead = session.exec(select(Job).where(Job.status.in_(("claimed", "running")))).all()
            for job in dead:
                job.lease_until = None
                session.add(job)
            return len(dead)

    def beat(self, job: Job, **changes) -> Job:
        """Renew the lease and write `changes` (status, stage, done_share, result); return the row as it is now.

        Raises:
            Fenced: the job was taken over.
        """
        with self.workspace.write() as session:
            row = self.held(session, job)
            row.lease_until = now() + self.lease
            for name, value in changes.items():
                setattr(row, name, value)
            session.add(row)
            return row

    def held(self, session: Session, job: Job) -> Job:
        """Return the job's row inside a transaction, if this worker still holds it; call it before every write."""
        row = session.get_one(Job, job.id)
        if row.fence != job.fence or row.owner != self.owner:
            raise Fenced(f"Job {job.id} was taken over by {row.owner}.")
        return row

    def end(self, job: Job, status: str, *, stage: str, error: str | None = None, result: dict | None = None) -> None:
        """End the job as done, failed or cancelled, with its audit event."""
        with self.workspace.write() as session:
            row = self.held(session, job)
            row.status, row.stage, row.error, row.ended_at, row.lease_until = status, stage, error, now(), None
            row.done_share = 1.0 if status == "done" else row.done_share
            row.result = row.result | (result or {})
            session.add(row)
            record(session, "clock", f"job.{status}", f"job:{job.id}", **({"error": error} if error else {}))
