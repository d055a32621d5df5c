"""What pages, routes and the terminal ask of the record, answered as plain values; nothing here writes."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

from sqlmodel import Session, func, select

from clm_app.catalog import shelf
from clm_app.data.rows import Row, load
from clm_app.data.withdrawal import withdrawn_keys
from clm_app.errors import BadInput, ClmError, NotThere
from clm_app.judging.bootstrap import Interval, changes
from clm_app.judging.gate import pair
from clm_app.judging.matrix import Matrix, Measuring, being_measured, judged, retention, tracks
from clm_app.probes._base import SHELF, Value
from clm_app.registry import versions
from clm_app.strategies._combined import part_of
from clm_app.workspace import Workspace
from store.series import progress
from store.tables import (
    Approval,
    AuditEvent,
    Decision,
    Deployment,
    Job,
    Measurement,
    ProbeReading,
    Run,
    Snapshot,
    Task,
    Version,
)
from store.tables.work import ENDED

NEWEST_JOBS = 20  # that a strategy's figures are taken from


def jobs(workspace: Workspace, limit: int = 50, kind: str | None = None) -> list[Job]:
    """Return the newest jobs, of one kind or of all, newest first."""
    wanted = select(Job).order_by(Job.id.desc()).limit(limit)
    with workspace.read() as session:
        return list(session.exec(wanted.where(Job.kind == kind) if kind else wanted))


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


def job_in_view(workspace: Workspace, chosen: int | None = None, kind: str | None = None) -> Job | None:
    """Return the chosen job; without a choice the one at work, else the newest one, of a kind; None before the first."""
    if chosen:
        return job(workspace, int(chosen))
    wanted = select(Job).where(Job.kind == kind) if kind else select(Job)
    with workspace.read() as session:
        at_work = session.exec(wanted.where(Job.status.not_in(ENDED)).order_by(Job.id)).all()
        running = [j for j in at_work if j.status != "asked"] or at_work
        return running[0] if running else session.exec(wanted.order_by(Job.id.desc())).first()


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
    """Return {track: matrix with its intervals} of a job, main first; a track without a measurement is left out."""
    found = {track: judged(workspace, job_id, track) for track in tracks(workspace, job_id)}
    return {track: matrix for track, matrix in found.items() if matrix}


def matrices_now(workspace: Workspace, job_id: int) -> tuple[dict[str, Matrix], Measuring | None]:
    """Return `matrices`, and the row that is being filled where a child measures."""
    measuring = being_measured(workspace, job_id)  # first: its version may be registered between the two
    found = matrices(workspace, job_id)
    if measuring and measuring.track in found and len(found[measuring.track].versions) >= len(measuring.tasks):
        measuring = None
    return found, measuring


def job_story(workspace: Workspace, job_id: int) -> dict[str, Any]:
    """Return a job with its runs, each with its latest progress, its matrices and the row that is being measured.

    The job's own row is read first: a story that says it has ended holds all that it ended with.
    """
    row = job(workspace, job_id).model_dump(mode="json")
    runs = [
        run.model_dump(mode="json") | {"task": name, "progress": progress.latest(events_file(workspace, run))}
        for run, name in runs_of(workspace, job_id)
    ]
    found, measuring = matrices_now(workspace, job_id)
    return row | {
        "runs": runs,
        "matrices": {track: plain_matrix(m) for track, m in found.items()},
        "measuring": measuring.model_dump() if measuring else None,
        "decisions": decisions(workspace, job_id),
    }


def plain_matrix(matrix: Matrix) -> dict[str, Any]:
    """Return the matrix with its figures, shares and differences of shares; None where one cannot be said.

    intervals: {figure: [low, high]}, 95 %, over other test items; over_seeds: {figure: [mean, low, high]} over `seeds`.
    """
    return matrix.model_dump(mode="json") | matrix.figures


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


def judgement(workspace: Workspace, version: Version) -> dict[str, Any]:
    """Return what the gate decided on a version, oldest first, what people said of it, and the prompts of flipped items.

    decisions, words: rows as plain values. prompts: {item: its prompt}; of a benchmark's items, and where rows are gone,
    none.
    """
    with workspace.read() as session:
        decisions = session.exec(select(Decision).where(Decision.version_id == version.id).order_by(Decision.id)).all()
        words = session.exec(select(Approval).where(Approval.version_id == version.id).order_by(Approval.id)).all()
    prompts: dict[str, str] = {}
    for decision in decisions:
        for line in (decision.evidence.get("new", {}), *decision.evidence.get("old", ())):
            if digest := line.get("bound_to", {}).get("snapshot"):
                prompts |= _prompts(workspace, digest)
    return {"decisions": [d.model_dump(mode="json") for d in decisions],
            "words": [w.model_dump(mode="json") for w in words], "prompts": prompts}  # fmt: skip


def _prompts(workspace: Workspace, digest: str) -> dict[str, str]:
    try:
        return {row.key: row.prompt for row in _rows(workspace.objects.path(digest) / "test.jsonl")}
    except (KeyError, OSError):
        return {}


def job_title(job: Job) -> str:
    """Return what a job is, in a few words: "3 tasks, replay", "examination of v3"."""
    wish = job.wish
    if job.kind == "examine":
        return f"{', '.join(wish['versions'])} before {', '.join(wish['benchmarks'])}"
    if job.kind == "bisect":
        return f"which update broke {wish['task']}"
    if job.kind == "suite":
        return f"{', '.join(wish['tasks'])} on {wish['version']}"
    tasks = len(wish.get("stream", []))
    return f"{tasks} task{'s' * (tasks != 1)}, {wish.get('strategy', '')}"


def reasons(workspace: Workspace, job_id: int) -> list[dict[str, Any]]:
    """Return what auto chose for the runs of a job, and why: {strategy, why, tasks}, equal choices told once."""
    found: dict[tuple[str, str], list[str]] = {}
    for run, task in runs_of(workspace, job_id):
        if why := run.settings.get("why"):
            found.setdefault((run.strategy, why), []).append(task)
    return [{"strategy": strategy, "why": why, "tasks": tasks} for (strategy, why), tasks in found.items()]


def strategy_figures(workspace: Workspace, strategy: str) -> dict[str, Any]:
    """Return what a strategy has cost and kept in this workspace, over the newest jobs that asked for it or used it.

    runs: trained with it. seconds: their median training time. times_naive: median of a run's time over that of the same
    task's naive run in the same job; None where no job compared. jobs: of two tasks or more; backward_transfer: mean over
    these, in shares; None where there is none.
    """
    with workspace.read() as session:
        done = session.exec(select(Run).where(Run.status == "done").order_by(Run.id)).all()
        asked = set(session.exec(select(Job.id).where(Job.wish["strategy"].as_string() == strategy)).all())
    naive = {(r.job_id, r.position): r.figures.get("seconds") for r in done if r.track == "naive"}
    mine = [r for r in done if r.strategy == strategy or (r.job_id in asked and r.track == "main")]
    newest = sorted({r.job_id for r in mine})[-NEWEST_JOBS:]
    mine = [r for r in mine if r.job_id in newest and r.figures.get("seconds")]
    ratios = [
        r.figures["seconds"] / other for r in mine if r.track == "main" and (other := naive.get((r.job_id, r.position)))
    ]
    found = [retention(workspace, *place) for place in sorted({(r.job_id, r.track) for r in mine})]
    transfers = [matrix.backward_transfer for matrix in found if matrix and len(matrix.tasks) > 1]
    return {
        "runs": len(mine), "seconds": median(r.figures["seconds"] for r in mine) if mine else None,
        "times_naive": 1.0 if strategy == "naive" and mine else median(ratios) if ratios else None,
        "jobs": len(transfers), "backward_transfer": fmean(transfers) if transfers else None,
    }  # fmt: skip


def kept_rows(workspace: Workspace, version: Version) -> list[dict[str, Any]]:
    """Return the rows that a version keeps of each task to rehearse later, every one with the sentence why.

    One dict for each task: task, snapshot_id, strategy, budget (the knobs that bound it), withdrawn (a count) and rows:
    {key, prompt, response, label, why, withdrawn}.
    """
    found = []
    with workspace.read() as session:
        withdrawn = withdrawn_keys(session)
        for place, digest in version.memory.items():
            if not place.isdigit():
                continue
            taken, run = session.get_one(Snapshot, int(place)), _run_that_kept(session, version, place)
            rows = _rows(workspace.objects.path(digest))
            why = _why_kept(rows, _labels(workspace.objects.path(taken.object) / "train.jsonl"), run)
            found.append({
                "task": session.get_one(Task, taken.task_id).name, "snapshot_id": taken.id, "strategy": run.strategy,
                "budget": _budget(run), "withdrawn": sum(row.key in withdrawn for row in rows),
                "rows": [row.model_dump() | {"key": row.key, "why": why[row], "withdrawn": row.key in withdrawn}
                         for row in rows],
            })  # fmt: skip
    return found


def _run_that_kept(session: Session, version: Version, place: str) -> Run:
    """Return the run that put the rows of snapshot `place` into a version's memory: its own, or an ancestor's."""
    step, run = version, session.get_one(Run, version.run_id)
    while run.snapshot_id != int(place):
        step = session.get_one(Version, step.parent_id)
        run = session.get_one(Run, step.run_id)
    return run


def _why_kept(kept: list[Row], trained: Counter[str], run: Run) -> dict[Row, str]:
    """Return {row: why it is kept}: by which strategy, among how many of its label, drawn from how many."""
    mine, said = Counter(row.label for row in kept), {}
    for row in kept:
        of = "this answer" if row.label == row.response else f"label {row.label}"
        noun = "row" if mine[row.label] == 1 else "rows"
        said[row] = (
            f"kept by {run.strategy}: 1 of {mine[row.label]:,} {noun} of {of}, "
            f"drawn from {trained[row.label]:,} with seed {run.seed}"
        )
    return said


def _budget(run: Run) -> dict[str, Any]:
    """Return {knob: value} of the knobs that bound how many rows are kept, defaults included."""
    given = run.settings.get("strategy", {})
    try:
        given = part_of(run.strategy).Settings(**given).model_dump()
    except (ClmError, ValueError):  # made by a strategy that is not on the shelf any more, or that has other knobs now
        pass
    own = [values for values in given.values() if isinstance(values, dict)]
    knobs = {name: value for group in (given, *own) for name, value in group.items() if value is not None}
    return {name: value for name, value in knobs.items() if name == "rows_share" or name.endswith("_per_task")}


def compare(workspace: Workspace, before: str, after: str) -> dict[str, Any]:
    """Return how two versions answer the same test items: scores of each task, and every item that flipped.

    tasks: {task, items, before, after (shares), change_points, low_points, high_points (95 %, the items drawn in pairs),
    lost, gained}. mean: the same of the mean over the tasks, without items and flips. flips: {task, item, prompt, response,
    kind (lost or gained), loss_before, loss_after (nats of the whole answer), route (the task adapter that answered
    after, "" where there is none)}; lost ones first, and the one whose answer became least likely first of all.

    Raises:
        BadInput: it is the same version twice, or no task was measured of both.
        NotThere: there is no such version.
    """
    old, new = versions.by_name(workspace, before), versions.by_name(workspace, after)
    if old.id == new.id:
        raise BadInput(f"{old.name} is compared with itself. Choose two versions.")
    with workspace.read() as session:
        one, other = (_measured(session, v.id) for v in (old, new))
        by_task = {m.task_id: (m, other[s]) for s, m in sorted(one.items()) if s in other}  # the newest snapshot wins
        named = {task: session.get_one(Task, task).name for task in by_task}
        places = {m.snapshot_id: session.get_one(Snapshot, m.snapshot_id).object for m, _ in by_task.values()}
    if not by_task:
        raise BadInput(f"{old.name} and {new.name} were not measured on the same test rows. Choose two of one line.")
    told, flips = [], []
    pairs = {task: tuple(workspace.objects.path(found.object) for found in one) for task, one in by_task.items()}
    *intervals, interval = _changes(tuple(pairs.values()))
    for (task, (m, _)), (low, high) in zip(by_task.items(), intervals, strict=True):
        paired = _paired(named[task], *pairs[task])
        told.append({
            "task": paired.task, "items": len(paired.before), "before": fmean(paired.before), "after": fmean(paired.after),
            "change_points": paired.change, "low_points": 100 * low, "high_points": 100 * high,
            "lost": paired.lost, "gained": paired.gained,
        })  # fmt: skip
        rows = {row.key: row for row in _rows(workspace.objects.path(places[m.snapshot_id]) / "test.jsonl")}
        flips += _flips(named[task], rows, *map(outcomes, pairs[task]))
    flips.sort(key=lambda flip: (flip["kind"] == "gained", flip["loss_before"] - flip["loss_after"]))
    mean = {name: fmean(one[name] for one in told) for name in ("before", "after", "change_points")}
    mean |= {"low_points": 100 * interval[0], "high_points": 100 * interval[1]}
    return {"before": old.name, "after": new.name, "tasks": told, "mean": mean, "flips": flips}


def _measured(session: Session, version_id: int) -> dict[int, Measurement]:
    """Return {snapshot id: the newest measurement on its test rows} of a version."""
    found = session.exec(
        select(Measurement).where(
            Measurement.version_id == version_id, Measurement.metric == "exact_match", Measurement.split == "test"
        ).order_by(Measurement.id)
    )  # fmt: skip
    return {m.snapshot_id: m for m in found}


# Objects never change, and the page asks for the same ones at every tick.


@lru_cache(maxsize=128)
def outcomes(file: Path) -> dict[str, dict[str, Any]]:
    """Return {item: its line} of an outcomes file."""
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {line["item"]: line for line in lines}


_paired = lru_cache(maxsize=128)(pair)
_rows = lru_cache(maxsize=128)(load)


@lru_cache(maxsize=128)
def _changes(pairs: tuple[tuple[Path, Path], ...]) -> list[Interval]:
    """Return the interval of each task's change and last of their mean, from the outcomes before and after."""
    import numpy

    found = [_paired("", *files) for files in pairs]
    return changes([numpy.array(one.before) for one in found], [numpy.array(one.after) for one in found])


