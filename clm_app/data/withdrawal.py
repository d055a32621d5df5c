"""Take a row back: from then on no run is given it to rehearse, and no router that is made counts its words."""

from __future__ import annotations

from pathlib import Path

from sqlmodel import Session, select

from clm_app.data.ingest import rows_of
from clm_app.data.rows import dump, load
from clm_app.errors import BadInput, NotThere
from clm_app.workspace import Workspace
from store.db import record
from store.tables import Run, Snapshot, Task, Version, Withdrawn


def withdraw(workspace: Workspace, key: str, reason: str, by: str) -> Withdrawn:
    """Write down that a row is withdrawn, and why. Weights that have learned it already are not changed.

    key: `Row.key`, twelve hex digits.

    Raises:
        BadInput: the reason is empty, or the row is withdrawn already; nothing was changed.
        NotThere: no snapshot has such a row to train on.
    """
    key, reason = key.strip().lower(), reason.strip()
    if not reason:
        raise BadInput(f"Withdrawing row {key} needs a reason, which the audit trail keeps. Write one and try again.")
    with workspace.read() as session:
        snapshots = session.exec(select(Snapshot).order_by(Snapshot.id.desc())).all()
    task = next((s.task_id for s in snapshots if any(r.key == key for r in rows_of(workspace, s, "train"))), None)
    if task is None:
        raise NotThere(f"No task has a training row {key!r}. A row is named by the twelve hex digits beside it.")
    with workspace.write() as session:
        if found := session.exec(select(Withdrawn).where(Withdrawn.key == key)).first():
            raise BadInput(f"Row {key} was withdrawn already, by {found.by}: {found.reason}")
        row = Withdrawn(key=key, task_id=task, by=by, reason=reason)
        session.add(row)
        session.flush()
        record(session, by, "row.withdrawn", f"row:{key}", name=key, task=task, reason=reason)
    return row


def withdrawn_keys(session: Session) -> set[str]:
    """Return the key of every row that was withdrawn."""
    return set(session.exec(select(Withdrawn.key)).all())


def counted(workspace: Workspace, session: Session, version: Version) -> list[tuple[str, Path]]:
    """Return (task, file of training rows) of every run whose rows the router of a version counts, newest first.

    A task that was learned twice with one adapter is there twice; a version without a router gives none.
    """
    found = []
    while version.kind == "routed":
        run = session.get_one(Run, version.run_id)
        rows = workspace.objects.path(session.get_one(Snapshot, run.snapshot_id).object) / "train.jsonl"
        found.append((session.get_one(Task, run.task_id).name, rows))
        version = session.get_one(Version, version.parent_id)
    return found


def without(kept: Path, withdrawn: set[str], copy: Path) -> Path:
    """Return a file of kept rows that has no withdrawn one: `kept` itself, or `copy`, written without them."""
    rows = load(kept) if withdrawn else []
    left = [row for row in rows if row.key not in withdrawn]
    if len(left) == len(rows):
        return kept
    dump(left, copy)
    return copy
