"""What a person asks for: a wish is checked whole, written down as a job, and found by the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlmodel import select

from clm_app.catalog import pick
from clm_app.data.ingest import find, rows_of, split, tasks
from clm_app.data.reading import read_rows
from clm_app.data.soundness import refuse_untaught_classes
from clm_app.data.streams import TaskSource
from clm_app.engine.examiner import ExaminationSettings
from clm_app.engine.memory import refuse_what_does_not_fit
from clm_app.engine.settings import TrainingSettings
from clm_app.errors import BadData, BadInput, BadSettings, NotThere
from clm_app.judging import benchmarks, harness
from clm_app.judging.gate import GateSettings
from clm_app.probes._base import made as made_probes
from clm_app.registry import versions
from clm_app.repairs._base import SHELF as REPAIRS
from clm_app.repairs._base import RepairSettings
from clm_app.serving.choice import choose as choose_backend
from clm_app.situations import refuse_damage, situation, stored
from clm_app.strategies._base import Situation
from clm_app.strategies._combined import choose, made, part_of
from clm_app.workspace import Workspace
from store.db import record
from store.tables import Job, Snapshot
from store.tables._columns import now
from store.tables.work import ENDED


class LearnWish(BaseModel):
    """Learn a stream of tasks, one after the other, and keep the old ones."""

    model_config = ConfigDict(extra="forbid")

    stream: list[TaskSource] = Field(min_length=1, max_length=1000, description="tasks in the order they are learned")
    strategy: str = Field(
        "auto", description="way against forgetting, or several joined by +; auto chooses and says why"
    )
    strategy_settings: dict = Field(default_factory=dict, description="the strategy's own knobs")
    method: str = Field(
        "", description="way to tune; empty: lora, or full where the model has less than 100 M parameters"
    )
    method_settings: dict = Field(default_factory=dict, description="the method's own knobs")
    training: TrainingSettings = Field(default_factory=TrainingSettings, description="the knobs of every run")
    gate: GateSettings = Field(default_factory=GateSettings, description="how strict the gate is")
    repair: RepairSettings = Field(
        default_factory=RepairSettings,
        description="what is tried when a candidate learned its task and hurt an old one",
    )
    benchmarks: list[str] = Field(
        default_factory=list, max_length=100, description="benchmarks that every candidate is held to beside its tasks: "
        "name, newest version, or name@version",
    )  # fmt: skip
    check_served: bool = Field(
        True, description="ask golden prompts of what would be served before a candidate is promoted, and refuse one that "
        "answers otherwise than was measured",
    )  # fmt: skip
    compare_naive: bool = Field(False, description="also learn the stream without protection, to show the difference")
    deploy: bool = Field(True, description="put a version live when the gate promotes it")
    start_from: str = Field("live", description="version the stream starts from")

    @model_validator(mode="after")
    def _names_and_knobs_are_known(self) -> LearnWish:
        names = [source.name.strip().lower() for source in self.stream]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise BadData(f"The stream names {min(twice)!r} twice; a task is learned once in a stream. Remove one.")
        for rung in self.repair.rungs:
            pick(REPAIRS, rung)
        if self.method:
            pick("clm_app.methods", self.method).Settings(**self.method_settings)
        elif self.method_settings:
            raise BadSettings("method_settings are given without a method. Name the method they belong to.")
        way = made(self.strategy, self.strategy_settings, seed=0)
        if self.method and self.method not in way.methods:
            raise BadSettings(
                f"Strategy {self.strategy} does not work with method {self.method}; it works with {', '.join(way.methods)}. "
                "Choose one of these, or leave the method empty."
            )
        return self

    def method_for(self, parameters: int, strategy: str = "") -> str:
        """Return the method to tune a model of this many parameters with: the chosen one, else what fits its size.

        strategy: the one that does the work, where that is known already; else the one that auto would begin with.
        """
        first = Situation("base", parameters, learned_tasks=0, new_rows=0, method=self.method)
        chosen = strategy or choose(self.strategy, self.strategy_settings, first).strategy
        way = part_of(chosen)
        wanted = self.method or ("full" if parameters < way.full_below else "lora")
        return wanted if wanted in way.methods else way.methods[0]


def ask(workspace: Workspace, wish: LearnWish, by: str) -> Job:
    """Check every file of the wish, write the job down as asked, and return it; nothing is kept of a refused wish.

    Raises:
        BadInput: a file cannot be used, or the model does not fit this machine as it is now.
        NotThere: a task has no file and no snapshot, or there is no version to start from.
    """
    learned = _learned(workspace, wish)
    rows = [_rows(workspace, source, learned) for source in wish.stream]
    _refuse_what_cannot_start(workspace, wish, rows[0])
    with workspace.write() as session:
        job = Job(kind="learn", wish=wish.model_dump(mode="json"), asked_by=by, stage="waiting for the clock")
        session.add(job)
        session.flush()
        record(session, by, "job.asked", f"job:{job.id}", tasks=[s.name for s in wish.stream], strategy=wish.strategy)
    return job


def _rows(workspace: Workspace, source: TaskSource, learned: dict[str, Snapshot]) -> int:
    """Return how many rows a task of the stream has, which all can be read and teach every class that they test.

    learned: {key of a task: the rows that the version to start from has learned of it}; what these taught is known.
    """
    key = source.name.strip().lower()
    taken = next((taken for task, taken in tasks(workspace) if task.key == key), None)
    if source.path:
        found = read_rows(Path(source.path), workspace.settings).rows
        parts, count, where = split(found, seed=0), len(found), Path(source.path).name
    elif taken is None:
        raise NotThere(f"There is no task {source.name!r} and no file for it. Add the file on the Data tab first.")
    else:
        stored(workspace, taken.object, f"The rows of {source.name}")
        parts = {part: rows_of(workspace, taken, part) for part in ("train", "test")}
        count, where = taken.train_rows, source.name
    known = _taught(workspace, learned[key]) if key in learned else ()
    refuse_untaught_classes(parts["train"], parts["test"], known, where)
    return count


def _learned(workspace: Workspace, wish: LearnWish) -> dict[str, Snapshot]:
    """Return {key of a task: its rows} of what the version to start from has learned; a fresh home stays as it is."""
    if not versions.everything(workspace):
        return {}
    parent = versions.by_name(workspace, wish.start_from)
    with workspace.read() as session:
        return {task.key: taken for taken, task in versions.lineage(session, parent)}


def _taught(workspace: Workspace, taken: Snapshot) -> set[str]:
    """Return the labels that a snapshot's training rows have; none where its rows are gone."""
    try:
        return {row.label for row in rows_of(workspace, taken, "train")}
    except KeyError:
        return set()