@lru_cache(maxsize=128)
def _labels(file: Path) -> Counter[str]:
    return Counter(row.label for row in load(file))


def _flips(task: str, rows: dict[str, Row], old: dict[str, dict], new: dict[str, dict]) -> list[dict[str, Any]]:
    return [
        {"task": task, "item": item, "prompt": rows[item].prompt, "response": rows[item].response,
         "kind": "gained" if new[item]["exact"] else "lost", "loss_before": old[item]["loss"],
         "loss_after": new[item]["loss"], "route": new[item].get("route", "")}
        for item in old.keys() & new.keys() if old[item]["exact"] != new[item]["exact"]
    ]  # fmt: skip


def readings(workspace: Workspace, version: Version) -> list[dict[str, Any]]:
    """Return the newest reading of each probe on a version, with what has changed since the parent.

    One dict for each: the row, its title, and since: {version, value, low, high}, the change with its 95 % interval over
    the same items; None where the parent was not read with the same ruler.
    """
    found = []
    with workspace.read() as session:
        mine, parent = (
            _read(session, version.id),
            session.get(Version, version.parent_id) if version.parent_id else None,
        )
        before = _read(session, parent.id) if parent else {}
        for name, cls in shelf(SHELF).items():
            if (now := mine.get(name)) is None:
                continue
            then, since = before.get(name), None
            if then and then.ruler == now.ruler:
                change = _change(name, *(workspace.objects.path(reading.object) for reading in (then, now)))
                since = {"version": parent.name} | change._asdict()
            found.append(now.model_dump(mode="json") | {"title": cls.title, "since": since})
    return found


def _read(session: Session, version_id: int) -> dict[str, ProbeReading]:
    """Return {probe: its newest reading} of a version."""
    rows = session.exec(select(ProbeReading).where(ProbeReading.version_id == version_id).order_by(ProbeReading.id))
    return {row.probe: row for row in rows}


@lru_cache(maxsize=128)
def _change(name: str, before: Path, after: Path) -> Value:
    cls = shelf(SHELF)[name]
    return cls(cls.Settings()).change(*(list(outcomes(file).values()) for file in (before, after)))


def counterpart(workspace: Workspace, version: Version) -> str | None:
    """Return the version to compare with: the naive one at the same place of the same job, else the parent; or None."""
    with workspace.read() as session:
        run = session.get(Run, version.run_id) if version.run_id else None
        if run is None:
            return None
        found = session.exec(
            select(Version.name).join(Run, Run.id == Version.run_id)
            .where(Run.job_id == run.job_id, Run.position == run.position, Version.id != version.id)
        ).first()  # fmt: skip
        return found or session.get_one(Version, version.parent_id).name


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
