"""What pages, routes and the terminal ask of the record, answered as plain values; nothing here writes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlmodel import func, select

from clm_app.errors import NotThere
from clm_app.judging.matrix import Matrix, retention, tracks
from clm_app.registry import versions
from clm_app.workspace import Workspace
from store.series import progress
from store.tables import AuditEvent, Decision, Deployment, Job, Run, Task, Version
from store.tables.work import ENDED


def jobs(workspace: Workspace, limit: int = 50) -> list[Job]:
    """Return the newest jobs, newest first."""
    with workspace.read() as session:
        return list(session.exec(select(Job).order_by(Job.id.desc()).limit(limit)))


def job(workspace: Workspace, job_id: int) -> Job:
    """Return one job.

    Raises:
        NotThere: there is no such job.
    """
    with workspace.read() as session:
        found = session.get(Job, job_id)
    if found is None:
        raise NotThere(f"There is no job {job_id}. GET /api/jobs lists them.")
    return found


def job_in_view(workspace: Workspace, chosen: int | None = None) -> Job | None:
    """Return the chosen job; without a choice the one at work, else the newest one; None before the first."""
    if chosen:
        return job(workspace, int(chosen))
    with workspace.read() as session:
        at_work = session.exec(select(Job).where(Job.status.not_in(ENDED)).order_by(Job.id)).all()
        running = [j for j in at_work if j.status != "asked"] or at_work
        return running[0] if running else session.exec(select(Job).order_by(Job.id.desc())).first()


def job_of_the_live_version(workspace: Workspace) -> Job | None:
    """Return the job that made the live version; before the first promotion the newest with something measured."""
    live = versions.live(workspace)
    with workspace.read() as session:
        made = session.get(Run, live.run_id) if live.run_id else None
        ids = session.exec(
            select(Run.job_id).join(Version, Version.run_id == Run.id).distinct().order_by(Run.job_id.desc())
        ).all()
    return next((job(workspace, i) for i in ([made.job_id] if made else ids) if retention(workspace, i)), None)


def refused_runs(workspace: Workspace, job_id: int) -> set[int]:
    """Return the ids of the job's runs whose version the gate refused."""
    with workspace.read() as session:
        found = select(Run.id).join(Version, Version.run_id == Run.id)
        return set(session.exec(found.where(Run.job_id == job_id, Version.state == "refused")).all())


def runs_of(workspace: Workspace, job_id: int) -> list[tuple[Run, str]]:
    """Return the job's runs in the order they were made, each with the name of its task."""
    with workspace.read() as session:
        found = select(Run, Task.name).join(Task, Task.id == Run.task_id).where(Run.job_id == job_id).order_by(Run.id)
        return [(run, name) for run, name in session.exec(found)]


def run_in_view(workspace: Workspace, job_id: int) -> tuple[Run, str] | None:
    """Return the run that trains now, else the last one that began; None before the first."""
    found = runs_of(workspace, job_id)
    return next((r for r in reversed(found) if r[0].status == "running"), found[-1] if found else None)


def events_file(workspace: Workspace, run: Run) -> Path:
    """Return the file of what the run's child said."""
    return workspace.home / run.folder / "events.jsonl"


def matrices(workspace: Workspace, job_id: int) -> dict[str, Matrix]:
    """Return {track: matrix} of a job, main first; a track without a measurement is left out."""
    found = {track: retention(workspace, job_id, track) for track in tracks(workspace, job_id)}
    return {track: matrix for track, matrix in found.items() if matrix}


def job_story(workspace: Workspace, job_id: int) -> dict[str, Any]:
    """Return a job with its runs, each with its latest progress, and its matrices.

    The job's own row is read first: a story that says it has ended holds all that it ended with.
    """
    row = job(workspace, job_id).model_dump(mode="json")
    runs = [
        run.model_dump(mode="json") | {"task": name, "progress": progress.latest(events_file(workspace, run))}
        for run, name in runs_of(workspace, job_id)
    ]
    return row | {
        "runs": runs,
        "matrices": {track: plain_matrix(m) for track, m in matrices(workspace, job_id).items()},
        "decisions": decisions(workspace, job_id),
    }


def plain_matrix(matrix: Matrix) -> dict[str, Any]:
    """Return the matrix with its two figures, shares 0..1."""
    figures = {"average_accuracy": matrix.average_accuracy, "backward_transfer": matrix.backward_transfer}
    return matrix.model_dump() | figures


def decisions(workspace: Workspace, job_id: int) -> list[dict[str, Any]]:
    """Return what the gate said of the job's versions, oldest first, with version names for ids."""
    names = version_names(workspace)
    with workspace.read() as session:
        found = session.exec(
            select(Decision, Task.name)
            .join(Version, Version.id == Decision.version_id)
            .join(Run, Run.id == Version.run_id)
            .join(Task, Task.id == Run.task_id)
            .where(Run.job_id == job_id)
            .order_by(Decision.id)
        ).all()
    return [
        d.model_dump(mode="json")
        | {"version": names[d.version_id], "against": names.get(d.against_version_id), "task": task}
        for d, task in found
    ]


def version_names(workspace: Workspace) -> dict[int, str]:
    """Return {version id: name}."""
    with workspace.read() as session:
        return dict(session.exec(select(Version.id, Version.name)).all())


def live_story(workspace: Workspace) -> dict[str, Any]:
    """Return the live version, its deployment, and the gate's sentence where the gate decided.

    Raises:
        BadModel: there is no model to start from yet.
    """
    versions.base_version(workspace)
    with workspace.read() as session:
        deployment = session.exec(
            select(Deployment).where(Deployment.alias == "live").order_by(Deployment.id.desc())
        ).first()
        version = session.get(Version, deployment.version_id)
        previous = session.get(Version, deployment.previous_version_id) if deployment.previous_version_id else None
        decision = session.get(Decision, deployment.decision_id) if deployment.decision_id else None
    return {"version": version, "previous": previous, "deployment": deployment, "decision": decision}


def deployments(workspace: Workspace) -> list[dict[str, Any]]:
    """Return every move of the live alias, newest first, with version names for ids."""
    names = version_names(workspace)
    return [
        d.model_dump(mode="json") | {"version": names[d.version_id], "previous": names.get(d.previous_version_id)}
        for d in versions.deployments(workspace)
    ]


def audit(workspace: Workspace, limit: int = 100) -> list[AuditEvent]:
    """Return the newest audit events, newest first."""
    with workspace.read() as session:
        return list(session.exec(select(AuditEvent).order_by(AuditEvent.id.desc()).limit(limit)))


def count_tasks(workspace: Workspace) -> int:
    """Return how many tasks there are."""
    with workspace.read() as session:
        return session.exec(select(func.count()).select_from(Task)).one()


def seconds_left(asked: Job) -> float | None:
    """Return about how long a running job still takes, from its pace so far; None where that is not known yet."""
    if asked.status != "running" or not asked.started_at or asked.done_share < 0.03:
        return None
    passed = (datetime.now(UTC) - aware(asked.started_at)).total_seconds()
    return passed * (1 - asked.done_share) / asked.done_share


def aware(moment: datetime) -> datetime:
    """Return the moment as an aware UTC time, whatever the database gave."""
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