def _refuse_what_cannot_start(workspace: Workspace, wish: LearnWish, rows: int) -> None:
    """Look whether all that the first run needs is there and, where no other job has to end first, for room to train now.

    Every probe's file is read too: a missing one is said now and not in the middle of the job.
    """
    made_probes(workspace.settings.probes)
    for name in wish.benchmarks:
        benchmarks.kind_of(benchmarks.find(workspace, name))
    parent = versions.by_name(workspace, wish.start_from)
    task = find(workspace, wish.stream[0].name)
    known = situation(workspace, wish, parent, task.name if task else wish.stream[0].name.strip(), rows)
    strategy = choose(wish.strategy, wish.strategy_settings, known).strategy
    part_of(strategy).refuse_situation(known)
    base, _ = versions.weights(workspace, parent)
    method, knobs = pick("clm_app.methods", wish.method_for(parent.parameters, strategy)), wish.training
    method.refuse()
    with workspace.read() as session:
        if session.exec(select(Job.id).where(Job.status.not_in(ENDED))).first() is not None:
            return
    refuse_what_does_not_fit(
        parent.parameters, base, method.weights_kind, knobs.batch_rows, knobs.max_tokens, workspace.home, method.base_bits,
        part_of(strategy).needs_parent,
    )  # fmt: skip


class ExamineWish(BaseModel):
    """Let versions sit benchmarks."""

    model_config = ConfigDict(extra="forbid")

    benchmarks: list[str] = Field(min_length=1, max_length=100, description="names, newest version, or name@version")
    versions: list[str] = Field(["live"], min_length=1, max_length=1000, description="names of versions, or live")
    split: Literal["test", "validation"] = Field(
        "test", description="test judges, and is asked once of each version; validation is for searching"
    )
    on: Literal["trained", "served"] = Field(
        "trained", description="trained: the weights in full precision; served: through the backend that serves them"
    )
    fresh: bool = Field(False, description="ask again what was asked before; needs a reason")
    reason: str = Field("", max_length=500, description="why it is asked again; kept in the audit trail")
    run: ExaminationSettings = Field(default_factory=ExaminationSettings, description="how the items are asked")


def ask_examination(workspace: Workspace, wish: ExamineWish, by: str) -> Job:
    """Check everything that the wish names, write the job down with the versions that are meant now, and return it.

    Raises:
        NotThere: no such benchmark or version.
        BadInput: a fresh examination without a reason, a split without items, damaged weights or items, or a version
            that the chosen backend cannot serve; nothing was written down.
    """
    reason = wish.reason.strip()
    if wish.fresh and not reason:
        raise BadInput("Asking again what was asked before needs a reason, which the audit trail keeps. Write one.")
    rows = [benchmarks.find(workspace, name) for name in wish.benchmarks]
    for row in rows:
        if not benchmarks.items_of(workspace, row, wish.split):
            raise BadData(f"{benchmarks.title(row)} has no {wish.split} items. Choose the other split.")
        benchmarks.kind_of(row)
    found = [versions.by_name(workspace, name) for name in wish.versions]
    for version in found:
        refuse_damage(workspace, version)
        if wish.on == "served":
            choose_backend(workspace.settings.backend, *versions.weights(workspace, version))
    meant = {"benchmarks": [benchmarks.title(row) for row in rows], "versions": [version.name for version in found]}
    with workspace.write() as session:
        job = Job(kind="examine", wish=wish.model_dump(mode="json") | meant, asked_by=by, stage="waiting for the clock")
        session.add(job)
        session.flush()
        again = {"fresh": True, "reason": reason} if wish.fresh else {}
        record(session, by, "job.asked", f"job:{job.id}", **meant, split=wish.split, on=wish.on, **again)
    return job


class SuiteWish(harness.HarnessSettings):
    """Let a version run tasks of the lm-evaluation-harness, from files of this machine."""

    version: str = Field("live", min_length=1, max_length=80, description="name of the version, or live")


def ask_suite(workspace: Workspace, wish: SuiteWish, by: str) -> Job:
    """Look whether the suite could be run, write the job down with the version that is meant now, and return it.

    Raises:
        NotThere: no such version, or the harness is not installed.
        BadInput: damaged weights; a folder or a task that is not there, or runs Python of its own and is not trusted.
    """
    version = versions.by_name(workspace, wish.version)
    refuse_damage(workspace, version)
    harness.refuse(wish)
    meant = {"version": version.name, "folder": str(wish.folder.resolve()), "tasks": list(dict.fromkeys(wish.tasks))}
    with workspace.write() as session:
        job = Job(kind="suite", wish=wish.model_dump(mode="json") | meant, asked_by=by, stage="waiting for the clock")
        session.add(job)
        session.flush()
        record(session, by, "job.asked", f"job:{job.id}", **meant, trust_code=wish.trust_code)
    return job


def cancel(workspace: Workspace, job_id: int, by: str) -> Job:
    """Ask a job to stop: at once if it has not begun, else at the next step, with its checkpoint kept.

    Raises:
        NotThere: no such job.
        BadInput: it has ended already.
    """
    with workspace.write() as session:
        job = session.get(Job, job_id)
        if job is None:
            raise NotThere(f"There is no job {job_id}.")
        if job.status in ENDED:
            raise BadInput(f"Job {job_id} is {job.status} already; there is nothing to cancel.")
        job.is_cancel_asked = True
        if job.status == "asked":
            job.status, job.ended_at, job.stage = "cancelled", now(), "cancelled before it began"
        session.add(job)
        record(session, by, "job.cancel_asked", f"job:{job.id}")
    return job
